"""Every kind narrows along the axes that are listed here, random narrowings of random specs are exact, and what cannot
be narrowed exactly is refused with the reason (that a narrowing is exact is the law `narrowed`)."""

import random

import pytest
import torch
from random_specs import for_random_specs, parts

from fusiontree import ModelSpec, build
from fusiontree.branches import Attention, GatedDelta, Lightning, Mamba1, Mamba2, Mla, Moe
from fusiontree.core.contracts.modules import Norm, NormModule
from fusiontree.core.contracts.registries import REGISTRIES
from fusiontree.core.model.narrow import narrow_spec, narrow_weights
from fusiontree.errors import SpecError
from fusiontree.fusions import Concat, Gated, Mean
from fusiontree.pruning import narrow
from fusiontree.testing import LawBroken, check, check_spec
from fusiontree.testing.check import models
from fusiontree.testing.laws import LAWS
from fusiontree.testing.narrowing import axes_of, problem_of
from fusiontree.testing.subject import Subject

torch.set_num_threads(1)
NARROWED = tuple(law for law in LAWS if law.name == "narrowed")
TRIED = 9
DONE = []
NARROW = {
    "attention": {"windowed_kv_heads", "windowed_queries", "global_queries", "head_dim", "value_dim"},
    "chain": {"out_width"},
    "gated_delta": {"key_heads", "group_heads", "head_dim", "value_dim", "gate_rank", "decay_rank"},
    "lightning": {"heads", "head_dim", "value_dim"},
    "mamba1": {"inner", "rank", "state"},
    "mamba2": {"groups", "group_heads", "head_dim", "state"},
    "mla": {"heads", "head_dim", "shared_dim", "value_dim", "rank", "query_rank"},
    "mlp": {"hidden"},
    "moe": {"groups", "hidden", "shared_hidden"},
    "rglru": {"heads", "head_dim"},
    "short_conv": {"inner"},
    "swiglu": {"hidden"},
    "use": {"hidden_rank"},
    "gated": {"exchange_rank", "align_hidden", "gate_rank"},
    "hard_concrete": {"gate_rank"},
    "sigmoid": {"gate_rank"},
    "softmax": {"gate_rank"},
    "srte_learned": {"rank"},
}
"""The axes along which a kind's example narrows; kinds that are not here have none of their own."""


def model(mixer, **top):
    return ModelSpec.model_validate({"vocab_size": 11, "width": 16, "layers": [{"mixer": mixer}], **top})


def inner(fusion, **fields):
    """A fusion of two branches with 24 inner features each, of 4 heads and of 2 groups of 2 heads."""
    attention = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 4, "value_dim": 6, "project": False}
    mamba = {"kind": "mamba2", "heads": 4, "head_dim": 6, "state": 3, "groups": 2, "project": False}
    return model(fusion.model_validate({"branches": {"a": attention, "m": mamba}, "projection": {}, **fields}))


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f, registry in REGISTRIES.items() for k in registry.names()])
def test_every_kind_narrows_along_its_axes(family, kind):
    home = "encodings.time" if family == "encoding" else "layers.0.mixer"
    spec = next(models(REGISTRIES[family].get(kind)))
    found = {axis for path, axis, size in axes_of(spec) if path == home and narrows(spec, path, axis, size)}
    assert found == NARROW.get(kind, set())


def narrows(spec, path, axis, size):
    """Whether an axis narrows to any of its first parts."""
    for left in range(1, size):
        try:
            narrow_spec(spec, path, axis, range(left))
        except SpecError:
            continue
        return True
    return False


@pytest.mark.parametrize("part", parts())
def test_random_narrowings_are_exact(part):
    DONE.clear()
    for_random_specs(part, narrowings_are_exact)
    assert len(DONE) >= 75  # 300 of the four parts that are always run


def narrowings_are_exact(spec):
    """Some narrowings of a spec, each of what the one before has left."""
    choose = random.Random(spec.digest())
    for _ in range(TRIED):
        found = random_narrowing(spec, choose)
        if found is None:
            return
        (path, axis, keep), narrower = found
        problem = problem_of(Subject(spec), path, axis, keep)
        assert not problem, f"{path}, {axis} to {keep}: {problem}\n{spec.to_yaml()}"
        spec = narrower
        DONE.append(path)


def random_narrowing(spec, choose):
    """One that is not refused, and its spec; None where all are."""
    every = list(axes_of(spec))
    for path, axis, size in choose.sample(every, len(every)):
        keep = sorted(choose.sample(range(size), choose.randrange(1, size)))
        try:
            return (path, axis, keep), narrow_spec(spec, path, axis, keep)
        except SpecError:
            continue
    return None


