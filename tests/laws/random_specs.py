"""Random valid specs for hypothesis: every kind, nested fusions, every part, tiny shapes."""

from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fusiontree.core.model.spec import ModelSpec

WIDTH = 16
INNER = 24
ENCODINGS = {
    "alibi": {"kind": "alibi"},
    "sincos": {"kind": "srte_sincos"},
    "learned": {"kind": "srte_learned", "max_length": 64},
    "low_rank": {"kind": "srte_learned", "max_length": 64, "rank": 3},
    "rope": {"kind": "rope"},
    "half_rope": {"kind": "rope", "theta": 100.0, "dim": 2},
    "yarn": {"kind": "rope", "theta": 50.0, "scaling": {"kind": "yarn", "factor": 2.0, "original_length": 8}},
    "llama3": {"kind": "rope", "theta": 50.0, "scaling": {"kind": "llama3", "factor": 2.0, "original_length": 8}},
}
ADDED, ROTATED = ["sincos", "learned", "low_rank"], ["rope", "half_rope", "yarn", "llama3"]
Data = dict[str, Any]


@st.composite
def named(draw: st.DrawFn, *, rotates: bool) -> list[str]:
    """Names of encodings: any that add, at most one that rotates."""
    added = draw(st.lists(st.sampled_from(ADDED), max_size=2, unique=True))
    return added + (draw(st.lists(st.sampled_from(ROTATED), max_size=1)) if rotates else [])


@st.composite
def norms(draw: st.DrawFn) -> Data:
    return {
        "kind": draw(st.sampled_from(["rms", "layer"])),
        "gain": draw(st.sampled_from(["none", "weight", "one_plus"])),
    }


@st.composite
def attentions(draw: st.DrawFn, *, project: bool = True) -> Data:
    kv, queries = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    own = {
        "heads": kv * queries,
        "kv_heads": kv,
        "head_dim": 4,
        "window": draw(st.one_of(st.none(), st.integers(1, 6))),
    }
    if own["window"] and draw(st.booleans()):
        more = draw(st.integers(1, 2))
        own |= {"heads": kv * queries + more, "kv_heads": kv + 1, "global_heads": more, "global_kv_heads": 1}
    if not project:
        own |= {
            "heads": 4,
            "kv_heads": 2,
            "value_dim": INNER // 4,
            "window": own["window"],
            "global_heads": 0,
            "global_kv_heads": 0,
        }
    over = draw(st.sampled_from(["head", "all"]))
    options = {
        "qk_norm": draw(st.one_of(st.none(), norms().map(lambda norm: norm | {"over": over}))),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "scale": draw(st.sampled_from([None, 0.3])),
        "gate": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "out_bias": project and draw(st.booleans()),
        "project": project,
    }
    falling = draw(st.sampled_from([[], ["alibi"]]))
    return {"kind": "attention", "encodings": draw(named(rotates=True)) + falling, **own, **options}


