"""Shared nodes beside the plainest form of the same: a model in which every use has weights of its own."""

import copy
import re

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import fusiontree as ft
from fusiontree.core.model.initialise import initialise
from fusiontree.errors import SpecError
from fusiontree.testing.subject import randomised
from fusiontree.training.parallel import shard, world

torch.set_num_threads(1)
ATTENTION = {"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 8, "project": False, "encodings": ["rope"]}
BLOCK = {
    "kind": "chain",
    "embedding": True,
    "links": {
        "attention": ATTENTION,
        "out": {"kind": "linear", "outputs": 16},
        "feed_forward": {"kind": "mlp", "activation": "geglu", "hidden": 12, "bias": True},
    },
    "norms": {"attention": {}, "feed_forward": {}},
}
MAMBA = {"kind": "mamba2", "heads": 2, "head_dim": 8, "state": 4}
GATE_UP = {"maps": ["links.feed_forward.gate", "links.feed_forward.up"], "rank": 3}
Q = {"maps": ["links.attention.q"], "rank": 2}


def use(of="block", **adapters):
    return {"kind": "use", "of": of, "adapters": adapters}


def hybrid(branch, into=MAMBA):
    inject = {"kind": "inject", "branches": {"block": branch}, "projection": {}, "norm": {}, "into": into}
    return {"placement": "none", "mixer": inject}


def spec_of(*branches, shared=BLOCK, **more):
    layers = [{"mixer": MAMBA}, *(hybrid(branch) for branch in branches)]
    rope = {"encodings": {"rope": {"kind": "rope"}}}
    shared = {} if shared is None else {"shared": {"block": shared}}
    return ft.ModelSpec.parse({"vocab_size": 23, "width": 16, "layers": layers} | rope | shared | more)


USES = [use(), use(both=GATE_UP), use(both=GATE_UP, q=Q)]
SPEC = spec_of(*USES)
PLACES = [f"layers.{index}.mixer.branches.block" for index in (1, 2, 3)]
TOKENS = torch.randint(0, 23, (2, 21), generator=torch.Generator().manual_seed(0))
ADAPTED = {PLACES[1]: [GATE_UP], PLACES[2]: [GATE_UP, Q]}


def built(dtype=torch.float64):
    return randomised(ft.build(SPEC, dtype=torch.float64), 0).to(dtype)


def unshared(model):
    """A model of the same function whose blocks are three, each with the weights that its use comes to."""
    apart = ft.build(spec_of(BLOCK, BLOCK, BLOCK, shared=None), dtype=torch.float64)
    state = model.state_dict()
    found = {name: tensor for name, tensor in state.items() if name in apart.state_dict()}
    for place in PLACES:
        block = {name.removeprefix("shared.block."): t for name, t in state.items() if name.startswith("shared.")}
        found |= {f"{place}.{name}": tensor.clone() for name, tensor in block.items()}
        for name, adapter in zip(("both", "q"), ADAPTED.get(place, ()), strict=False):
            for index, path in enumerate(adapter["maps"]):
                up = state[f"{place}.adapters.{name}.up.{index}.weight"]
                found[f"{place}.{path}.weight"] += up @ state[f"{place}.adapters.{name}.down.weight"]
    apart.load_state_dict(found)
    return apart


def gradients(model, tokens=TOKENS):
    model.zero_grad()
    logits = model(tokens)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights.to(logits.dtype)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def same(found, wanted, atol=1e-10):
    found, wanted = found.detach(), wanted.detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol * max(1.0, float(wanted.abs().max())))


def test_values_are_those_of_blocks_of_their_own_and_gradients_their_sum():
    model = built()
    (found, own), (wanted, apart) = gradients(model), gradients(unshared(model))
    same(found, wanted)
    for name in (name for name in own if name.startswith("shared.block.")):
        same(own[name], sum(apart[f"{place}.{name.removeprefix('shared.block.')}"] for place in PLACES))
    for name in apart.keys() & own.keys():
        same(own[name], apart[name])


def test_gradients_of_adapters_are_those_of_the_product():
    model = built()
    (_, own), (_, apart), state = gradients(model), gradients(unshared(model)), model.state_dict()
    for place, adapters in ADAPTED.items():
        for name, adapter in zip(("both", "q"), adapters, strict=False):
            here, down = f"{place}.adapters.{name}", 0.0
            for index, path in enumerate(adapter["maps"]):
                whole = apart[f"{place}.{path}.weight"]
                same(own[f"{here}.up.{index}.weight"], whole @ state[f"{here}.down.weight"].T)
                down = down + state[f"{here}.up.{index}.weight"].T @ whole
            same(own[f"{here}.down.weight"], down)


def test_adapters_start_as_nothing():
    plain, adapted = ft.build(spec_of(*[use()] * 3)), ft.build(SPEC)
    assert torch.equal(plain(TOKENS), adapted(TOKENS))


