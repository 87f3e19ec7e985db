"""Published models: their configs, with where they are to be read, and what their publishers count.

A config holds what its family reads. Where only a table or another library's file states a size, its values stand here
under transformers' names.
"""

from dataclasses import dataclass
from typing import Any

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MLC = "mlc-ai/mlc-llm 79d603f, python/mlc_llm/model/model_preset.py"


@dataclass(frozen=True)
class Published:
    """A model as it was published.

    Attributes:
        title: its name, and the paper.
        config: what stands in its config.json.
        source: where that is to be read.
        parameters: how many it has: the exact number, or as it is rounded ("7.27B").
        counted: who says so.
        cache: (tokens, bytes) of a sequence's cache in 16 bits, where somebody says it, and who.
    """

    title: str
    config: dict[str, Any]
    source: str
    parameters: int | str
    counted: str
    cache: tuple[int, int | str, str] | None = None


KIMI_FULL = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR = {
    **{"model_type": "kimi_linear", "vocab_size": 163840, "hidden_size": 2304, "intermediate_size": 9216},
    **{"num_hidden_layers": 27, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 72},
    **{"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    "linear_attn_config": {
        **{"full_attn_layers": KIMI_FULL, "kda_layers": [n for n in range(1, 28) if n not in KIMI_FULL]},
        **{"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4},
    },
    **{"first_k_dense_replace": 1, "moe_layer_freq": 1, "num_experts": 256, "num_experts_per_token": 8},
    **{"moe_intermediate_size": 1024, "num_shared_experts": 1, "moe_router_activation_func": "sigmoid"},
    **{"moe_renormalize": True, "routed_scaling_factor": 2.446, "num_expert_group": 1, "topk_group": 1},
    **{"use_grouped_topk": True, "mla_use_nope": True, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
}


PUBLISHED = {
    "llama-3.2-1b": Published(
        "Llama 3.2 1B (arXiv 2407.21783)",
        {
            **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192},
            **{"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
            **{"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True},
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
        },
        MLC,
        1235814400,
        "the hub's count of its safetensors; ModelCloud/GPTQModel tests for the same",
        (8000, 262144000, "262.1 MB at 8000 tokens: Hymba, arXiv 2411.13676, table 2"),
    ),
    "mistral-7b": Published(
        "Mistral 7B v0.3 (arXiv 2310.06825)",
        {
            **{"model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
            **{"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False},
        },
        MLC,
        7248023552,
        "model.safetensors.index.json, total_size 14496047104",
        (262144, "32 GB", "Jamba, arXiv 2403.19887, table 1"),
    ),
    "gemma-2-2b": Published(
        "Gemma 2 2B (arXiv 2408.00118)",
        {
            **{"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216},
            **{"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
            **{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096, "query_pre_attn_scalar": 256},
            **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            "hidden_activation": "gelu_pytorch_tanh",
        },
        MLC,
        256000 * 2304 + 2024517888,
        "2,024,517,888 beside the embedding: the report's table 2; index total_size 5228683776",
    ),
    "gemma-3-1b": Published(
        "Gemma 3 1B (arXiv 2503.19786)",
        {
            **{"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912},
            **{"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
            **{"rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window": 512},
            **{"sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh"},
        },
        MLC,
        999885952,
        "the hub's count of its safetensors; keras-hub's preset gemma3_1b says the same",
    ),
    "mamba-2.8b": Published(
        "Mamba 2.8B (arXiv 2312.00752)",
        {
            **{"model_type": "mamba", "vocab_size": 50280, "hidden_size": 2560, "intermediate_size": 5120},
            **{"num_hidden_layers": 64, "state_size": 16, "time_step_rank": 160, "conv_kernel": 4, "expand": 2},
            **{"use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5},
        },
        "confucianfighter/mamba-2.8b-hf-breakdown c7f1a8e, mamba_ssm/models/mamba_2.8b_hf_config.json",
        2768345600,
        "state-spaces/mamba's benchmark prints it; the name says 2.8B",
    ),
    "falcon-mamba-7b": Published(
        "Falcon Mamba 7B (arXiv 2410.05355)",
        {
            **{"model_type": "falcon_mamba", "vocab_size": 65024, "hidden_size": 4096, "intermediate_size": 8192},
            **{"num_hidden_layers": 64, "state_size": 16, "time_step_rank": 256, "conv_kernel": 4, "expand": 16},
            **{"use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False},
        },
        "its config.json, of which danielgonzagat/penin-monorepo 9c1f8da has a copy",
        "7.27B",
        "its page on the hub",
    ),
    "mamba2-2.7b": Published(
        "Mamba-2 2.7B (arXiv 2405.21060)",
        {
            **{"model_type": "mamba2", "vocab_size": 50288, "hidden_size": 2560, "num_hidden_layers": 64, "expand": 2},
            **{"num_heads": 80, "head_dim": 64, "state_size": 128, "n_groups": 1, "conv_kernel": 4},
            **{"use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        },
        "d_model 2560, n_layer 64, 50277 tokens padded to a multiple of 16 (its config.json, pinned by"
        " dathito108-hue/VN97), the rest mamba-ssm's defaults for Mamba2",
        "2.7B",
        "its name",
    ),
    "mamba-codestral-7b": Published(
        "Codestral Mamba 7B",
        {
            **{"model_type": "mamba2", "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "expand": 2},
            **{"num_heads": 128, "head_dim": 64, "state_size": 128, "n_groups": 8, "conv_kernel": 4},
            **{"use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False},
        },
        "the defaults of transformers' Mamba2Config",
        7285403648,
        "mistral.ai/news/codestral-mamba",
    ),
    "falcon-h1-0.5b": Published(
        "Falcon-H1 0.5B (arXiv 2507.22448)",
        {
            **{"model_type": "falcon_h1", "vocab_size": 32784, "hidden_size": 1024, "intermediate_size": 2048},
            **{"num_hidden_layers": 36, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
            **{"mamba_d_ssm": 1536, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128},
            **{"mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_rms_norm": False, "mamba_norm_before_gate": False},
            **{"mamba_conv_bias": True, "mamba_proj_bias": False, "projectors_bias": False, "attention_bias": False},
            **{"mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 100000000000.0, "tie_word_embeddings": False},
            **{"embedding_multiplier": 5.656854249492381, "lm_head_multiplier": 0.0390625},
            **{"key_multiplier": 0.39062499999999994, "attention_in_multiplier": 1.0},
            **{"attention_out_multiplier": 0.9375, "ssm_in_multiplier": 1.25},
            "ssm_out_multiplier": 0.23570226039551587,
            "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
            "mlp_multipliers": [0.8838834764831844, 0.5859375],
        },
        "NVIDIA-NeMo/Megatron-Bridge 067f987, tests/unit_tests/models/falcon_h1/test_falcon_h1_bridge.py",
        521411104,
        "the hub's count of its safetensors",
    ),
    "jamba-1.5-mini": Published(
        "Jamba 1.5 Mini (arXiv 2408.12570)",
        {
            **{"model_type": "jamba", "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 14336},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
            **{"attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"num_experts": 16, "num_experts_per_tok": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2},
            **{"mamba_dt_rank": 256, "mamba_conv_bias": True, "mamba_proj_bias": False},
            **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        },
        "sdpython/experimental-experiment 2573b67, experimental_experiment/torch_models/llm_model_helper.py",
        51570323328,
        "model.safetensors.index.json, total_size 103140646656",
        (262144, "4 GB", "the same layers in Jamba, arXiv 2403.19887, table 1"),
    ),
    "bamba-9b": Published(
        "Bamba 9B",
        {
            **{"model_type": "bamba", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336},
            **{"num_hidden_layers": 32, "attn_layer_indices": [9, 18, 27]},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64},
            **{"mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2},
            **{"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        },
        "foundation-model-stack/fms-fsdp 63b36af, fms_fsdp/utils/config_utils.py (mamba_9.8b), the rest mamba-ssm's"
        " defaults for Mamba2",
        "9.78B",
        "foundation-model-stack/bamba, README.md",
    ),
    "granite-4.0-h-350m": Published(
        "Granite 4.0 H 350M",
        {
            **{"model_type": "granitemoehybrid", "vocab_size": 100352, "hidden_size": 768, "num_hidden_layers": 32},
            "layer_types": ["attention" if layer in (10, 13, 17, 27) else "mamba" for layer in range(32)],
            **{"num_attention_heads": 12, "num_key_value_heads": 4, "position_embedding_type": "nope"},
            **{"mamba_n_heads": 48, "mamba_d_head": 32, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4},
            **{"mamba_conv_bias": True, "mamba_proj_bias": False, "attention_bias": False},
            **{"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 2048},
            **{"embedding_multiplier": 12, "attention_multiplier": 0.015625, "residual_multiplier": 0.246},
            **{"logits_scaling": 3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        },
        "lablup/mlxcel 0c21aed, src/models/granitemoehybrid_tests.rs",
        340332224,
        "the hub's count of its safetensors",
    ),
    "nemotron-h-8b": Published(
        "Nemotron-H 8B (arXiv 2504.03624)",
        {
            **{"model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504},
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
            **{"num_hidden_layers": 52, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
            **{"mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4},
            **{"layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2", "tie_word_embeddings": False},
        },
        "NVIDIA-NeMo/Megatron-Bridge 067f987, docs/models/nemotron/nemotronh.md; vocabulary, groups and convolution:"
        " the defaults of NVIDIA's NemotronHConfig",
        "8B",
        "its name",
    ),
    "lfm2-1.2b": Published(
        "LFM2 1.2B",
        {
            **{"model_type": "lfm2", "vocab_size": 65536, "hidden_size": 2048, "num_hidden_layers": 16},
            "layer_types": ["full_attention" if layer in (2, 5, 8, 10, 12, 14) else "conv" for layer in range(16)],
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "norm_eps": 1e-5, "rope_theta": 1000000.0},
            **{"intermediate_size": 8192, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3, "conv_bias": False},
        },
        "pytorch/executorch 76fcedc, examples/models/lfm2/config/lfm2_1_2b_config.json (which lists a layer too many)",
        1170340608,
        "its page on the hub",
    ),
    "zamba2-2.7b": Published(
        "Zamba2 2.7B (arXiv 2411.15242)",
        {
            **{"model_type": "zamba2", "vocab_size": 32000, "hidden_size": 2560, "num_hidden_layers": 54},
            "layers_block_type": [
                "hybrid" if layer in (6, 12, 18, 24, 30, 36, 42, 47, 51) else "mamba" for layer in range(54)
            ],
            **{"mamba_d_state": 64, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1},
            **{"n_mamba_heads": 80, "mamba_headdim": 64, "num_attention_heads": 32, "num_key_value_heads": 32},
            **{"num_mem_blocks": 2, "adapter_rank": 128, "use_shared_attention_adapter": False, "use_mem_rope": False},
            **{"intermediate_size": 10240, "add_bias_linear": False, "hidden_act": "gelu", "rms_norm_eps": 1e-5},
            "tie_word_embeddings": True,
        },
        "Zyphra/Zamba2 1b182f4, config.json and mamba_config.py",
        "2.7B",
        "the report's abstract",
    ),
    "olmo-hybrid-7b": Published(
        "OLMo Hybrid 7B",
        {
            **{"model_type": "olmo_hybrid", "vocab_size": 100352, "hidden_size": 3840, "intermediate_size": 11008},
            "num_hidden_layers": 32,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8,
            **{"num_attention_heads": 30, "num_key_value_heads": 30, "rms_norm_eps": 1e-6},
            **{"linear_num_key_heads": 30, "linear_num_value_heads": 30, "linear_conv_kernel_dim": 4},
            **{"linear_key_head_dim": 96, "linear_value_head_dim": 192, "linear_allow_neg_eigval": True},
            **{"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
        },
        "allenai/OLMo-core fa6c501, src/scripts/official/OLMo-hybrid (rotations are dropped for the long context), and"
        " the defaults of transformers' OlmoHybridConfig",
        "7B",
        "its name",
    ),
    "recurrentgemma-2b": Published(
        "RecurrentGemma 2B (arXiv 2404.07839)",
        {
            **{"model_type": "recurrent_gemma", "vocab_size": 256000, "hidden_size": 2560, "intermediate_size": 15360},
            **{"num_hidden_layers": 26, "num_attention_heads": 10, "num_key_value_heads": 1, "head_dim": 256},
            **{"lru_width": 2560, "conv1d_width": 4, "attention_window_size": 2048, "logits_soft_cap": 30.0},
            **{"_block_types": ["recurrent", "recurrent", "attention"], "attention_bias": False, "rms_norm_eps": 1e-6},
            **{"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "embeddings_scale_by_sqrt_dim": True},
            "hidden_activation": "gelu_pytorch_tanh",
        },
        "google/recurrentgemma-2b, config.json",
        "2.7B",
        "the report's table 1",
    ),
    "qwen3-next-80b-a3b": Published(
        "Qwen3-Next 80B-A3B",
        {
            **{"model_type": "qwen3_next", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5120},
            **{"num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256},
            **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128},
            **{"linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4},
            **{"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512, "norm_topk_prob": True},
            **{"shared_expert_intermediate_size": 512, "decoder_sparse_step": 1, "mlp_only_layers": []},
            **{"rms_norm_eps": 1e-6, "rope_theta": 10000000, "partial_rotary_factor": 0.25},
            **{"attention_bias": False, "tie_word_embeddings": False},
        },
        "Qwen/Qwen3-Next-80B-A3B-Instruct, config.json",
        79674391296,
        "the hub's count of Qwen/Qwen3-Coder-Next, which has the same sizes",
    ),
    "kimi-linear-48b-a3b": Published(
        "Kimi Linear 48B-A3B (arXiv 2510.26692)",
        KIMI_LINEAR,
        "moonshotai/Kimi-Linear-48B-A3B-Instruct, config.json",
        "49B",
        "published as 48B, which is what is left without the embedding and the head",
    ),
}

BYTES = {"vocab_size": 257, "hidden_size": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
    **{"linear_value_head_dim": 24, "linear_conv_kernel_dim": 4},
}
MAMBA = {"layer_norm_epsilon": 1e-5, "conv_kernel": 4, "expand": 2, "tie_word_embeddings": True}
TINY: dict[str, dict[str, Any]] = {
    "tiny-llama": BYTES | HEADS | {"model_type": "llama", "num_hidden_layers": 4, "intermediate_size": 176},
    "tiny-mistral": BYTES
    | HEADS
    | {"model_type": "mistral", "num_hidden_layers": 4, "intermediate_size": 176, "sliding_window": 64},
    "tiny-gemma-2": BYTES
    | HEADS
    | {"model_type": "gemma2", "num_hidden_layers": 4, "intermediate_size": 176, "head_dim": 16, "sliding_window": 64}
    | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "tiny-gemma-3": BYTES
    | HEADS
    | {"model_type": "gemma3_text", "num_hidden_layers": 6, "intermediate_size": 176, "head_dim": 16}
    | {"sliding_window": 64, "query_pre_attn_scalar": 16, "rope_theta": 1000000, "rope_local_base_freq": 10000},
    "tiny-mamba": MAMBA
    | {"model_type": "mamba", "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 4, "state_size": 16},
    "tiny-falcon-mamba": MAMBA
    | {"model_type": "falcon_mamba", "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 4, "state_size": 16},
    "tiny-mamba2": MAMBA
    | {"model_type": "mamba2", "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 4, "state_size": 32}
    | {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "tiny-falcon-h1": PUBLISHED["falcon-h1-0.5b"].config
    | BYTES
    | HEADS
    | {"num_hidden_layers": 4, "intermediate_size": 128, "head_dim": 16, "mamba_d_ssm": 96, "mamba_n_heads": 6}
    | {"mamba_d_head": 16, "mamba_d_state": 32},
    "tiny-jamba": PUBLISHED["jamba-1.5-mini"].config
    | BYTES
    | HEADS
    | {"num_hidden_layers": 8, "intermediate_size": 96, "num_experts": 4, "mamba_dt_rank": 4},
    "tiny-bamba": PUBLISHED["bamba-9b"].config
    | BYTES
    | HEADS
    | {"num_hidden_layers": 4, "attn_layer_indices": [2], "intermediate_size": 176}
    | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 32},
    "tiny-granite-4.0-h": PUBLISHED["granite-4.0-h-350m"].config
    | BYTES
    | HEADS
    | {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"]}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "shared_intermediate_size": 64}
    | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 32, "attention_multiplier": 0.0625},
    "tiny-nemotron-h": PUBLISHED["nemotron-h-8b"].config
    | {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 256, "hybrid_override_pattern": "M-M*-M-"}
    | HEADS
    | {"num_hidden_layers": 7, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16}
    | {"ssm_state_size": 32, "n_groups": 2},
    "tiny-lfm2": HEADS
    | {"model_type": "lfm2", "vocab_size": 257, "hidden_size": 64, "num_hidden_layers": 6, "norm_eps": 1e-5}
    | {"layer_types": ["conv", "conv", "full_attention"] * 2, "rope_theta": 1000000.0, "conv_L_cache": 3}
    | {"intermediate_size": 176, "block_auto_adjust_ff_dim": False},
    "tiny-qwen3-next": BYTES
    | HEADS
    | LINEAR
    | {"model_type": "qwen3_next", "num_hidden_layers": 4, "intermediate_size": 176, "head_dim": 16}
    | {"num_experts": 0, "rms_norm_eps": 1e-6, "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    "tiny-zamba2": PUBLISHED["zamba2-2.7b"].config
    | BYTES
    | {"num_hidden_layers": 6, "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid", "hybrid"]}
    | {"mamba_d_state": 32, "n_mamba_heads": 8, "mamba_headdim": 16, "num_attention_heads": 4}
    | {"num_key_value_heads": 4, "adapter_rank": 8, "intermediate_size": 176},
    "tiny-recurrent-gemma": PUBLISHED["recurrentgemma-2b"].config
    | BYTES
    | {"num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 16, "lru_width": 64, "intermediate_size": 256}
    | {"attention_window_size": 64},
    "tiny-kimi-linear": KIMI_LINEAR
    | {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16}
    | {"qk_rope_head_dim": 8, "v_head_dim": 16, "num_experts": 8, "num_experts_per_token": 2}
    | {"moe_intermediate_size": 32}
    | {
        "linear_attn_config": {
            **{"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 16, "num_heads": 4},
            "short_conv_kernel_size": 4,
        }
    },
    "tiny-minimax": BYTES
    | HEADS
    | {"model_type": "minimax", "num_hidden_layers": 4, "intermediate_size": 96, "head_dim": 16}
    | {"layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"rope_theta": 10000000, "linear_attn_alpha_factor": 1.5, "full_attn_alpha_factor": 1.5, "mlp_alpha_factor": 1.5},
    "tiny-olmo-hybrid": BYTES
    | HEADS
    | LINEAR
    | {"model_type": "olmo_hybrid", "num_hidden_layers": 4, "intermediate_size": 176, "tie_word_embeddings": False},
}
"""A model over bytes of each family, with the published one's options and few, narrow layers."""