@st.composite
def mlas(draw: st.DrawFn, *, project: bool = True) -> Data:
    shape = {"heads": draw(st.integers(1, 3)), "value_dim": draw(st.sampled_from([None, 3]))}
    encodings = draw(named(rotates=True))
    rotates = not set(encodings).isdisjoint(ROTATED)
    return {
        "kind": "mla",
        "encodings": encodings,
        **(shape if project else {"heads": 4, "value_dim": INNER // 4}),
        "head_dim": 3,
        "shared_dim": 2,
        "rank": draw(st.integers(2, 5)),  # a norm makes a constant of a single feature
        "query_rank": draw(st.sampled_from([None, 3])),
        "norm": draw(st.one_of(st.none(), norms())),
        "window": draw(st.one_of(st.none(), st.integers(1, 6))),
        "scale": draw(st.sampled_from([None, 0.3])),
        "bias": rotates and draw(st.booleans()),  # the same for all keys, it would change no softmax
        "out_bias": project and draw(st.booleans()),
        "project": project,
    }


@st.composite
def mamba2s(draw: st.DrawFn, *, project: bool = True) -> Data:
    groups = draw(st.integers(1, 2))
    gated = {"groups": groups, "order": draw(st.sampled_from(["gate_first", "norm_first"]))}
    shape = {"heads": 2 * groups, "head_dim": 3} if project else {"heads": 4, "head_dim": INNER // 4}
    return {
        "kind": "mamba2",
        "encodings": draw(named(rotates=True)),
        **shape,
        "groups": groups,
        "state": 4,
        "conv": draw(st.integers(1, 4)),
        "conv_bias": draw(st.booleans()),
        "dt_limit": draw(st.sampled_from([[0.0, None], [0.001, 1.0]])),  # below which none starts
        "norm": draw(st.one_of(st.none(), norms().map(lambda norm: norm | gated))),
        "bias": draw(st.booleans()),
        "project": project,
    }


@st.composite
def mamba1s(draw: st.DrawFn, *, project: bool = True) -> Data:
    return {
        "kind": "mamba1",
        "encodings": draw(named(rotates=False)),
        "inner": draw(st.integers(1, 9)) if project else INNER,
        "state": draw(st.integers(2, 4)),  # a norm makes a constant of a single feature
        "rank": draw(st.integers(2, 3)),
        "conv": draw(st.integers(1, 4)),
        "conv_bias": draw(st.booleans()),
        "norm": draw(st.one_of(st.none(), norms())),
        "bias": draw(st.booleans()),
        "out_bias": project and draw(st.booleans()),
        "project": project,
    }


@st.composite
def short_convs(draw: st.DrawFn, *, project: bool = True) -> Data:
    return {
        "kind": "short_conv",
        "encodings": draw(named(rotates=False)),
        "inner": 6 if project else INNER,
        "conv": draw(st.integers(1, 4)),
        "conv_bias": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "out_bias": project and draw(st.booleans()),
        "project": project,
    }


@st.composite
def rglrus(draw: st.DrawFn, *, project: bool = True) -> Data:
    heads = draw(st.integers(1, 3)) if project else 4
    return {
        "kind": "rglru",
        "encodings": draw(named(rotates=False)),
        "heads": heads,
        "head_dim": draw(st.integers(1, 4)) if project else INNER // heads,
        "conv": draw(st.integers(1, 4)),
        "conv_bias": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "out_bias": project and draw(st.booleans()),
        "project": project,
    }


@st.composite
def lightnings(draw: st.DrawFn, *, project: bool = True) -> Data:
    heads = draw(st.integers(1, 3)) if project else 4
    return {
        "kind": "lightning",
        "encodings": draw(named(rotates=True)),
        "heads": heads,
        "head_dim": 4,
        "value_dim": draw(st.sampled_from([None, 3])) if project else INNER // 4,
        "slopes": draw(st.lists(st.sampled_from([0.0, 0.1, 3.0]), min_size=heads, max_size=heads)),
        "norm": draw(norms()),
        "bias": draw(st.booleans()),
        "out_bias": project and draw(st.booleans()),
        "project": project,
    }


@st.composite
def gated_deltas(draw: st.DrawFn, *, project: bool = True) -> Data:
    key_heads = draw(st.integers(1, 2))
    shape = {"heads": key_heads * draw(st.integers(1, 2)), "value_dim": draw(st.sampled_from([None, 3]))}
    return {
        "kind": "gated_delta",
        "encodings": draw(named(rotates=True)),
        **(shape if project else {"heads": 4, "value_dim": INNER // 4}),
        "key_heads": key_heads,
        "head_dim": 4,
        "conv": draw(st.integers(1, 4)),
        "conv_bias": draw(st.booleans()),
        "negative_eigenvalues": draw(st.booleans()),
        "decay": draw(st.sampled_from(["head", "channel"])),
        "decay_rank": draw(st.sampled_from([None, 3])),
        "norm": draw(st.one_of(st.none(), norms())),
        "gate": draw(st.sampled_from(["silu", "sigmoid"])),
        "gate_rank": draw(st.sampled_from([None, 2])),
        "bias": draw(st.booleans()),
        "out_bias": project and draw(st.booleans()),
        "project": project,
    }


@st.composite
def feed_forwards(draw: st.DrawFn) -> Data:
    activations = ("gelu", "gelu_tanh", "relu2", "geglu", "geglu_tanh")
    kind = draw(st.sampled_from([{"kind": "swiglu"}, *({"kind": "mlp", "activation": a} for a in activations)]))
    return {**kind, "hidden": 8, "bias": draw(st.booleans()), "encodings": draw(named(rotates=False))}


@st.composite
def moes(draw: st.DrawFn) -> Data:
    shared = draw(st.sampled_from([None, 5]))
    experts, groups = draw(st.sampled_from([(2, 1), (3, 1), (4, 1), (4, 2)]))
    return {
        "kind": "moe",
        "experts": experts,
        "top_k": 2,  # the share of a single one may always be 1
        "hidden": 4,
        "activation": draw(st.sampled_from(["swiglu", "relu2"])),
        "router": {
            "scores": draw(st.sampled_from(["softmax", "sigmoid"])),
            "renormalise": draw(st.booleans()),
            "groups": groups,
            "top_groups": draw(st.integers(1, groups)),
        },
        "shared_hidden": shared,
        "shared_gate": shared is not None and draw(st.booleans()),
        "encodings": draw(named(rotates=False)),
    }


@st.composite
def gates(draw: st.DrawFn, names: list[str]) -> Data:
    kinds = ["softmax", "constant", *(["sigmoid", "hard_concrete"] if len(names) == 2 else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "constant":
        shares = draw(st.lists(st.integers(1, 4), min_size=len(names), max_size=len(names)))
        return {"kind": kind, "values": {n: s / sum(shares) for n, s in zip(names, shares, strict=True)}}
    option = draw(
        st.sampled_from(
            [
                {"granularity": "layer"},
                {"granularity": "token"},
                {"granularity": "head", "heads": 4},
                {"granularity": "head", "heads": 2, "static": True},
                {"granularity": "channel"},
                {"granularity": "channel", "rank": 2},
                {"granularity": "channel", "static": True},
            ]
        )
    )
    return {"kind": kind, **option}


@st.composite
def fusions(draw: st.DrawFn, depth: int) -> Data:
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
    inner = draw(st.booleans())
    inners = (attentions, mlas, mamba2s, mamba1s, short_convs, gated_deltas, rglrus, lightnings)
    branch = st.one_of(*(kind(project=False) for kind in inners)) if inner else nodes(depth - 1)
    kind = draw(st.sampled_from(["gated", "sum", "mean", "concat", "inject"]))
    several = len(names) > 1
    data: Data = {
        "kind": kind,
        "branches": {name: draw(branch) for name in names},
        "branch_norm": draw(st.one_of(st.none(), norms())),
        "exchange": {"rank": 2} if several and draw(st.booleans()) else None,
        "projection": {"bias": draw(st.booleans())} if inner or kind == "concat" or draw(st.booleans()) else None,
        "mlp": draw(st.one_of(st.none(), feed_forwards())),
    }
    if kind == "gated" and several:
        data["gate"] = draw(gates(names))
    if kind == "sum" and draw(st.booleans()):
        data["multipliers"] = {names[0]: 0.5}
    if kind == "inject":
        data |= {"into": draw(nodes(depth - 1)), "norm": draw(st.one_of(st.none(), norms()))}
    reads = data["mlp"] or ("gate" in data and _reads(data["gate"]))
    data["align"] = {"hidden": 5} if reads and draw(st.booleans()) else None
    return data


def _reads(gate: Data) -> bool:
    return gate["kind"] != "constant" and gate["granularity"] != "layer" and not gate.get("static")


@st.composite
def chains(draw: st.DrawFn, depth: int) -> Data:
    links = {
        "first": draw(attentions(project=False)),
        "out": {"kind": "linear", "outputs": WIDTH, "bias": draw(st.booleans())},
        "last": draw(nodes(depth - 1)),
    }
    normed = draw(st.lists(st.sampled_from(list(links)), unique=True))
    for name in ("first", "out"):
        links[name]["encodings"] = [e for e in links[name].get("encodings", []) if e in ROTATED]
    return {
        "kind": "chain",
        "links": links,
        "norms": {name: draw(norms()) for name in normed},
        "embedding": draw(st.booleans()),
    }


@st.composite
def uses(draw: st.DrawFn) -> Data:
    """Of the two shared nodes of `specs`."""
    name, maps = draw(st.sampled_from([("ffn", ["gate", "up"]), ("attention", ["q", "k"])]))
    several = draw(st.booleans())
    adapters = {"first": {"maps": maps if several else maps[:1], "rank": draw(st.integers(1, 2))}}
    return {"kind": "use", "of": name, "adapters": adapters if draw(st.booleans()) else {}}


def nodes(depth: int) -> st.SearchStrategy[Data]:
    """Branches, and fusions nested up to `depth`."""
    recurrent = mamba2s(), mamba1s(), short_convs(), gated_deltas(), rglrus(), lightnings()
    mixers = st.one_of(attentions(), mlas(), *recurrent, feed_forwards(), moes(), uses())
    return st.one_of(mixers, fusions(depth), chains(depth)) if depth > 0 else mixers


@st.composite
def layers(draw: st.DrawFn) -> Data:
    placement = draw(st.sampled_from(["pre", "post", "sandwich", "none"]))
    residual = draw(st.sampled_from([{}, {"add": 0.5}, {"keep": 0.9, "add": 1.1}]))
    if placement in ("pre", "sandwich") and draw(st.booleans()):
        residual = residual | {"from": "normed"}
    return {
        "mixer": draw(st.one_of(fusions(2), nodes(1))),
        "ffn": draw(st.one_of(st.none(), feed_forwards(), moes())),
        "norm": draw(norms()),
        "placement": placement,
        "residual": residual if draw(st.booleans()) else {},
    }


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """A model of one or two layers, perhaps repeated, with the encodings that it names."""
    stack = draw(st.lists(layers(), min_size=1, max_size=2))
    stack = [{"repeat": 2, "layers": stack}] if draw(st.booleans()) and len(stack) == 1 else stack
    stack += draw(readers_of_keys(stack))
    head = {"tied": draw(st.booleans()), "softcap": draw(st.sampled_from([None, 5.0])), "bias": draw(st.booleans())}
    shared = {"ffn": {"kind": "swiglu", "hidden": 4}, "attention": draw(attentions())}
    shared = {name: node for name, node in shared.items() if f"'use', 'of': '{name}'" in str(stack)}
    text = str([stack, shared])
    mixes = any(f"'kind': '{kind}'" in text for kind in ("attention", "mamba1", "mamba2", "gated_delta"))
    return ModelSpec.model_validate(
        {
            "vocab_size": 11,
            "width": WIDTH,
            "prefix": draw(st.sampled_from([None, None, {"tokens": 1}, {"tokens": 3}])) if mixes else None,
            "encodings": {name: encoding for name, encoding in ENCODINGS.items() if f"'{name}'" in text},
            "shared": shared,
            "layers": stack,
            "head": head,
        }
    )


@st.composite
def readers_of_keys(draw: st.DrawFn, stack: list[Data]) -> list[Data]:
    """Perhaps a layer that uses keys and values of the first."""
    source = stack[0].get("mixer", {})
    if source.get("kind") != "attention" or draw(st.booleans()):
        return []
    own = draw(attentions())
    keys = {name: source[name] for name in ("heads", "kv_heads", "head_dim", "window")}
    keys |= {name: source.get(name, 0) for name in ("global_heads", "global_kv_heads")}
    keys |= {"encodings": source["encodings"]}
    return [{"mixer": own | keys | {"keys_from": "layers.0.mixer"}}]


PARTS, SPECS = 4, 15


def parts():
    """The parts of the specs that tests share out among workers; most are for the slow tests."""
    return [*range(PARTS), *(pytest.param(part, marks=pytest.mark.slow) for part in range(PARTS, 30))]


def for_random_specs(part, law):
    """Run a function on the specs of a part, which are the same each time."""
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    phases = [Phase.generate, Phase.shrink]
    hypothesis.seed(part)(settings(max_examples=SPECS, phases=phases, **options)(given(spec=specs())(law)))()
