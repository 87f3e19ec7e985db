"""Latent attention beside transformers' module of DeepSeek-V3, which rotates."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

import fusiontree as ft
from fusiontree.core.contracts.node import Scope
from fusiontree.core.model.initialise import initialise
from fusiontree.encodings.rope import Rope, RopeModule
from fusiontree.testing import check_spec
from fusiontree.testing.subject import randomised
from fusiontree.zoo.tensors import interleaved

torch.set_num_threads(1)
WIDTH, HEADS, OWN, SHARED, VALUE, RANK, TIME = 16, 3, 4, 6, 5, 7, 19
SPEC = {"heads": HEADS, "head_dim": OWN, "shared_dim": SHARED, "value_dim": VALUE, "rank": RANK}
SPEC |= {"norm": {"kind": "rms", "eps": 1e-6}, "encodings": ["rope"]}


def built(**options):
    rope = Rope(theta=100.0)
    branch = ft.branches.Mla.model_validate(SPEC | options).build(Scope(WIDTH, {"rope": rope}))
    initialise(branch, 0)
    return randomised(branch, 1).double(), RopeModule(rope, [SHARED])


def in_pairs(weight, heads):
    """Rows of channels i and i + half, which turn together, as neighbours: DeepSeek's own order."""
    return weight.unflatten(0, (heads, 2, SHARED // 2)).transpose(1, 2).flatten(0, 2)


def weights_of(branch, *, pairs):
    """Theirs, from ours."""
    own, order = dict(branch.state_dict()), in_pairs if pairs else lambda weight, heads: weight
    asked = "q_b_proj" if branch.q_latent else "q_proj"
    rows = [own["q.weight"], order(own["q_shared.weight"], HEADS)]
    found = {f"{asked}.weight": interleaved(HEADS, OWN, SHARED).write(torch.cat(rows))}
    if branch.q_latent:
        found |= {"q_a_proj.weight": own["q_latent.weight"], "q_a_layernorm.weight": own["q_latent_norm.weight"]}
    kv = interleaved(HEADS, OWN, VALUE).write(torch.cat([own["k.weight"], own["v.weight"]]))
    compressed = torch.cat([own["latent.weight"], order(own["shared.weight"], 1)])
    found |= {"kv_a_proj_with_mqa.weight": compressed, "kv_b_proj.weight": kv}
    return found | {"kv_a_layernorm.weight": own["latent_norm.weight"], "o_proj.weight": own["out.weight"]}


@torch.no_grad()
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("query_rank", [None, 8])
def test_is_deepseek_s(query_rank, pairs):
    branch, rotary = built(query_rank=query_rank)
    config = transformers.DeepseekV3Config(
        **{"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": query_rank},
        **{"kv_lora_rank": RANK, "qk_nope_head_dim": OWN, "qk_rope_head_dim": SHARED, "v_head_dim": VALUE},
        **{"rope_interleave": pairs, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        attn_implementation="eager",
    )
    module = theirs.DeepseekV3Attention(config, 0).double()
    module.load_state_dict(weights_of(branch, pairs=pairs))
    x = torch.randn(2, TIME, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(TIME).expand(2, -1)
    angles = positions[..., None] * 100.0 ** (-2 * torch.arange(SHARED // 2).double() / SHARED)
    angles = torch.cat([angles, angles], -1)
    mask = torch.full((TIME, TIME), -torch.inf).double().triu(1)[None, None]
    wanted, _ = module(x, (angles.cos(), angles.sin()), mask)
    found = branch(x, ft.Context(positions, tables={"rope": rotary(positions)}))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # their norms compute in float32


class Louder(nn.Module):
    """A map as a tool wraps it."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return 1.1 * self.inside(x)


@torch.no_grad()
def test_what_is_done_to_torch_s_maps_is_done_in_a_step_too():
    """Decoding uses weights of its own maps by themselves; tools that wrap those of torch do not find them."""
    mixer = {"kind": "mla", **SPEC, "query_rank": 8}
    data = {"vocab_size": 11, "width": WIDTH, "encodings": {"rope": {"kind": "rope"}}, "layers": [{"mixer": mixer}]}
    model = ft.build(ft.ModelSpec.parse(data), dtype=torch.float64)
    tokens = torch.arange(20).reshape(2, 10) % 11
    before, branch = model(tokens), model.get_submodule("layers.0.mixer")
    for name, module in list(branch.named_children()):
        if isinstance(module, nn.Linear):
            setattr(branch, name, Louder(module))
    whole, cache = model(tokens), model.new_cache(2, 10)
    torch.testing.assert_close(torch.cat([model(one, cache=cache) for one in tokens.split(1, 1)], 1), whole)
    assert (whole - before).abs().max() > 1e-3


@pytest.mark.parametrize("window", [None, 4])
def test_the_laws_hold_behind_a_prefix(window):
    mixer = {"kind": "mla", **SPEC, "window": window}
    data = {"vocab_size": 11, "width": WIDTH, "encodings": {"rope": {"kind": "rope"}}, "layers": [{"mixer": mixer}] * 2}
    check_spec(ft.ModelSpec.parse(data | {"prefix": {"tokens": 3}}))
