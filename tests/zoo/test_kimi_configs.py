"""Configs of Kimi Linear: the published one, its older form and both names of fields, the names in files, and one line
for what is not expressed."""

import pytest
import torch
import transformers
from public import EXPERTS_OF_KIMI_LINEAR, KIMI_LINEAR, pair

import fusiontree as ft
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import Tensors, export_model, import_model

FULL = [4, 8, 12, 16, 20, 24, 27]
KIMI_LINEAR_48B = {
    **{"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "dtype": "bfloat16"},
    **{"bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839, "first_k_dense_replace": 1},
    **{"head_dim": 72, "hidden_act": "silu", "hidden_size": 2304, "initializer_range": 0.02},
    **{"intermediate_size": 9216, "kv_lora_rank": 512, "mla_use_nope": True, "model_max_length": 1048576},
    "linear_attn_config": {
        **{"full_attn_layers": FULL, "kda_layers": [n for n in range(1, 28) if n not in FULL]},
        **{"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4},
    },
    **{"moe_intermediate_size": 1024, "moe_layer_freq": 1, "moe_renormalize": True},
    **{"moe_router_activation_func": "sigmoid", "num_attention_heads": 32, "num_expert_group": 1},
    **{"num_experts": 256, "num_experts_per_token": 8, "num_hidden_layers": 27, "num_key_value_heads": 32},
    **{"num_nextn_predict_layers": 0, "num_shared_experts": 1, "q_lora_rank": None, "qk_nope_head_dim": 128},
    **{"qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0},
    **{"routed_scaling_factor": 2.446, "tie_word_embeddings": False, "topk_group": 1, "use_cache": True},
    **{"use_grouped_topk": True, "v_head_dim": 128, "vocab_size": 163840},
}
"""moonshotai/Kimi-Linear-48B-A3B-Instruct."""


def test_the_published_config():
    family = family_of("kimi_linear")
    spec = family.spec_of(KIMI_LINEAR_48B)
    layers = spec.expanded_layers()
    assert [n for n, layer in enumerate(layers, 1) if layer.mixer.kind == "mla"] == FULL  # pyright: ignore
    assert [layer.ffn.kind for layer in layers] == ["swiglu", *["moe"] * 26]  # pyright: ignore
    parameters = sum(parameter.numel() for parameter in ft.build(spec, device="meta").parameters())
    assert round(parameters / 1e9) == 49  # with the embedding and the head
    assert family.spec_of(family.config_of(spec)) == spec


@pytest.mark.parametrize("config", [KIMI_LINEAR_48B, {"num_hidden_layers": 9, "vocab_size": 97}], ids=["first", "bare"])
def test_transformers_reads_the_same_from_a_config(config):
    family = family_of("kimi_linear")
    whole = transformers.AutoConfig.for_model("kimi_linear", **{k: v for k, v in config.items() if k != "model_type"})
    assert family.spec_of(whole.to_dict()) == family.spec_of(config)


def test_the_cache_of_latent_attention_is_small():
    spec = family_of("kimi_linear").spec_of(KIMI_LINEAR_48B)
    one = spec.node("layers.3.mixer")
    assert one.cache_bytes(spec.scope, 1000, torch.bfloat16) == 1000 * 2 * (512 + 64)  # pyright: ignore


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"linear_attn_config": 3}, "linear_attn_config: expected a mapping, found 3"),
        (
            {"linear_attn_config": {"gate_lower_bound": -5.0}},
            "linear_attn_config.gate_lower_bound: kimi_linear is not known to have it, found -5.0",
        ),
        (
            {"linear_attn_config": {"kda_layers": [1, 2], "full_attn_layers": [2, 3]}, "layer_types": None},
            "linear_attn_config: kda_layers and full_attn_layers have to name every layer once, the first one is 1",
        ),
        (
            {"linear_attn_config": {"kda_layers": [0, 1], "full_attn_layers": [2, 3]}, "layer_types": None},
            "linear_attn_config: kda_layers and full_attn_layers have to name every layer once",
        ),
        (
            {"linear_attn_config": {"kda_layers": [1.5], "full_attn_layers": 3}, "layer_types": None},
            "linear_attn_config.kda_layers: expected a list of whole numbers, found [1.5]",
        ),
        (
            {"linear_attn_config": {"kda_layers": [1, 2]}, "layer_types": None},
            "linear_attn_config.full_attn_layers: expected a list of whole numbers, found None",
        ),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types: 1 are given, there are 4 layers"),
        ({"mlp_layer_types": ["dense", "moe"]}, "mlp_layer_types: kimi_linear knows no layer 'moe'"),
        ({"layer_types": ["full_attention"]}, "layer_types: 1 are given, num_hidden_layers says 4"),
        ({"num_key_value_heads": 1}, "num_key_value_heads: found 1, kimi_linear is known with 3"),
        ({"mla_use_nope": False}, "mla_use_nope: found False, kimi_linear is known with True"),
        ({"moe_router_activation_func": "softmax"}, "moe_router_activation_func: found 'softmax'"),
        ({"num_shared_experts": 0}, "num_shared_experts: expected a whole number of at least 1, found 0"),
        ({"n_group": 3}, "layers.1.ffn.router.groups: 3 groups do not divide 8 experts"),
        ({"topk_group": 1}, "layers.1.ffn.top_k: found 3, in 1 of 4 groups are 2 experts"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: found True, kimi_linear is known with False"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers: found 1, kimi_linear is known with 0"),
        ({"sliding_window": 8}, "sliding_window: kimi_linear is not known to have it, found 8"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_does_not_fit_is_one_line(changes, line):
    with pytest.raises(FusionTreeError) as caught:
        family_of("kimi_linear").spec_of(KIMI_LINEAR | EXPERTS_OF_KIMI_LINEAR | changes)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("layers.1.mixer.window", 8, r"layers\.1\.mixer\.window: kimi_linear has nothing there, found 8"),
        ("layers.0.mixer.gate_rank", 4, r"layers\.0\.mixer\.gate_rank: kimi_linear has 8 there, found 4"),
        ("layers.0.mixer.decay", "head", r"layers\.0\.mixer\.decay: kimi_linear has 'channel' there"),
        ("layers.1.ffn.shared_hidden", 40, r"layers\.1\.ffn\.shared_hidden: kimi_linear has 32 there, found 40"),
        ("layers.1.ffn.router.correction", False, r"layers\.1\.ffn\.router\.correction: kimi_linear has True there"),
    ],
    ids=str,
)
def test_what_the_family_cannot_express_names_the_node(path, value, line):
    family = family_of("kimi_linear")
    spec = family.spec_of(KIMI_LINEAR | EXPERTS_OF_KIMI_LINEAR)
    with pytest.raises(FusionTreeError, match=line):
        family.config_of(spec.replace({path: value}))


def test_only_delta_rules_and_only_latent_attention():
    family = family_of("kimi_linear")
    for kind in ("linear_attention", "full_attention"):
        spec = family.spec_of(KIMI_LINEAR | {"layer_types": [kind] * 4})
        assert family.spec_of(family.config_of(spec)) == spec


@torch.no_grad()
def test_files_of_transformers_are_read_and_ours_by_transformers(tmp_path):
    """They have other names than its class: experts and convolutions stand alone. Published ones are as ours."""
    both = pair("kimi_linear, groups of experts")
    both.theirs.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", both.family)
    tokens = torch.arange(60).reshape(2, 30)
    wanted = both.theirs(tokens, use_cache=False).logits
    with Tensors(tmp_path / "back") as written:
        assert {"model.layers.0.mlp.up_proj.weight", "model.layers.1.block_sparse_moe.gate.weight"} <= set(written)
    again = type(both.theirs).from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    again.set_experts_implementation("eager")
    for found in (ft.load(tmp_path / "ours")(tokens), again(tokens, use_cache=False).logits):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.abs().max())))
