"""Parts around shared nodes: what goes with the last use of one, and what stays with any other."""

import pytest
import torch

import fusiontree as ft
from fusiontree.pruning import PruneError, apply, droppable, plan_by_hand, simplify, verify
from fusiontree.testing.subject import randomised
from fusiontree.zoo import family_of

torch.set_num_threads(1)
MAMBA = {"kind": "mamba2", "heads": 2, "head_dim": 8, "state": 4}
BLOCKS = {
    "rotated": {
        "kind": "chain",
        "embedding": True,
        "links": {
            "attention": {
                **{"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 8, "project": False},
                "encodings": ["rope"],
            },
            "out": {"kind": "linear", "outputs": 16},
        },
    },
    "plain": {"kind": "swiglu", "hidden": 12},
}
ADAPTERS = {
    "rotated": {"k": {"maps": ["links.attention.k"], "rank": 2}},
    "plain": {"gate_up": {"maps": ["gate", "up"], "rank": 3}},
}


def inject(*names):
    branches = {name: {"kind": "use", "of": name, "adapters": ADAPTERS[name]} for name in names}
    mixer = {"kind": "inject", "branches": branches, "projection": {}, "norm": {}, "into": MAMBA}
    return {"placement": "none", "mixer": mixer}


@pytest.fixture(scope="module")
def model():
    """`rotated` is used in layers 1 and 3, `plain` in 2 and 3, there beside the other."""
    spec = ft.ModelSpec.parse(
        {
            **{"vocab_size": 23, "width": 16, "encodings": {"rope": {"kind": "rope"}}, "shared": BLOCKS},
            "layers": [{"mixer": MAMBA}, inject("rotated"), inject("plain"), inject("rotated", "plain")],
        }
    )
    return randomised(ft.build(spec), 0)


def pruned(model, *drops):
    plan = plan_by_hand(model.spec, drops)
    found = apply(model, plan)
    verify(model, found, plan)
    return found


def shared(model):
    """The names of shared nodes, in the spec and in the weights."""
    weights = {name.split(".")[1] for name in model.state_dict() if name.startswith("shared.")}
    assert set(model.spec.shared) == weights
    return weights


def test_what_can_be_dropped(model):
    found = droppable(model.spec)
    assert [path for path in found if ".branches." in path] == [
        "layers.1.mixer.branches.rotated",
        "layers.2.mixer.branches.plain",
        "layers.3.mixer.branches.rotated",
        "layers.3.mixer.branches.plain",
    ]
    assert not any(path.startswith("shared.") for path in found)


def test_one_use_goes_and_its_node_stays_while_another_is_there(model):
    found = pruned(model, "layers.3.mixer.branches.plain")
    assert shared(found) == {"rotated", "plain"}
    gone = model.state_dict().keys() - found.state_dict().keys()
    assert gone == {n for n in model.state_dict() if n.startswith("layers.3.mixer.branches.plain.adapters.")}
    assert len(gone) == 3


def test_the_last_branch_of_an_inject_is_refused(model):
    with pytest.raises(PruneError, match=r"layers\.1\.mixer\.branches\.rotated: 'rotated' is the last branch"):
        plan_by_hand(model.spec, ["layers.1.mixer.branches.rotated"])
    with pytest.raises(PruneError, match="is the last branch"):
        plan_by_hand(model.spec, [f"layers.3.mixer.branches.{name}" for name in BLOCKS])


@pytest.mark.parametrize("path", ["layers.1", "layers.1.mixer"])
def test_a_layer_goes_and_the_node_stays_for_the_other(model, path):
    found = pruned(model, path)
    assert shared(found) == {"rotated", "plain"}
    assert not any(name.startswith("layers.1.") for name in found.state_dict())


def test_the_last_use_takes_the_node_and_its_encoding_along(model):
    found = pruned(model, "layers.1", "layers.3.mixer.branches.rotated")
    assert shared(found) == {"plain"}
    assert not found.spec.encodings
    again = pruned(found, "layers.2", "layers.3")
    assert shared(again) == set()
    assert {name.split(".")[0] for name in again.state_dict()} == {"embedding", "layers", "norm"}


def test_what_is_left_is_renumbered_and_computes_the_same(model):
    found = pruned(model, "layers.0", "layers.2")
    simple, moved = simplify(found)
    assert moved == {"layers.1": "layers.0", "layers.3": "layers.1"}
    assert shared(simple) == {"rotated", "plain"}
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(simple(tokens), found(tokens))


def test_a_shared_node_itself_is_no_part_that_can_be_dropped(model):
    for path in ("shared.plain", "shared.rotated.links.attention", "layers.1.mixer.into"):
        with pytest.raises(PruneError, match=rf"{path}: nothing there can be dropped"):
            plan_by_hand(model.spec, [path])


def test_zamba2_without_a_layer():
    config = {
        **{"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
        **{"layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid"], "num_mem_blocks": 2, "adapter_rank": 2},
        **{"n_mamba_heads": 4, "mamba_d_state": 4, "intermediate_size": 12, "use_mem_rope": True},
    }
    zamba = randomised(ft.build(family_of("zamba2").spec_of(config)), 0)
    assert shared(pruned(zamba, "layers.1")) == {"block0", "block1"}
    assert shared(pruned(zamba, "layers.2")) == {"block0"}
    assert shared(pruned(zamba, "layers.1", "layers.3")) == {"block1"}
    alone = pruned(zamba, "layers.1", "layers.2", "layers.3")
    assert not alone.spec.encodings
