"""Configs of families with gated delta rules: published ones, the names in their files, and one line for what is not
expressed."""

import pytest
import torch
from public import OLMO_HYBRID, QWEN3_NEXT, pair

import fusiontree as ft
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import export_model, import_model
from fusiontree.zoo.tensors import interleaved

QWEN3_NEXT_80B = {
    **{"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "torch_dtype": "bfloat16"},
    **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645},
    **{"decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu"},
    **{"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5120, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
    **{"linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": []},
    **{"moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512},
    **{"num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False},
    **{"partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000000},
    **{"router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False},
    **{"use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
}
"""Qwen/Qwen3-Next-80B-A3B-Instruct."""


@pytest.mark.parametrize("experts", [0, 512])
def test_a_published_config_with_its_experts_and_without(experts):
    family = family_of("qwen3_next")
    spec = family.spec_of(QWEN3_NEXT_80B | {"num_experts": experts})
    layers = spec.expanded_layers()
    assert [layer.mixer.kind for layer in layers[:4]] == [*["gated_delta"] * 3, "attention"]  # pyright: ignore
    assert {layer.ffn.kind for layer in layers} == {"moe" if experts else "swiglu"}  # pyright: ignore
    assert spec.data(short=True)["encodings"] == {"rope": {"kind": "rope", "theta": 1e7, "dim": 64}}
    assert family.spec_of(family.config_of(spec)) == spec


def test_layers_that_are_not_said_have_a_period():
    config = {key: value for key, value in OLMO_HYBRID.items() if key != "layer_types"} | {"num_hidden_layers": 9}
    spec = family_of("olmo_hybrid").spec_of(config)
    places = [n for n, layer in enumerate(spec.expanded_layers()) if layer.placement == "post"]
    assert places == [3, 7]


LINEAR = ["linear_attention"] * 5


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("qwen3_next", {"num_experts": 8, "num_experts_per_tok": 9}, "top_k: found 9, there are 8 experts"),
        ("qwen3_next", {"num_experts": -1}, "num_experts: expected a whole number of at least 0, found -1"),
        ("qwen3_next", {"decoder_sparse_step": 0}, "decoder_sparse_step: expected a whole number of at least 1"),
        ("qwen3_next", {"mlp_only_layers": "all"}, "mlp_only_layers: expected a list of whole numbers, found 'all'"),
        ("qwen3_next", {"num_experts": 8, "norm_topk_prob": "no"}, "router.renormalise: expected true or false"),
        ("qwen3_next", {"layer_types": LINEAR[:3]}, "layer_types: 3 are given, num_hidden_layers says 5"),
        ("qwen3_next", {"layer_types": [*LINEAR[:4], "sliding_attention"]}, "layer_types: expected a list of"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval: expected a whole number"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "3 key heads do not divide 4 heads"),
        ("qwen3_next", {"sliding_window": 8}, "sliding_window: qwen3_next is not known to have it, found 8"),
        ("olmo_hybrid", {"hidden_act": "gelu"}, "hidden_act: found 'gelu', olmo_hybrid is known with 'silu'"),
        ("olmo_hybrid", {"linear_num_key_heads": ...}, "olmo_hybrid needs 'linear_num_key_heads'"),
        (
            "olmo_hybrid",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters.rope_type: found 'dynamic'",
        ),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_one_line(name, changes, line):
    config = {"qwen3_next": QWEN3_NEXT, "olmo_hybrid": OLMO_HYBRID}[name] | changes
    with pytest.raises(FusionTreeError) as caught:
        family_of(name).spec_of({key: value for key, value in config.items() if value is not ...})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_delta_rules_and_only_attention():
    family = family_of("qwen3_next")
    for kind in ("linear_attention", "full_attention"):
        spec = family.spec_of(QWEN3_NEXT | {"layer_types": [kind] * 5})
        assert family.spec_of(family.config_of(spec)) == spec
    hybrid = family_of("olmo_hybrid")
    alone = hybrid.spec_of(OLMO_HYBRID | {"layer_types": LINEAR})
    with pytest.raises(FusionTreeError, match="olmo_hybrid has attention, found only gated_delta"):
        hybrid.config_of(alone)


def test_a_family_that_cannot_express_an_option_names_it():
    family = family_of("qwen3_next")
    spec = family.spec_of(QWEN3_NEXT).replace({"layers.3.mixer.gate": False})
    with pytest.raises(FusionTreeError, match=r"layers\.3\.mixer\.gate: qwen3_next has True there, found False"):
        family.config_of(spec)


def test_heads_of_theirs_are_taken_apart_and_put_together():
    view, rows = interleaved(3, 2, 1, 4), torch.arange(21)
    assert view.read(rows)[:6].tolist() == [0, 1, 7, 8, 14, 15]
    assert torch.equal(view.write(view.read(rows)), rows)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_next, experts", "olmo_hybrid"])
def test_files_of_transformers_are_read_and_ours_by_transformers(name, tmp_path):
    """The files of OLMo-Hybrid have other names than its class. Delta rules have the tolerance of their laws: in
    float32 the logits of both sides are up to 7e-5 from their own in float64."""
    both = pair(name)
    both.theirs.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", both.family)
    tokens = torch.arange(60).reshape(2, 30)
    wanted = both.theirs(tokens, use_cache=False).logits
    again = type(both.theirs).from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    for found in (ft.load(tmp_path / "ours")(tokens), again(tokens, use_cache=False).logits):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * max(1.0, float(wanted.abs().max())))


def test_a_map_with_other_rows_is_one_line():
    both = pair("qwen3_next")
    theirs = both.theirs.state_dict()
    theirs["model.layers.0.linear_attn.in_proj_ba.weight"] = torch.zeros(7, 48)
    with pytest.raises(FusionTreeError, match=r"in_proj_ba\.weight': found 7 rows, the config says 8"):
        both.family.weights_of(both.config, theirs)
