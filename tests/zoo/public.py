"""Tiny models of public families, all their parameters random, here and in transformers."""

from typing import Any, NamedTuple

import torch
import transformers

import fusiontree as ft
from fusiontree.zoo import Family, family_of

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FALCON_H1 = SMALL | {
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
MAMBA2 = {
    **{name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
    **{"num_heads": 12, "head_dim": 8, "state_size": 16, "n_groups": 2, "conv_kernel": 4, "chunk_size": 16},
}
MAMBA = {
    **{name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
    **{"state_size": 8, "conv_kernel": 4},
}
MORE_OF_MAMBA = {
    **{"intermediate_size": 72, "time_step_rank": 5, "conv_kernel": 3, "layer_norm_epsilon": 1e-4},
    **{"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
}
JAMBA = {
    **{name: value for name, value in SMALL.items() if name != "head_dim"},
    **{"num_hidden_layers": 5, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8},
    "pad_token_id": None,  # transformers gives its embedding no gradient
}
MORE_OF_JAMBA = {
    **{"num_hidden_layers": 3, "attn_layer_period": 8, "attn_layer_offset": 2, "head_dim": 16},
    **{"num_experts": 4, "expert_layer_period": 8, "expert_layer_offset": 3},  # in no layer
    **{"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 5, "mamba_d_conv": 3, "mamba_expand": 3},
    **{"tie_word_embeddings": True, "rms_norm_eps": 1e-4},
}
LINEAR = {
    **{"num_hidden_layers": 5, "layer_types": [*["linear_attention"] * 3, "full_attention", "linear_attention"]},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    "pad_token_id": None,
}
QWEN3_NEXT = SMALL | LINEAR | {"num_experts": 0}
MORE_OF_QWEN3_NEXT = {
    **{"num_experts": 4, "mlp_only_layers": [0, 1, 2, 3, 4], "attention_bias": True, "tie_word_embeddings": True},
    **{"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    **{"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3, "rms_norm_eps": 1e-4},
}
OLMO_HYBRID = {name: value for name, value in (SMALL | LINEAR).items() if name != "head_dim"}
MORE_OF_OLMO_HYBRID = {
    **{"rope_parameters": {"rope_type": "default", "rope_theta": None}, "linear_allow_neg_eigval": False},
    **{"attention_bias": True, "tie_word_embeddings": True, "head_dim": 16, "rms_norm_eps": 1e-4},
}
THEIR_BIASES = {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "projectors_bias": True}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "llama, biases, tied": ("llama", SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", SMALL | {"sliding_window": 11}),
    "mistral, no window": ("mistral", SMALL | {"sliding_window": None}),
    "mamba2": ("mamba2", MAMBA2),
    "mamba2, limits, biases, tied": (
        "mamba2",
        MAMBA2 | {"time_step_limit": (0.01, 0.5), "use_bias": True, "tie_word_embeddings": True, "n_groups": 1},
    ),
    "mamba": ("mamba", MAMBA),
    "mamba, another width, biases, no convolution bias, untied": ("mamba", MAMBA | MORE_OF_MAMBA),
    "falcon_mamba": ("falcon_mamba", MAMBA),
    "falcon_mamba, another width, biases, no convolution bias, untied": (
        "falcon_mamba",
        MAMBA | MORE_OF_MAMBA | {"mixer_rms_eps": 1e-3},
    ),
    "jamba": ("jamba", JAMBA),
    "jamba, attention once, biases, no convolution bias, tied": ("jamba", JAMBA | MORE_OF_JAMBA),
    "jamba, no attention": ("jamba", JAMBA | {"attn_layer_period": 9, "attn_layer_offset": 8}),
    "jamba, no mamba": ("jamba", JAMBA | {"attn_layer_period": 1, "attn_layer_offset": 0}),
    "qwen3_next": ("qwen3_next", QWEN3_NEXT),
    "qwen3_next, no experts in any layer, biases, full rotation, tied": (
        "qwen3_next",
        QWEN3_NEXT | MORE_OF_QWEN3_NEXT,
    ),
    "olmo_hybrid": ("olmo_hybrid", OLMO_HYBRID),
    "olmo_hybrid, no positions, positive eigenvalues, biases, tied": ("olmo_hybrid", OLMO_HYBRID | MORE_OF_OLMO_HYBRID),
    "falcon_h1": ("falcon_h1", FALCON_H1),
    "falcon_h1, norm first": ("falcon_h1", FALCON_H1 | {"mamba_rms_norm": True}),
    "falcon_h1, gate first": ("falcon_h1", FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "falcon_h1, biases": ("falcon_h1", FALCON_H1 | THEIR_BIASES),
    "falcon_h1, tied": ("falcon_h1", FALCON_H1 | {"tie_word_embeddings": True, "mamba_conv_bias": False}),
}


class Pair(NamedTuple):
    """One model twice: with the same weights in float32."""

    family: Family
    config: dict[str, Any]
    ours: ft.LanguageModel
    theirs: Any


def config_of(name: str) -> Any:
    """transformers' config."""
    family, options = CONFIGS[name]
    return transformers.AutoConfig.for_model(family, **options)


def pair(name: str) -> Pair:
    """Build both; biases and norms, which start at 0 and 1, move too."""
    torch.manual_seed(0)
    config = config_of(name)
    theirs: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    family = family_of(config.model_type)
    data = config.to_dict()
    ours = ft.build(family.spec_of(data)).eval()
    ours.load_state_dict(family.weights_of(data, theirs.state_dict()))
    return Pair(family, data, ours, theirs)