@pytest.mark.parametrize(
    ("gate", "keep", "left"),
    [
        ({"granularity": "head", "heads": 4}, [0, 2], 12),
        ({"granularity": "head", "heads": 2, "static": True}, [1], 12),
        ({"granularity": "channel", "rank": 2}, [0, 1, 2, 6, 7, 8], 6),
    ],
)
def test_a_gates_groups_leave_with_the_channels_that_they_weigh(gate, keep, left):
    exchange = {"rank": 2} if "rank" in gate else None
    spec = inner(Gated, gate={"kind": "sigmoid", **gate}, branch_norm={}, exchange=exchange)
    assert problem_of(Subject(spec), "layers.0.mixer", "gate_units", keep) is None
    fusion = narrow_spec(spec, "layers.0.mixer", "gate_units", keep).node("layers.0.mixer")
    assert [branch.inner for branch in fusion.branches.values()] == [left, left]
    assert (fusion.gate.units(left), fusion.branch_norm.count) == (len(keep), 24)


def test_groups_that_are_no_whole_parts_of_a_branch_are_refused():
    spec = inner(Gated, gate={"kind": "sigmoid", "granularity": "head", "heads": 4})
    text = r"layers\.0\.mixer: these channels are no whole parts of windowed_kv_heads x windowed_queries x value_dim"
    with pytest.raises(SpecError, match=text):
        narrow_spec(spec, "layers.0.mixer", "gate_units", [0, 2, 3])


def test_parts_of_a_fusion_are_told_from_branches_with_names_like_theirs():
    names = ("exchange_a", "align_a", "gate_a")
    branch = {"kind": "mlp", "hidden": 8}
    fusion = Concat.model_validate(
        {"branches": dict.fromkeys(names, branch), "projection": {}, "exchange": {"rank": 2}, "align": {"hidden": 4}}
        | {"mlp": branch}
    )
    for name in names:
        with pytest.raises(SpecError, match=r"layers\.0\.mixer: the features that it returns cannot be narrowed"):
            narrow_spec(model(fusion), "layers.0.mixer", f"{name}.width", range(8))
    with pytest.raises(SpecError, match=r"fused_width: cannot be narrowed here.*; narrow BRANCH\.width"):
        narrow_spec(model(fusion), "layers.0.mixer", "fused_width", range(8))
    assert problem_of(Subject(model(fusion)), "layers.0.mixer", "exchange_rank", [1]) is None


def test_heads_of_one_kind_do_not_all_leave_with_the_features_of_a_fusion():
    """The maps of the others would have other names."""
    attention = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 4, "project": False}
    attention |= {"window": 3, "global_heads": 2, "global_kv_heads": 1}
    spec = model(Mean.model_validate({"branches": {"a": attention}, "projection": {}}))
    with pytest.raises(SpecError, match=r"layers\.0\.mixer: global_kv_heads: none would be left"):
        narrow_spec(spec, "layers.0.mixer", "fused_width", range(8))
    assert problem_of(Subject(spec), "layers.0.mixer", "fused_width", [0, 2, 4, 6, 8, 10, 12, 14]) is None


def test_inner_features_of_equal_branches_leave_together():
    spec = inner(Mean)
    with pytest.raises(SpecError, match=r"a\.width: cannot be narrowed here.*; narrow fused_width"):
        narrow_spec(spec, "layers.0.mixer", "a.width", range(12))
    with pytest.raises(SpecError, match=r"branches\.a: value_dim: the branch returns features along it"):
        narrow_spec(spec, "layers.0.mixer.branches.a", "value_dim", [0])
    assert problem_of(Subject(spec), "layers.0.mixer", "fused_width", range(12)) is None


def test_branches_side_by_side_leave_alone():
    spec = inner(Concat)
    keep = [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]
    assert problem_of(Subject(spec), "layers.0.mixer", "m.width", keep) is None
    narrower = narrow_spec(spec, "layers.0.mixer", "m.width", range(12))
    assert {name: b.inner for name, b in narrower.node("layers.0.mixer").branches.items()} == {"a": 24, "m": 12}


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("correction", [True, False])
def test_experts_that_are_never_chosen_leave(scores, renormalise, correction):
    router = {"scores": scores, "renormalise": renormalise, "correction": correction}
    spec = model(Moe.model_validate({"experts": 5, "top_k": 2, "hidden": 4, "router": router}))
    assert problem_of(Subject(spec), "layers.0.mixer", "group_experts", [0, 2, 3]) is None
    assert narrow_spec(spec, "layers.0.mixer", "group_experts", [0, 2, 3]).node("layers.0.mixer").experts == 3


