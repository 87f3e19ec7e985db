"""Random valid specs for hypothesis, made of the examples of every registered kind: other values in their fields, other
nodes inside, encodings that they have hooks for. A new kind, a plugin's too, needs no edit here."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fusiontree.branches import SwiGLU
from fusiontree.core.contracts.encoding import encodings
from fusiontree.core.contracts.fusion import FusionSpec, fusions
from fusiontree.core.contracts.gate import gates
from fusiontree.core.contracts.modules import Norm
from fusiontree.core.contracts.node import BranchSpec, NodeSpec, Scope, branches
from fusiontree.core.model.spec import ModelSpec
from fusiontree.core.spec.base import Spec
from fusiontree.errors import SpecError

WIDTH = 16
ENCODINGS = {f"{kind}_{i}": spec for kind, cls in encodings.usable() for i, spec in enumerate(cls.examples(WIDTH))}
SHARED = {"block": SwiGLU(hidden=8)}
SCOPE = Scope(WIDTH, ENCODINGS, SHARED, 0, WIDTH)
WHOLE = {"conv": st.integers(1, 4), "window": st.integers(1, 6)}
"""Whole numbers that may be others than in an example."""
FIXED = {
    "project": "the place decides it",
    "encodings": "they are drawn apart",
    "keys_from": "a layer of its own reads keys",
    "count": "it is what narrowing leaves",
    "mean.over": "it is what dropping leaves",
    "mla.bias": "unrotated, that of the shared key moves all scores of a query alike, which no softmax sees",
}
"""Fields, or those of a kind, that stay as they are in examples, with the reason."""


@st.composite
def others(draw: st.DrawFn, spec: Spec) -> Any:
    """A spec with other values in some of its fields; a value with which it would not be valid is left."""
    for name in type(spec).model_fields:
        if {name, f"{getattr(spec, 'kind', None)}.{name}"} & set(FIXED):
            continue
        value = draw(other(spec, name))
        if value is not getattr(spec, name):
            spec = valid(spec, {name: value}) or spec
    return spec


def valid(spec: Spec, fields: dict[str, Any]) -> Any:
    """The spec with other fields, None where they do not go together."""
    try:
        return type(spec).parse({**spec.data(), **fields})
    except SpecError:
        return None


def other(spec: Spec, name: str) -> st.SearchStrategy[Any]:
    """Values of a field, by its type."""
    value, types = getattr(spec, name), list(choices(type(spec).model_fields[name].annotation))
    options: list[st.SearchStrategy[Any]] = [others(value) if is_part(value) else st.just(value)]
    if isinstance(value, bool):
        options.append(st.booleans())
    if name in WHOLE and value is not None:
        options.append(WHOLE[name])
    options += [st.sampled_from(get_args(each)) for each in types if get_origin(each) is Literal and name != "kind"]
    if isinstance(spec, Norm) and name == "kind":
        options.append(st.sampled_from(["rms", "layer"]))
    if type(None) in types:
        options.append(st.none())
    if value is None:
        options += [others(each()) for each in types if isinstance(each, type) and issubclass(each, Norm)]
    return st.one_of(options)


def is_part(value: Any) -> bool:
    """Whether a value is a spec inside another, and no component."""
    return isinstance(value, Spec) and not isinstance(value, NodeSpec) and not hasattr(value, "build")


def choices(annotation: Any) -> Iterator[Any]:
    """The types that a field's value may have."""
    if get_origin(annotation) in (Union, type(int | None)):
        yield from (each for choice in get_args(annotation) for each in choices(choice))
    else:
        yield annotation


def fits(node: NodeSpec, scope: Scope) -> bool:
    """Whether a node may stand somewhere."""
    walked = list(node.walk(scope))
    widths = node.output_width(scope) == scope.width
    return widths and not any(True for _, inside, around in walked for _ in inside.problems(around))


@st.composite
def encoded(draw: st.DrawFn, branch: BranchSpec) -> BranchSpec:
    """A branch with encodings: any that add, at most one that rotates and one that biases."""
    known = {name: e for name, e in ENCODINGS.items() if not any(e.problems(branch.channels()))}
    names: list[str] = []
    for hook, most in {"input": 2, "rotate": 1, "bias": 1}.items():
        having = [name for name, encoding in known.items() if hook in encoding.hooks & branch.hooks]
        names += draw(st.lists(st.sampled_from(having), max_size=most, unique=True)) if having else []
    return branch.model_copy(update={"encodings": tuple(names)})


def examples(families: Iterable[Any], *, nested: bool) -> list[Any]:
    """Every example of some families' kinds that has nodes inside, or that has none."""
    every = [each for family in families for _, cls in family.usable() for each in cls.examples(WIDTH)]
    return [each for each in every if bool(list(each.children())) == nested]


LEAVES, NESTED = examples([branches], nested=False), examples([branches, fusions], nested=True)
GATED = [each for each in NESTED if isinstance(each, FusionSpec) and each.gate_spec is not None]
INNER = [valid(each, {"project": False, "out_bias": False}) for each in LEAVES if hasattr(each, "project")]


@st.composite
def leaves(draw: st.DrawFn) -> BranchSpec:
    """Branches without nodes inside."""
    return draw(encoded(draw(others(draw(st.sampled_from(LEAVES))))))


@st.composite
def inner_leaves(draw: st.DrawFn) -> BranchSpec:
    """Branches that return their inner features, all equally many."""
    spec = draw(st.sampled_from(INNER))
    changed = draw(others(spec))
    return draw(encoded(changed if changed.inner == spec.inner else spec))


@st.composite
def nodes(draw: st.DrawFn, depth: int) -> NodeSpec:
    """Branches, and fusions and chains nested up to `depth`."""
    if depth == 0 or draw(st.booleans()):
        return draw(leaves())
    return draw(nested(depth))


