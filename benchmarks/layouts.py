"""A layout of some ten million parameters for every family, as alike as the families let them be."""

from typing import Any

SIZES: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 512, "max_position_embeddings": 2**16}
ATTENTION: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
BLOCKS: dict[str, Any] = SIZES | ATTENTION | {"num_hidden_layers": 4, "intermediate_size": 1024}
NO_PADDING: dict[str, Any] = {"pad_token_id": None}
HYBRID = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
MAMBA_2: dict[str, Any] = {
    **{"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2},
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
DELTA: dict[str, Any] = {
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": BLOCKS,
    "mistral": BLOCKS | {"sliding_window": 256},
    "gemma2": BLOCKS | {"sliding_window": 256, **NO_PADDING},
    "gemma3_text": BLOCKS | {"sliding_window": 256, **NO_PADDING},
    "mamba": SIZES | {"num_hidden_layers": 4, "state_size": 16},
    "falcon_mamba": SIZES | {"num_hidden_layers": 4, "state_size": 16},
    "mamba2": SIZES | {"num_hidden_layers": 4, "num_heads": 16, "head_dim": 64, "state_size": 128, "n_groups": 1},
    "falcon_h1": BLOCKS | {"mamba_d_ssm": 1024} | {k: v for k, v in MAMBA_2.items() if k != "mamba_expand"},
    "jamba": SIZES
    | {k: v for k, v in ATTENTION.items() if k != "head_dim"}
    | {"num_hidden_layers": 4, "intermediate_size": 1024, "attn_layer_period": 4, "attn_layer_offset": 2}
    | {**EXPERTS, "expert_layer_period": 2, "expert_layer_offset": 1, **NO_PADDING},
    "lfm2": BLOCKS | {"layer_types": ["conv", "conv", "full_attention", "conv"], **NO_PADDING},
    "bamba": {k: v for k, v in BLOCKS.items() if k != "head_dim"}
    | {**MAMBA_2, "attn_layer_indices": [2], **NO_PADDING},
    "granitemoehybrid": {k: v for k, v in BLOCKS.items() if k != "head_dim"}
    | {**MAMBA_2, "layer_types": HYBRID, "num_local_experts": 0, "shared_intermediate_size": 1024, **NO_PADDING},
    "nemotron_h": {k: v for k, v in BLOCKS.items() if k != "num_hidden_layers"}
    | {"mamba_num_heads": 16, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 1, **NO_PADDING}
    | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention", "mlp"]},
    "qwen3_next": BLOCKS | {**DELTA, "layer_types": HYBRID, "num_experts": 0},
    "kimi_linear": SIZES
    | {"num_hidden_layers": 4, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    | {"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "linear_num_heads": 8}
    | {"linear_head_dim": 64, "layer_types": HYBRID, "mlp_layer_types": ["dense"] * 4, **NO_PADDING},
    "minimax": BLOCKS
    | {"layer_types": HYBRID, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 512},
    "recurrent_gemma": {k: v for k, v in BLOCKS.items() if k != "head_dim"}
    | {"num_key_value_heads": 1, "attention_window_size": 256, "intermediate_size": 2048, **NO_PADDING},
    "zamba2": SIZES
    | {"num_hidden_layers": 4, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    | {"n_mamba_heads": 16, "mamba_d_state": 64, "mamba_ngroups": 1, "num_mem_blocks": 1, "use_mem_rope": True}
    | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], **NO_PADDING},
    "olmo_hybrid": BLOCKS | {**DELTA, "layer_types": HYBRID, **NO_PADDING},
}