REFUSED = [
    (next(Attention.examples(16)), "window", [0], "window: no such axis"),
    (
        next(Attention.examples(16)),
        "head_dim",
        [0, 0],
        "head_dim: expected rising indices in 0..3, one at least, found [0, 0]",
    ),
    (next(Attention.examples(16)), "head_dim", [4], "found [4]"),
    (next(Attention.examples(16)), "head_dim", [], "found []"),
    (next(Attention.examples(16)), "head_dim", [0.0, 1.0], "found [0.0, 1.0]"),
    (next(Attention.examples(16)), "head_dim", [True, False, True, True], "found [True, False, True, True]"),
    (next(Attention.examples(16)), "head_dim", torch.tensor([True, False, True, True]), "found tensor([ True, False,"),
    (next(Attention.examples(16)), "head_dim", torch.arange(4).reshape(2, 2), "found tensor([[0, 1],"),
    (next(Attention.examples(16)), "head_dim", "01", "found '01'"),
    (next(Attention.examples(16)), "head_dim", 2, "found 2"),
    (next(Attention.examples(16)), "head_dim", None, "found None"),
    (next(Attention.examples(16)), "head_dim", slice(2), "found slice(None, 2, None)"),
    (next(Attention.examples(16)), "head_dim", (i for i in (0, 1)), "found <generator object"),
    (next(Attention.examples(16)), "width", [0], "width: cannot be narrowed here, other nodes' parameters run over it"),
    (next(Mamba2.examples(16)), "conv", [0], "conv: cannot be narrowed here, the order of its parts matters"),
    (Mamba2(heads=4, head_dim=6, state=2, norm={"kind": "layer"}), "head_dim", [0], "a layer norm over it would move"),
    (Mamba2(heads=3, head_dim=2, state=2, norm={"groups": 2}), "group_heads", [0, 1], "2 groups would not stay equal"),
    (next(Moe.examples(16)), "groups", [0], "router.top_groups: found 2, groups is 1"),
    (next(Moe.examples(16)), "group_experts", [0], "of which two have to stay"),
]


@pytest.mark.parametrize(("branch", "axis", "keep", "text"), REFUSED)
def test_refusals_say_where_and_why(branch, axis, keep, text):
    with pytest.raises(SpecError, match=r"layers\.0\.mixer: ") as caught:
        narrow_spec(model(branch), "layers.0.mixer", axis, keep)
    assert text in str(caught.value)


def test_encodings_that_tell_parts_apart_refuse():
    for kind, axis in (("alibi", "windowed_kv_heads"), ("rope", "head_dim")):
        branch = Attention(heads=4, kv_heads=2, head_dim=4, window=3, encodings=("time",))
        with pytest.raises(SpecError, match=f"{axis}: cannot be narrowed exactly, the encoding 'time' depends on it"):
            narrow_spec(model(branch, encodings={"time": {"kind": kind}}), "layers.0.mixer", axis, [0])


def test_shared_maps_with_adapters_refuse_by_the_path_of_the_use():
    use = {"kind": "use", "of": "block", "adapters": {"low": {"maps": ["up"], "rank": 2}}}
    spec = model(use, shared={"block": {"kind": "swiglu", "hidden": 8}})
    with pytest.raises(SpecError, match=r"^shared\.block: cannot be narrowed, layers\.0\.mixer adds maps of its own"):
        narrow_spec(spec, "shared.block", "hidden", [0])
    plain = model({"kind": "use", "of": "block"}, shared={"block": {"kind": "swiglu", "hidden": 8}})
    assert problem_of(Subject(plain), "shared.block", "hidden", [0, 5]) is None


def test_keys_that_a_later_layer_reads_refuse_by_its_path():
    reader = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 4, "keys_from": "layers.0.mixer"}
    layers = [{"mixer": reader | {"keys_from": None}}, {"mixer": reader}]
    spec = ModelSpec.model_validate({"vocab_size": 11, "width": 16, "layers": layers})
    with pytest.raises(SpecError, match=r"layers\.1\.mixer: kv_heads: expected 1, as layers\.0\.mixer has, found 2"):
        narrow_spec(spec, "layers.0.mixer", "windowed_kv_heads", [0])
    assert problem_of(Subject(spec), "layers.1.mixer", "windowed_queries", [1]) is None