@st.composite
def nested(draw: st.DrawFn, depth: int) -> NodeSpec:
    spec = draw(with_others_inside(draw(st.sampled_from([*NESTED, *2 * GATED])), depth - 1))
    return draw(with_other_parts(spec)) if isinstance(spec, FusionSpec) else draw(others(spec))


@st.composite
def with_others_inside(draw: st.DrawFn, spec: NodeSpec, depth: int) -> NodeSpec:
    """A node with other nodes inside where they fit."""
    for path, child in list(spec.children()):
        field, *name = path.split(".")
        found = draw(inner_leaves() if getattr(child, "project", True) is False else nodes(depth))
        if field == "links" and isinstance(found, BranchSpec):  # whose width is not the stream's
            found = found.model_copy(update={"encodings": ()})
        spec = fitting(spec, {field: {**getattr(spec, field), name[0]: found} if name else found})
    return spec


@st.composite
def with_other_parts(draw: st.DrawFn, spec: FusionSpec) -> FusionSpec:
    """A fusion of one, two or three branches, of inner features or not, with other parts and another gate."""
    donor = next(fusions.get("gated").examples(WIDTH))
    match draw(st.integers(0, 5)):
        case 0:
            spec = spec.without_branch(draw(st.sampled_from(list(spec.branches))))
        case 1:
            names = (*spec.branches, "third")
            gate = {"gate": next(gates.get("softmax").examples(names, WIDTH))} if spec.gate_spec else {}
            spec = fitting(spec, {"branches": {**spec.branches, "third": draw(leaves())}, **gate})
    if draw(st.booleans()):
        inside = {name: draw(inner_leaves()) for name in spec.branches}
        spec = fitting(spec, {"branches": inside, "projection": {"bias": draw(st.booleans())}})
    for name in ("branch_norm", "exchange", "align", "projection", "mlp"):
        if name in type(spec).model_fields:
            part = draw(st.sampled_from([None, getattr(donor, name)]))
            spec = fitting(spec, {name: draw(others(part)) if is_part(part) else part})
    if spec.gate_spec is not None:
        every = [gate for _, cls in gates.usable() for gate in cls.examples(tuple(spec.branches), WIDTH)]
        spec = fitting(spec, {"gate": draw(st.sampled_from(every))})
    return spec


def fitting(spec: Any, fields: dict[str, Any]) -> Any:
    """The spec with other fields, itself where they do not fit."""
    other = valid(spec, fields)
    return other if other is not None and fits(other, SCOPE) else spec


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    placement = draw(st.sampled_from(["pre", "post", "sandwich", "none"]))
    residual = draw(st.sampled_from([{}, {"add": 0.5}, {"keep": 0.9, "add": 1.1}]))
    if placement in ("pre", "sandwich") and draw(st.booleans()):
        residual = residual | {"from": "normed"}
    return {
        "mixer": draw(st.one_of(nodes(1), nested(1), nested(1), nested(2))),
        "ffn": draw(st.one_of(st.none(), leaves())),
        "norm": draw(others(Norm())),
        "placement": placement,
        "residual": residual,
    }


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """A model of one or two layers, perhaps repeated, with the encodings and the shared nodes that it names."""
    stack: list[Any] = draw(st.lists(layers(), min_size=1, max_size=2))
    stack = [{"repeat": 2, "layers": stack}] if draw(st.booleans()) and len(stack) == 1 else stack
    head = {"tied": draw(st.booleans()), "softcap": draw(st.sampled_from([None, 5.0])), "bias": draw(st.booleans())}
    data = {"vocab_size": 11, "width": WIDTH, "encodings": ENCODINGS, "shared": SHARED, "layers": stack, "head": head}
    spec = ModelSpec.model_validate(data)
    spec = with_reader_of_keys(spec) if draw(st.booleans()) else spec
    if any(node.cache_bytes(scope, 8, torch.float32) for _, node, scope in spec.layer_nodes()):
        spec = spec.replace({"prefix": draw(st.sampled_from([None, None, {"tokens": 1}, {"tokens": 3}]))})
    return named_only(spec)


def with_reader_of_keys(spec: ModelSpec) -> ModelSpec:
    """With one layer more, that reads the keys of the first, where the first has some to read."""
    mixer = spec.expanded_layers()[0].mixer
    if mixer is None or mixer.kv_source_field is None:
        return spec
    reader = mixer.model_copy(update={mixer.kv_source_field: "layers.0.mixer"})
    try:
        return ModelSpec.parse({**spec.data(), "layers": [*spec.data()["layers"], {"mixer": reader.data()}]})
    except SpecError:  # what belongs to keys of its own
        return spec


def named_only(spec: ModelSpec) -> ModelSpec:
    """Without the encodings and the shared nodes that nobody names."""
    used = {node.uses for _, node, _ in spec.layer_nodes()}
    shared = {name: node for name, node in spec.data()["shared"].items() if name in used}
    named = {name for _, node in spec.nodes() for name in getattr(node, "encodings", ())}
    encodings = {name: encoding for name, encoding in spec.data()["encodings"].items() if name in named}
    return ModelSpec.parse({**spec.data(), "shared": shared, "encodings": encodings})


PARTS, SPECS = 4, 12


def parts() -> list[Any]:
    """The parts of the specs that tests share out among workers; most are for the slow tests."""
    return [*range(PARTS), *(pytest.param(part, marks=pytest.mark.slow) for part in range(PARTS, 30))]


def for_random_specs(part: int, law: Any) -> None:
    """Run a function on the specs of a part, which are the same each time."""
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    phases = [Phase.generate, Phase.shrink]
    hypothesis.seed(part)(settings(max_examples=SPECS, phases=phases, **options)(given(spec=specs())(law)))()
