"""Falcon-H1 equals transformers' own model, at the same weights."""

import pytest
import torch
import transformers

import fusiontree as ft
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import falcon_h1

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_d_ssm": 96,
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "embedding_multiplier": 5.5,
    "lm_head_multiplier": 0.4,
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.6,
    "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.3],
    "mlp_multipliers": [0.9, 0.4],
}
VARIANTS = {
    "plain": {},
    "norm first": {"mamba_rms_norm": True},
    "gate first": {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "projectors_bias": True},
    "tied": {"tie_word_embeddings": True, "mamba_conv_bias": False},
}


def both(**changes):
    torch.manual_seed(0)
    config = transformers.FalconH1Config(**SMALL | changes)
    theirs = transformers.FalconH1ForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = ft.build(falcon_h1.spec_of(config.to_dict()), dtype=torch.float64).eval()
    ours.load_state_dict(falcon_h1.weights_of(config.to_dict(), theirs.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(variant):
    ours, theirs = both(**VARIANTS[variant])
    tokens = torch.randint(0, 97, (2, 37))
    expected, found = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # transformers scans in float32
    weights = torch.randn_like(found)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    expected_gradient = theirs.model.embed_tokens.weight.grad
    scale = expected_gradient.abs().max()
    torch.testing.assert_close(ours.embedding.weight.grad / scale, expected_gradient / scale, rtol=0, atol=1e-5)


def test_greedy_generation_is_that_of_transformers():
    ours, theirs = both()
    prompt = torch.randint(0, 97, (1, 20))
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(prompt, max_new_tokens=12).tolist() == expected.tolist()


def test_unknown_variants_are_refused():
    config = transformers.FalconH1Config(**SMALL | {"hidden_act": "gelu"}).to_dict()
    with pytest.raises(FusionTreeError, match="hidden_act: found 'gelu', only 'silu' is known"):
        falcon_h1.spec_of(config)