def test_a_path_that_is_none_names_the_nearest():
    with pytest.raises(SpecError, match=r"mixr: nothing there can be narrowed, did you mean 'layers.0.mixer'"):
        narrow_spec(model(next(Mla.examples(16))), "layers.0.mixr", "rank", [0])


def test_narrowing_is_pure_and_remembered():
    spec = model(next(Mamba1.examples(16)), prefix={"tokens": 1})
    weights = build(spec).state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    narrower = narrow_spec(spec, "layers.0.mixer", "inner", [1, 4, 5])
    assert narrower.lineage[-1].edit == "narrow layers.0.mixer, inner, to 3 of 24"
    assert narrower.lineage[-1].parent == spec.digest()
    narrow_weights(spec, weights, "layers.0.mixer", "inner", [1, 4, 5])
    assert all(torch.equal(before[name], tensor) for name, tensor in weights.items())


def test_a_narrowed_model_is_in_the_mode_of_the_whole_and_trains_what_it_trains():
    whole = build(model(next(Mamba1.examples(16)))).eval()
    whole.layers.requires_grad_(False)
    for around in (torch.no_grad(), torch.enable_grad()):
        with around:
            narrower = narrow(whole, "layers.0.mixer", "inner", [0, 3])
        assert not any(module.training for module in narrower.modules())
        trained = {name for name, p in narrower.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in whole.named_parameters() if p.requires_grad} != set()
        assert all(p.is_leaf for p in narrower.parameters())


def test_where_every_part_stays_nothing_changes():
    spec = model(next(Mamba1.examples(16)))
    assert narrow_spec(spec, "layers.0.mixer", "rank", torch.arange(spec.node("layers.0.mixer").rank)) is spec


def test_repeats_stay_where_every_layer_narrows_alike():
    layers = [{"repeat": 2, "layers": [{"ffn": {"kind": "mlp", "hidden": 8}}]}]
    spec = ModelSpec.model_validate({"vocab_size": 11, "width": 16, "layers": layers})
    one = narrow_spec(spec, "layers.0.ffn", "hidden", [0, 1])
    assert [layer.ffn.hidden for layer in one.expanded_layers()] == [2, 8]
    both = narrow_spec(one, "layers.1.ffn", "hidden", [6, 7])
    assert len(both.fold().layers) == 1


def test_a_count_is_that_of_zeros_beside_the_features():
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    padded = torch.cat([x, torch.zeros(2, 3, 4, dtype=torch.float64)], -1)
    for gain in ("none", "weight", "one_plus"):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                counted, whole = (NormModule(Norm(gain=gain, count=c), w).double() for c, w in ((10, 6), (None, 10)))
                for module in (counted, whole):
                    if module.weight is not None:
                        torch.nn.init.constant_(module.weight, 0.7)
                torch.testing.assert_close(counted(x), whole(padded)[..., :6], rtol=1e-12, atol=1e-12)


def broken(component):
    with pytest.raises(LawBroken) as caught:
        check(component, laws=NARROWED)
    return str(caught.value)


def test_a_norm_that_forgets_what_left_is_found(monkeypatch):
    monkeypatch.setattr(Norm, "narrowed", lambda self, width, places: self)
    for component, axis in {GatedDelta: "value_dim", Lightning: "heads", Mamba1: "state", Mla: "rank"}.items():
        assert f"layers.0.mixer, {axis} " in broken(component)


def test_a_scale_that_follows_the_channels_is_found(monkeypatch):
    monkeypatch.setattr(Attention, "score_scale", property(lambda self: self.head_dim**-0.5))
    assert "head_dim 4 to 2" in broken(Attention)


def test_an_axis_to_narrow_that_is_no_field_is_found(monkeypatch):
    monkeypatch.setattr(Mamba1, "plain", frozenset({"inner", "innner"}))
    assert "layers.0.mixer: `plain` names innner, which is no field" in broken(Mamba1)


def test_slopes_of_other_heads_are_found(monkeypatch):
    right = Lightning.narrowed_fields

    def wrong(self, axis, keep, scope):
        return {**right(self, axis, keep, scope), "slopes": self.slopes[: len(keep) if axis == "heads" else None]}

    monkeypatch.setattr(Lightning, "narrowed_fields", wrong)
    assert "heads 3 to 1" in broken(Lightning)


def test_a_narrowed_model_keeps_every_law():
    check_spec(narrow_spec(model(next(Mamba2.examples(16))), "layers.0.mixer", "head_dim", [0, 2, 5]))
