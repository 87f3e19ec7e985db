"""Configs as they were published, before transformers 5: they say what transformers makes of them."""

from copy import deepcopy

import pytest
import transformers
from public import LLAMA3, SMALL, YARN

from fusiontree.zoo import family_of

WITHOUT_HEADS = {key: value for key, value in SMALL.items() if key != "head_dim"}
GEMMA = SMALL | {"hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window": 11}
LFM2 = WITHOUT_HEADS | {
    "block_auto_adjust_ff_dim": True,
    "block_dim": 48,
    "block_ff_dim": 100,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 16,
    "block_norm_eps": 1e-5,
    "block_use_swiglu": True,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 48,
    "full_attn_idxs": [1],
    "norm_eps": 1e-5,
    "num_heads": 6,
    "theta": 1e6,
    "rope_theta": 1e6,
    "tie_embedding": False,
    "use_pos_enc": True,
}
LEAST = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 7}
OLDER = {
    "llama": WITHOUT_HEADS | {"rope_theta": 5e5, "rope_scaling": None},
    "llama, llama3": SMALL | {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama, yarn": SMALL | {"rope_theta": 5e5, "rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1}},
    "llama, linear": SMALL | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama, yarn, no length": SMALL
    | {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 2.0}},
    "gemma2": GEMMA | {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 2e4, "num_hidden_layers": 5},
    "gemma3_text": GEMMA
    | {"num_hidden_layers": 7, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "query_pre_attn_scalar": 256},
    "lfm2": LFM2,
    **{f"{name}, nothing but sizes": LEAST for name in ("gemma2", "gemma3_text", "lfm2")},
}


@pytest.mark.parametrize("name", OLDER)
def test_an_older_config_says_what_transformers_makes_of_it(name):
    family, config = family_of(name.split(",")[0]), OLDER[name]
    wanted = family.spec_of(transformers.AutoConfig.for_model(family.name, **deepcopy(config)).to_dict())
    assert family.spec_of(config) == wanted
