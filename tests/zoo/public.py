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
JAMBA_EXPERTS = JAMBA | {"num_experts": 5, "num_experts_per_tok": 3, "num_hidden_layers": 4}
BAMBA = {
    **{name: value for name, value in SMALL.items() if name != "head_dim"},
    **{"num_hidden_layers": 3, "attn_layer_indices": [1], "pad_token_id": None},
    **{"mamba_n_heads": 12, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16},
}
MORE_OF_BAMBA = {
    **{"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False},
    **{"mamba_expand": 3, "mamba_d_conv": 3, "tie_word_embeddings": True, "time_step_limit": (0.01, 0.5)},
    **{"attn_layer_indices": [0, 2], "head_dim": 16, "rms_norm_eps": 1e-4},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
}
GRANITE = {
    **{name: value for name, value in BAMBA.items() if name != "attn_layer_indices"},
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 0},
    **{"shared_intermediate_size": 56, "embedding_multiplier": 12, "logits_scaling": 6, "residual_multiplier": 0.22},
    "attention_multiplier": 0.4,
}
MORE_OF_GRANITE = {
    **{"attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_d_conv": 3},
    **{"tie_word_embeddings": True, "logits_scaling": 1.7, "head_dim": 16, "position_embedding_type": "rope"},
    **{"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-4},
}
GRANITE_EXPERTS = GRANITE | {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 24}
NEMOTRON_H = {
    **{name: value for name, value in SMALL.items() if name != "num_hidden_layers"},
    **{"mamba_num_heads": 12, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16},
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
}
MORE_OF_NEMOTRON_H = {
    **{"use_bias": True, "mlp_bias": True, "use_conv_bias": False, "conv_kernel": 3, "time_step_min": 0.2},
    **{"mamba_head_dim": 6, "layer_norm_epsilon": 1e-4, "num_key_value_heads": 3},
}
EXPERTS_OF_NEMOTRON_H = {
    **{"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"], "n_routed_experts": 5},
    **{"num_experts_per_tok": 3, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 20},
}
GEMMA = SMALL | {
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 10,
    "sliding_window": 11,
    "pad_token_id": None,  # a padding token's embedding would get no gradient from the input
}
TYPES = ["full_attention", "sliding_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.25,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}


def scaled(**parameters: Any) -> dict[str, Any]:
    """A Llama whose rotations are scaled; some of its channel pairs turn fast, some slowly, some between."""
    theta = {"rope_theta": 100.0}
    return SMALL | {"head_dim": 16, "max_position_embeddings": 64, "rope_parameters": theta | parameters}


LFM2 = SMALL | {
    "num_hidden_layers": 5,
    "full_attn_idxs": [1, 3],
    "block_multiple_of": 16,
    "pad_token_id": None,
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
QWEN3_NEXT_EXPERTS = QWEN3_NEXT | {
    **{"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "shared_expert_intermediate_size": 20,
}
OLMO_HYBRID = {name: value for name, value in (SMALL | LINEAR).items() if name != "head_dim"}
MORE_OF_OLMO_HYBRID = {
    **{"rope_parameters": {"rope_type": "default", "rope_theta": None}, "linear_allow_neg_eigval": False},
    **{"attention_bias": True, "tie_word_embeddings": True, "head_dim": 16, "rms_norm_eps": 1e-4},
}
KIMI_LINEAR = {
    **{name: value for name, value in SMALL.items() if name not in ("head_dim", "num_key_value_heads")},
    **{"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "num_attention_heads": 3},
    **{"num_key_value_heads": 3, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10},
    **{"linear_num_heads": 4, "linear_head_dim": 8, "mlp_layer_types": ["dense"] * 4, "pad_token_id": None},
}
MORE_OF_KIMI_LINEAR = {
    **{"q_lora_rank": 14, "attention_bias": True, "linear_conv_kernel_dim": 3, "rms_norm_eps": 1e-4},
    **{"linear_num_heads": 3, "linear_head_dim": 10, "layer_types": ["full_attention"] + ["linear_attention"] * 3},
}
EXPERTS_OF_KIMI_LINEAR = {
    **{"mlp_layer_types": ["dense", *["sparse"] * 3], "moe_intermediate_size": 16, "num_experts": 8},
    **{"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
}
RECURRENT_GEMMA = {
    **{name: value for name, value in SMALL.items() if name != "head_dim"},
    **{"num_hidden_layers": 4, "num_key_value_heads": 1, "attention_window_size": 11, "pad_token_id": None},
}
MORE_OF_RECURRENT_GEMMA = {
    **{"lru_width": 72, "conv1d_width": 3, "block_types": ["attention", "recurrent"], "attention_bias": True},
    **{"intermediate_size": 81, "logits_soft_cap": 3.0, "tie_word_embeddings": False, "rms_norm_eps": 1e-4},
    **{"num_hidden_layers": 3, "num_key_value_heads": 3},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
}
MINIMAX = SMALL | {
    **{"num_hidden_layers": 3, "num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 24},
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 16},
    **{"linear_attn_alpha_factor": 1.7, "linear_attn_beta_factor": 0.8, "full_attn_alpha_factor": 1.3},
    **{"full_attn_beta_factor": 0.9, "mlp_alpha_factor": 1.1, "mlp_beta_factor": 0.7},
}
MORE_OF_MINIMAX = {
    **{"layer_types": None, "num_hidden_layers": 2, "head_dim": None, "sliding_window": 11, "rms_norm_eps": 1e-3},
    **{"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}
ZAMBA2 = {
    **{name: value for name, value in SMALL.items() if name not in ("head_dim", "num_key_value_heads")},
    **{"num_hidden_layers": 6, "n_mamba_heads": 12, "mamba_d_state": 16, "mamba_ngroups": 2, "chunk_size": 16},
    **{"layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid", "hybrid"]},
    **{"num_mem_blocks": 2, "adapter_rank": 5, "pad_token_id": None},
}
"""Each of two blocks is used twice."""
MORE_OF_ZAMBA2 = {
    **{"use_shared_attention_adapter": True, "use_mem_rope": True, "add_bias_linear": True, "num_mem_blocks": 3},
    **{"time_step_min": 0.3, "mamba_d_conv": 3, "mamba_ngroups": 1, "mamba_expand": 3},
    **{"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-4},
}
THEIR_BIASES = {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True, "projectors_bias": True}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "llama, biases, tied": ("llama", SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, linear": ("llama", scaled(rope_type="linear", factor=4.0)),
    "llama, llama3": ("llama", scaled(**LLAMA3)),
    "llama, yarn": ("llama", scaled(**YARN)),
    "llama, yarn, all options": (
        "llama",
        scaled(**YARN, beta_fast=1.5, beta_slow=0.5, attention_factor=1.3, truncate=False),
    ),
    "llama, yarn, mscale": ("llama", scaled(**YARN, mscale=0.7, mscale_all_dim=1.2)),
    "mistral": ("mistral", SMALL | {"sliding_window": 11}),
    "mistral, no window": ("mistral", SMALL | {"sliding_window": None}),
    "gemma2": ("gemma2", GEMMA),
    "gemma2, no caps, biases, untied": (
        "gemma2",
        GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"attention_bias": True, "tie_word_embeddings": False, "layer_types": TYPES, "query_pre_attn_scalar": 8},
    ),
    "gemma2, low caps": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "gemma3_text, scaled, capped, biases": (
        "gemma3_text",
        GEMMA
        | {"layer_types": TYPES, "attention_bias": True, "final_logit_softcapping": 3.0}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5e5, "rope_local_base_freq": 2e4},
    ),
    "gemma3_text, only global, untied": (
        "gemma3_text",
        GEMMA | {"layer_types": ["full_attention"] * 3, "tie_word_embeddings": False},
    ),
    "lfm2": ("lfm2", LFM2),
    "lfm2, biases, untied, four taps": (
        "lfm2",
        LFM2
        | {"conv_bias": True, "tie_word_embeddings": False, "conv_L_cache": 4, "head_dim": 12}
        | {"block_auto_adjust_ff_dim": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "lfm2, only attention": (
        "lfm2",
        LFM2 | {"full_attn_idxs": None, "num_hidden_layers": 2, "block_ffn_dim_multiplier": 1.7},
    ),
    "lfm2, only convolutions": ("lfm2", LFM2 | {"full_attn_idxs": []}),
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
    "jamba, experts": ("jamba", JAMBA_EXPERTS),
    "jamba, experts everywhere": ("jamba", JAMBA_EXPERTS | {"expert_layer_period": 1, "expert_layer_offset": 0}),
    "jamba, experts once": (
        "jamba",
        JAMBA_EXPERTS | {"expert_layer_period": 7, "expert_layer_offset": 2, "num_experts_per_tok": 1},
    ),
    "bamba": ("bamba", BAMBA),
    "bamba, another width, limits, biases, no convolution bias, tied": ("bamba", BAMBA | MORE_OF_BAMBA),
    "bamba, no attention": ("bamba", BAMBA | {"attn_layer_indices": None}),
    "bamba, no mamba": ("bamba", BAMBA | {"attn_layer_indices": [0, 1, 2]}),
    "granitemoehybrid": ("granitemoehybrid", GRANITE),
    "granitemoehybrid, rope, biases, no convolution bias, tied": ("granitemoehybrid", GRANITE | MORE_OF_GRANITE),
    "granitemoehybrid, no attention": ("granitemoehybrid", GRANITE | {"layer_types": None}),
    "granitemoehybrid, no mamba": ("granitemoehybrid", GRANITE | {"layer_types": ["full_attention"] * 3}),
    "granitemoehybrid, experts": ("granitemoehybrid", GRANITE_EXPERTS),
    "granitemoehybrid, one expert, rope, tied": (
        "granitemoehybrid",
        GRANITE_EXPERTS | MORE_OF_GRANITE | {"num_local_experts": 1, "num_experts_per_tok": 1},
    ),
    "nemotron_h": ("nemotron_h", NEMOTRON_H),
    "nemotron_h, another width, limit, biases, no convolution bias": ("nemotron_h", NEMOTRON_H | MORE_OF_NEMOTRON_H),
    "nemotron_h, no mamba": ("nemotron_h", NEMOTRON_H | {"layers_block_type": ["full_attention", "mlp"]}),
    "nemotron_h, experts": ("nemotron_h", NEMOTRON_H | EXPERTS_OF_NEMOTRON_H),
    "nemotron_h, experts, scaled, not renormalised": (
        "nemotron_h",
        NEMOTRON_H | EXPERTS_OF_NEMOTRON_H | {"routed_scaling_factor": 1.7, "norm_topk_prob": False},
    ),
    "nemotron_h, groups of experts": (
        "nemotron_h",
        NEMOTRON_H | EXPERTS_OF_NEMOTRON_H | {"n_routed_experts": 6, "n_group": 3, "topk_group": 2},
    ),
    "qwen3_next": ("qwen3_next", QWEN3_NEXT),
    "qwen3_next, no experts in any layer, biases, full rotation, tied": (
        "qwen3_next",
        QWEN3_NEXT | MORE_OF_QWEN3_NEXT,
    ),
    "qwen3_next, experts": ("qwen3_next", QWEN3_NEXT_EXPERTS),
    "qwen3_next, experts in some layers, not renormalised": (
        "qwen3_next",
        QWEN3_NEXT_EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "olmo_hybrid": ("olmo_hybrid", OLMO_HYBRID),
    "olmo_hybrid, yarn": (
        "olmo_hybrid",
        OLMO_HYBRID | {"rope_parameters": YARN | {"rope_theta": 100.0}, "max_position_embeddings": 64},
    ),
    "olmo_hybrid, no positions, positive eigenvalues, biases, tied": ("olmo_hybrid", OLMO_HYBRID | MORE_OF_OLMO_HYBRID),
    "kimi_linear": ("kimi_linear", KIMI_LINEAR),
    "kimi_linear, latent queries, biases, other heads": ("kimi_linear", KIMI_LINEAR | MORE_OF_KIMI_LINEAR),
    "kimi_linear, groups of experts": ("kimi_linear", KIMI_LINEAR | EXPERTS_OF_KIMI_LINEAR),
    "kimi_linear, experts everywhere, not renormalised": (
        "kimi_linear",
        KIMI_LINEAR
        | EXPERTS_OF_KIMI_LINEAR
        | {"mlp_layer_types": ["sparse"] * 4, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "minimax": ("minimax", MINIMAX),
    "minimax, window, tied": ("minimax", MINIMAX | MORE_OF_MINIMAX),
    "minimax, no attention": ("minimax", MINIMAX | {"layer_types": ["linear_attention"] * 3}),
    "minimax, no lightning": ("minimax", MINIMAX | {"layer_types": ["full_attention"] * 3}),
    "recurrent_gemma": ("recurrent_gemma", RECURRENT_GEMMA),
    "recurrent_gemma, another width, biases, low cap, untied": (
        "recurrent_gemma",
        RECURRENT_GEMMA | MORE_OF_RECURRENT_GEMMA,
    ),
    "recurrent_gemma, no attention": ("recurrent_gemma", RECURRENT_GEMMA | {"block_types": ["recurrent"]}),
    "recurrent_gemma, no recurrence": ("recurrent_gemma", RECURRENT_GEMMA | {"block_types": ["attention"]}),
    "zamba2": ("zamba2", ZAMBA2),
    "zamba2, three blocks, adapted attention, rope, another width, limit, biases": (
        "zamba2",
        ZAMBA2 | MORE_OF_ZAMBA2,
    ),
    "zamba2, one block, grouped queries, heads that do not fill the width": (
        "zamba2",
        ZAMBA2 | {"num_mem_blocks": 1, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": None},
    ),
    "zamba2, no block twice, untied": ("zamba2", ZAMBA2 | {"num_mem_blocks": 5, "tie_word_embeddings": False}),
    "zamba2, no block": ("zamba2", ZAMBA2 | {"layers_block_type": ["linear_attention"] * 2, "num_hidden_layers": 2}),
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
    theirs.set_experts_implementation("eager")
    saved = theirs.state_dict()
    family = family_of(config.model_type)
    data = config.to_dict()
    computed = family.computed(family.options(data))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in (buffer for name, buffer in theirs.named_buffers() if name in saved and name not in computed):
            buffer.add_(0.1 * torch.randn_like(buffer))
    ours = ft.build(family.spec_of(data)).eval()
    ours.load_state_dict(family.weights_of(data, theirs.state_dict()))
    return Pair(family, data, ours, theirs)
