"""The suite can fail: each planted defect is caught, by the law that it breaks."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from fusiontree.branches import (
    Attention,
    GatedDelta,
    Lightning,
    Mamba1,
    Mamba2,
    Mla,
    Mlp,
    RgLru,
    Use,
    attention,
    gated_delta,
    kv_cache,
    lightning,
    mamba1,
    mamba2,
    mla,
    recurrent,
    rglru,
)
from fusiontree.branches.use import UseModule
from fusiontree.core.contracts.modules import Module
from fusiontree.core.model import initialise as initialising
from fusiontree.encodings import Alibi
from fusiontree.encodings.rope import RopeModule
from fusiontree.encodings.srte import SrteSincos, SrteSincosModule
from fusiontree.fusions import Gated
from fusiontree.fusions.base import BaseFusion
from fusiontree.gates import Sigmoid, Softmax
from fusiontree.gates.sigmoid import SigmoidModule
from fusiontree.gates.softmax import SoftmaxModule
from fusiontree.kernels.attention import Filled
from fusiontree.testing import LawBroken, check

torch.set_num_threads(1)


def broken_laws(component):
    """The first law that a component breaks."""
    with pytest.raises(LawBroken) as caught:
        check(component)
    assert "in this model:" in str(caught.value)
    return caught.value.law.name


def replacing(kernel, **fixed):
    """A kernel with some arguments overruled."""
    return lambda *args, **kwargs: kernel(*args, **{**kwargs, **fixed})


def test_window_off_by_one(monkeypatch):
    def wider(*args, window, **kwargs):
        return attention_kernel(*args, window=window and window + 1, **kwargs)

    attention_kernel = attention.attention
    monkeypatch.setattr(attention, "attention", wider)
    assert broken_laws(Attention) == "split"


def test_convolution_leaks_over_documents(monkeypatch):
    monkeypatch.setattr(recurrent, "causal_conv1d", replacing(recurrent.causal_conv1d, segments=None))
    assert broken_laws(Mamba2) == "packed"


def test_state_is_not_reset(monkeypatch):
    monkeypatch.setattr(mamba2, "ssd", replacing(mamba2.ssd, segments=None))
    assert broken_laws(Mamba2) == "packed"


def test_state_is_forgotten(monkeypatch):
    monkeypatch.setattr(mamba2, "ssd", replacing(mamba2.ssd, initial_state=None))
    assert broken_laws(Mamba2) == "split"


def test_channel_states_are_not_reset(monkeypatch):
    monkeypatch.setattr(mamba1, "selective_scan", replacing(mamba1.selective_scan, segments=None))
    assert broken_laws(Mamba1) == "packed"


def test_channel_states_are_forgotten(monkeypatch):
    monkeypatch.setattr(mamba1, "selective_scan", replacing(mamba1.selective_scan, initial_state=None))
    assert broken_laws(Mamba1) == "split"


def test_what_a_delta_rule_knows_is_not_reset(monkeypatch):
    monkeypatch.setattr(gated_delta, "gated_delta", replacing(gated_delta.gated_delta, segments=None))
    assert broken_laws(GatedDelta) == "packed"


def test_what_a_delta_rule_knows_is_forgotten(monkeypatch):
    monkeypatch.setattr(gated_delta, "gated_delta", replacing(gated_delta.gated_delta, initial_state=None))
    assert broken_laws(GatedDelta) == "split"


def test_what_a_channel_remembers_is_not_reset(monkeypatch):
    monkeypatch.setattr(rglru, "linear_recurrence", replacing(rglru.linear_recurrence, segments=None))
    assert broken_laws(RgLru) == "packed"


def test_what_a_channel_remembers_is_forgotten(monkeypatch):
    monkeypatch.setattr(rglru, "linear_recurrence", replacing(rglru.linear_recurrence, initial_state=None))
    assert broken_laws(RgLru) == "split"


def test_heads_of_constant_decay_are_not_reset(monkeypatch):
    monkeypatch.setattr(lightning, "ssd", replacing(lightning.ssd, segments=None))
    assert broken_laws(Lightning) == "packed"


def test_attention_sees_other_documents(monkeypatch):
    monkeypatch.setattr(attention, "attention", replacing(attention.attention, segments=None))
    assert broken_laws(Attention) == "packed"


def test_latents_of_other_documents_are_seen(monkeypatch):
    monkeypatch.setattr(mla, "attention", replacing(mla.attention, segments=None))
    assert broken_laws(Mla) == "packed"


def test_latents_are_forgotten(monkeypatch):
    monkeypatch.setattr(mla, "attention", replacing(mla.attention, past=None))
    assert broken_laws(Mla) == "split"


def test_a_step_over_latents_has_another_scale(monkeypatch):
    monkeypatch.setattr(mla, "attention_step", replacing(mla.attention_step, scale=0.5))
    assert broken_laws(Mla) == "split"


def test_ring_is_written_one_slot_late(monkeypatch):
    ages = kv_cache.ages
    monkeypatch.setattr(kv_cache, "ages", lambda context, ring: (ages(context, ring) - 1).clamp(min=0))
    assert broken_laws(Attention) == "split"


def test_a_step_does_not_see_its_own_token(monkeypatch):
    fewer = SimpleNamespace(of=lambda count, slots, dtype: Filled.of((count - 1).clamp(min=1), slots, dtype))
    monkeypatch.setattr(kv_cache, "Filled", fewer)
    assert broken_laws(Attention) == "split"


def test_distances_stand_still_in_decode(monkeypatch):
    distances = kv_cache.distances
    monkeypatch.setattr(kv_cache, "distances", lambda context, slots: distances(context, slots).clamp(max=2))
    assert broken_laws(Alibi) == "split"


def test_positions_stand_still_in_decode(monkeypatch):
    forward = RopeModule.forward
    monkeypatch.setattr(RopeModule, "forward", lambda self, p: forward(self, p - p[:, :1]))
    assert broken_laws(Attention) == "split"


def test_positions_do_not_restart(monkeypatch):
    forward = SrteSincosModule.forward
    steps = torch.arange(1000)
    monkeypatch.setattr(
        SrteSincosModule, "forward", lambda self, p: forward(self, steps[None, : p.shape[1]].expand_as(p))
    )
    assert broken_laws(SrteSincos) == "split"


@pytest.mark.parametrize("gate", [Sigmoid, Softmax])
def test_gate_ignores_granularity(monkeypatch, gate):
    module = {Sigmoid: SigmoidModule, Softmax: SoftmaxModule}[gate]
    forward = module.forward

    def flat(self, features, context):
        return {name: g.mean(-1, keepdim=True).expand_as(g) for name, g in forward(self, features, context).items()}

    monkeypatch.setattr(module, "forward", flat)
    assert broken_laws(gate) in ("gates", "symmetric")


def test_gate_looks_ahead(monkeypatch):
    forward = SigmoidModule.forward

    def whole(self, features, context):
        return forward(self, features.mean(1, keepdim=True).expand_as(features), context)

    monkeypatch.setattr(SigmoidModule, "forward", whole)
    assert broken_laws(Sigmoid) == "causal"


def test_gate_values_do_not_sum_to_one(monkeypatch):
    forward = SigmoidModule.forward
    monkeypatch.setattr(
        SigmoidModule, "forward", lambda self, f, c: {n: 1.1 * g for n, g in forward(self, f, c).items()}
    )
    assert broken_laws(Sigmoid) == "gates"


def test_axis_table_lies(monkeypatch):
    axes = Mamba2.axes
    swap = "group_heads*groups"
    monkeypatch.setattr(Mamba2, "axes", lambda self: {**axes(self), "dt.weight": (swap, "width")})
    assert broken_laws(Mamba2) == "symmetric"


def test_axis_table_forgets_a_parameter(monkeypatch):
    axes = Attention.axes
    monkeypatch.setattr(
        Attention, "axes", lambda self: {n: d for n, d in axes(self).items() if n != "v.global_heads.weight"}
    )
    assert broken_laws(Attention) == "counted"


def test_biases_shrink(monkeypatch):
    declare = Module.declare
    monkeypatch.setattr(
        rglru.HeadGate, "declare", lambda self, *args, **options: declare(self, *args, **options | {"decay": True})
    )
    assert broken_laws(RgLru) == "shrinking"


def test_a_linear_map_does_not_shrink(monkeypatch):
    declare = Module.declare
    monkeypatch.setattr(Module, "declare", lambda self, *args, **options: declare(self, *args))
    assert broken_laws(Mlp) == "shrinking"


def test_cache_formula_lies(monkeypatch):
    cache_bytes = Attention.cache_bytes
    monkeypatch.setattr(Attention, "cache_bytes", lambda self, *args: cache_bytes(self, *args) + 4)
    assert broken_laws(Attention) == "cache_size"


def test_flops_formula_lies(monkeypatch):
    monkeypatch.setattr(attention, "mean_visible", lambda window, length: length / 2)
    assert broken_laws(Attention) == "flops"


def test_start_depends_on_the_global_generator(monkeypatch):
    fill = initialising._fill
    monkeypatch.setattr(initialising, "_fill", lambda p, value: fill(p, value + torch.rand(()) * 0.01))
    assert broken_laws(Mlp) == "seeded"


def test_start_cannot_be_pickled(monkeypatch):
    monkeypatch.setattr(mamba2, "constant", lambda value: lambda tensor, generator: tensor.fill_(value))
    assert broken_laws(Mamba2) == "pickled"


def test_a_copy_of_a_shared_node_keeps_the_old_parameters(monkeypatch):
    monkeypatch.setattr(UseModule, "__deepcopy__", with_a_twin_of_its_own, raising=False)
    assert broken_laws(Use) == "pickled"


def with_a_twin_of_its_own(node, memo):
    copied = object.__new__(UseModule)
    memo[id(node)] = copied
    for name, value in node.__dict__.items():
        copied.__dict__[name] = deepcopy(value, {} if name == "twin" else memo)
    return copied


def test_batch_neighbours_meet(monkeypatch):
    forward = BaseFusion.forward
    monkeypatch.setattr(BaseFusion, "forward", lambda self, x, c: forward(self, x - 0.1 * x.mean(0, keepdim=True), c))
    assert broken_laws(Gated) in ("alone", "packed")


def test_message_wakes_a_closed_branch(monkeypatch):
    monkeypatch.setattr(BaseFusion, "_silent", lambda self, features: features)
    assert broken_laws(Gated) == "pruned"


def test_closed_branch_keeps_its_share(monkeypatch):
    monkeypatch.setattr(
        SigmoidModule, "dropped", property(lambda self: frozenset(), lambda self, value: None), raising=False
    )
    assert broken_laws(Sigmoid) == "pruned"