def test_the_state_dict_holds_shared_weights_once(tmp_path):
    model = built(torch.float32)
    names = list(model.state_dict())
    assert names == [name for name, _ in model.named_parameters()]
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(names)
    assert not any("twin" in name for name in names)
    block = sum(p.numel() for name, p in model.named_parameters() if name.startswith("shared.block."))
    three = sum(p.numel() for p in unshared(model.double()).parameters())
    own = sum(p.numel() for name, p in model.named_parameters() if ".adapters." in name)
    assert sum(p.numel() for p in model.parameters()) == three - 2 * block + own
    ft.save(model, tmp_path / "saved")
    assert torch.equal(ft.load(tmp_path / "saved")(TOKENS), model(TOKENS))


def test_each_use_has_a_cache_of_its_own():
    cache = built().new_cache(2, 8)
    kept = [path for path in cache.states if "links.attention" in path]
    assert kept == [f"{place}.links.attention" for place in PLACES]
    assert cache.nbytes >= 2 * SPEC.cache_bytes(8, torch.float64)


@pytest.mark.parametrize(
    ("branches", "line"),
    [
        ([use("blok")], "layers.1.mixer.branches.block.of: no shared node is called 'blok', did you mean 'block'?"),
        (
            [use(), use(a=GATE_UP | {"maps": ["links.feed_forward.gat"]})],
            "layers.2.mixer.branches.block.adapters.a.maps: block has no linear map 'links.feed_forward.gat', "
            "did you mean 'links.feed_forward.gate'?",
        ),
        (
            [use(a=GATE_UP, b=GATE_UP)],
            "layers.1.mixer.branches.block.adapters.b.maps: 'links.feed_forward.gate' is adapted twice",
        ),
        ([use(a=Q | {"maps": Q["maps"] * 2})], "adapters.a.maps: 'links.attention.q' is adapted twice"),
        (
            [use(a=Q | {"maps": ["links.attention.q", "links.feed_forward.up"]})],
            "adapters.a.maps: expected maps of equal inputs, found the widths 32, 16",
        ),
        ([use(a=Q | {"maps": []})], "adapters.a.maps"),
        ([use(a=Q | {"maps": ["norms.attention"]})], "block has no linear map 'norms.attention'"),
        ([use(a=Q | {"rank": 0})], "adapters.a.rank: expected a number greater than or equal to 1, found 0"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_use_that_does_not_fit_is_one_line(branches, line):
    with pytest.raises(SpecError) as caught:
        spec_of(*branches)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shared", "line"),
    [
        (
            use("block"),
            "shared.block.of: no shared node is called 'block' (known: none); none can be used inside a shared node",
        ),
        (
            {"kind": "sum", "branches": {"a": MAMBA, "b": use("block")}},
            "shared.block.branches.b.of: no shared node is called 'block' (known: none); none can be used inside",
        ),
        (ATTENTION | {"encodings": []}, "layers.1.mixer: expected the width 16 of what it returns"),
        (BLOCK | {"norms": {"attentio": {}}}, "shared.block.norms.attentio: no link is called 'attentio', did you"),
        (BLOCK | {"links": {}}, "shared.block.links"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_shared_node_that_does_not_fit_is_one_line(shared, line):
    with pytest.raises(SpecError) as caught:
        ft.ModelSpec.parse(
            {
                "vocab_size": 23,
                "width": 16,
                "encodings": {"rope": {"kind": "rope"}},
                "shared": {"block": shared | ({"heads": 3} if shared["kind"] == "attention" else {})},
                "layers": [{"mixer": MAMBA}, {"mixer": use()}],
            }
        )
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_use_without_any_shared_node_is_one_line():
    with pytest.raises(
        SpecError, match=r"layers\.1\.mixer\.branches\.block\.of: no shared node is called 'block' \(known: n"
    ):
        spec_of(use(), shared=None)


def twins_are_the_shared(model):
    """Whether every use runs the very parameters that the model has at `shared`."""
    own = dict(model.get_submodule("shared.block").named_parameters())
    for place in PLACES:
        twin = model.get_submodule(place).twin
        found = {name.replace(".shared.", "."): p for name, p in twin.named_parameters()}
        assert all(found[name] is parameter for name, parameter in own.items())
        assert {p.device for p in found.values()} == {p.device for p in own.values()}


def meta():
    model = ft.build(SPEC, device="meta").to_empty(device="cpu")
    initialise(model, 0)
    return model


def assigned():
    model = ft.build(SPEC, device="meta")
    model.load_state_dict(ft.build(SPEC).state_dict(), assign=True)
    return model


WAYS = {
    "built": lambda: ft.build(SPEC),
    "to float64": lambda: ft.build(SPEC).double().float(),
    "to bfloat16": lambda: ft.build(SPEC).to(torch.bfloat16).float(),
    "meta, to_empty, initialise": meta,
    "meta, load_state_dict(assign=True)": assigned,
    "deepcopy": lambda: copy.deepcopy(ft.build(SPEC)),
    "deepcopy, to float64": lambda: copy.deepcopy(ft.build(SPEC)).double().float(),
    "load_state_dict": lambda: loaded(ft.build(SPEC, seed=1)),
}


def loaded(model):
    model.load_state_dict(ft.build(SPEC).state_dict())
    return model


@pytest.mark.parametrize("way", WAYS)
def test_uses_follow_their_shared_node_wherever_it_goes(way):
    model = WAYS[way]()
    twins_are_the_shared(model)
    atol = 0.1 if "bfloat16" in way else 0.0
    same(model(TOKENS), ft.build(SPEC)(TOKENS), atol)


def test_a_copy_is_a_model_of_its_own():
    model = built()
    before, other = model(TOKENS), copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter("shared.block.links.out.map.weight").zero_()
    assert torch.equal(model(TOKENS), before)
    assert not torch.allclose(other(TOKENS), before)


def test_training_and_evaluation_reach_the_uses():
    """Gates that make noise in training are in the shared node."""
    gate = {"kind": "hard_concrete"}
    noisy = {"kind": "gated", "branches": {"a": MAMBA, "b": {"kind": "mlp", "hidden": 8}}, "gate": gate}
    model = ft.build(spec_of(use(), use(), shared=noisy))
    for training in (True, False, True):
        model.train(training)
        assert torch.equal(model(TOKENS), model(TOKENS)) != training


GATED = {
    "kind": "gated",
    "branches": {name: {"kind": "mlp", "hidden": 8} for name in "abc"},
    "exchange": {"rank": 2},
    "gate": {"kind": "softmax", "granularity": "token"},
}
GATED_USED = {"vocab_size": 23, "width": 16, "shared": {"block": GATED}, "layers": [{"mixer": use()}] * 2}


@pytest.mark.parametrize("what", ["drop", "force"])
def test_a_shared_fusion_is_dropped_and_forced_in_every_use(what):
    """As the same fusion twice is, in both of its places."""
    model = randomised(ft.build(ft.ModelSpec.parse(GATED_USED), dtype=torch.float64), 0)
    state = model.state_dict()
    twice = ft.build(ft.ModelSpec.parse(GATED_USED | {"layers": [{"mixer": GATED}] * 2, "shared": {}}))
    places = ["layers.0.mixer", "layers.1.mixer"]
    names = {name: re.sub(r"^layers\.\d\.mixer\.", "shared.block.", name) for name in twice.state_dict()}
    twice.double().load_state_dict({name: state[shared] for name, shared in names.items()})
    before = model(TOKENS)
    if what == "drop":
        here, there = model.drop(["shared.block.branches.b"]), twice.drop([f"{place}.branches.b" for place in places])
    else:
        shares = {"a": 0.5, "b": 0.2}
        here, there = model.force({"shared.block": shares}), twice.force(dict.fromkeys(places, shares))
    with here, there:
        found = model(TOKENS)
        same(found, twice(TOKENS))
    assert not torch.allclose(found, before)
    same(model(TOKENS), before)


def test_recomputing_layers_changes_no_gradient():
    model = built()
    _, wanted = gradients(model)
    model.checkpointing = True
    _, found = gradients(model)
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_sharding_changes_nothing():
    _, wanted = gradients(built(torch.float32))
    with world():
        sharded = shard(built(torch.float32), init_device_mesh("cpu", (1,)), precision="float32")
        logits, found = gradients(sharded)
        assert torch.equal(logits, built(torch.float32)(TOKENS))
        for name, gradient in wanted.items():
            same(found[name].full_tensor(), gradient, 1e-5)
        torch.optim.SGD(sharded.parameters(), 0.1).step()
        trained = built(torch.float32)
        gradients(trained)
        torch.optim.SGD(trained.parameters(), 0.1).step()
        same(sharded(TOKENS), trained(TOKENS), 1e-5)


ALIKE = spec_of(layers=[hybrid(use(both=GATE_UP), {"kind": "mlp", "hidden": 8})] * 4)
"""Four equal layers."""


def compiled_is_eager(backend):
    torch._dynamo.reset()
    plain, compiled = (randomised(ft.build(ALIKE), 0) for _ in range(2))
    compiled.compile(backend=backend)
    (wanted, gradient), (found, others) = gradients(plain), gradients(compiled)
    same(found, wanted, 1e-5)
    for name in gradient:
        same(others[name], gradient[name], 1e-4)
    prompts = [TOKENS[0, :7].tolist(), TOKENS[1, :4].tolist()]
    assert compiled.generate(prompts, max_new_tokens=6) == plain.generate(prompts, max_new_tokens=6)


def test_compiled_uses_give_what_plain_ones_give():
    compiled_is_eager("aot_eager")


@pytest.mark.slow
def test_compiled_code_of_uses():
    compiled_is_eager("inductor")


def test_layers_that_use_one_node_are_compiled_once():
    """And once more for the first, whose stream is the embedding itself."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = ft.build(ALIKE)
    model.compile(backend=counting)
    model(TOKENS)
    assert len(graphs) == 2
