"""Configs of RecurrentGemma and MiniMax: published ones, their files, and one line for what is not expressed."""

import pytest
import torch
from public import MINIMAX, RECURRENT_GEMMA, pair

import fusiontree as ft
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import export_model, import_model
from fusiontree.zoo.minimax import slopes

RECURRENT_GEMMA_2B = {
    **{"architectures": ["RecurrentGemmaForCausalLM"], "model_type": "recurrent_gemma", "torch_dtype": "float32"},
    **{"_block_types": ["recurrent", "recurrent", "attention"], "attention_bias": False, "attention_dropout": 0.0},
    **{"attention_window_size": 2048, "bos_token_id": 2, "conv1d_width": 4, "embeddings_scale_by_sqrt_dim": True},
    **{"eos_token_id": 1, "final_w_init_variance_scale": 0.0769, "head_dim": 256, "hidden_size": 2560},
    **{"hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 15360, "logits_soft_cap": 30.0},
    **{"lru_width": 2560, "num_attention_heads": 10, "num_hidden_layers": 26, "num_key_value_heads": 1},
    **{"pad_token_id": 0, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    **{"use_cache": True, "vocab_size": 256000, "w_init_variance_scale": 0.01},
}


def test_recurrent_gemma_2b():
    family = family_of("recurrent_gemma")
    spec = family.spec_of(RECURRENT_GEMMA_2B)
    kinds = [layer.mixer.kind for layer in spec.expanded_layers()]  # pyright: ignore
    assert kinds == [*["rglru", "rglru", "attention"] * 8, "rglru", "rglru"]
    assert spec.embedding.multiplier == 50.5  # and not 50.596...
    assert spec.node("layers.0.ffn").hidden == 7680  # pyright: ignore
    assert spec.data(short=True)["encodings"] == {"rope": {"kind": "rope", "dim": 128}}
    assert family.spec_of(family.config_of(spec)) == spec


def test_slopes_halve_from_head_to_head_and_fall_with_depth():
    first, last = slopes(8, 0, 5), slopes(8, 4, 5)
    assert first == pytest.approx([2.0**-n for n in range(1, 9)], rel=2e-5)
    assert slopes(8, 2, 5) == pytest.approx([slope / 2 for slope in first], rel=1e-4)
    assert all(0 < slope < 1e-4 for slope in last)
    assert len(slopes(3, 0, 1)) == 3


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("recurrent_gemma", {"block_types": ["mamba"]}, "block_types: recurrent_gemma knows no layer 'mamba'"),
        ("recurrent_gemma", {"block_types": "recurrent"}, "block_types: expected a list, found 'recurrent'"),
        ("recurrent_gemma", {"block_types": []}, "block_types: found an empty list"),
        ("recurrent_gemma", {"lru_width": 50}, "lru_width: 6 heads do not divide 50 channels"),
        ("recurrent_gemma", {"lru_width": "wide"}, "lru_width: 6 heads do not divide 'wide' channels"),
        (
            "recurrent_gemma",
            {"logits_soft_cap": None},
            "logits_soft_cap: expected a finite number above 0, found None",
        ),
        ("recurrent_gemma", {"hidden_activation": "silu"}, "hidden_activation: found 'silu', recurrent_gemma is known"),
        ("recurrent_gemma", {"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim: found False"),
        ("recurrent_gemma", {"intermediate_size": 1}, "intermediate_size: expected a whole number of at least 2"),
        ("recurrent_gemma", {"num_hidden_layers": 10**12}, "10001 layers, at most 10000 are allowed"),
        ("recurrent_gemma", {"sliding_window": 8}, "sliding_window: recurrent_gemma is not known to have it, found 8"),
        (
            "recurrent_gemma",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters.rope_type: found 'yarn', recurrent_gemma is known with 'default'",
        ),
        ("minimax", {"layer_types": ["linear_attention"]}, "layer_types: 1 are given, num_hidden_layers says 3"),
        ("minimax", {"hidden_act": "gelu"}, "hidden_act: found 'gelu', minimax is known with 'silu'"),
        ("minimax", {"rotary_dim": 4}, "rotary_dim: found 4, minimax is known with 8"),
        ("minimax", {"shared_intermediate_size": 64}, "shared_intermediate_size: found 64, minimax is known with 0"),
        ("minimax", {"mlp_beta_factor": "big"}, "residual.add: expected a number, found 'big'"),
        ("minimax", {"num_experts_per_tok": 9}, "top_k: found 9, there are 5 experts"),
        ("minimax", {"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number of at least 1, found 0"),
        ("minimax", {"qk_norm": True}, "qk_norm: minimax is not known to have it, found True"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_does_not_fit_is_one_line(name, changes, line):
    config = {"recurrent_gemma": RECURRENT_GEMMA, "minimax": MINIMAX}[name] | changes
    with pytest.raises(FusionTreeError) as caught:
        family_of(name).spec_of(config)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_family_cannot_express_names_the_node():
    gemma, minimax = family_of("recurrent_gemma"), family_of("minimax")
    spec = gemma.spec_of(RECURRENT_GEMMA)
    with pytest.raises(FusionTreeError, match=r"layers\.0\.mixer\.bias: recurrent_gemma has True there, found False"):
        gemma.config_of(spec.replace({"layers.0.mixer.bias": False}))
    with pytest.raises(FusionTreeError, match=r"embedding\.multiplier: recurrent_gemma has 6\.9375 there, found 6\.9"):
        gemma.config_of(spec.replace({"embedding.multiplier": 48**0.5}))
    with pytest.raises(FusionTreeError, match="logits_soft_cap: expected a finite number above 0, found None"):
        gemma.config_of(spec.replace({"head.softcap": None}))
    spec = minimax.spec_of(MINIMAX)
    with pytest.raises(FusionTreeError, match=r"layers\.0\.mixer\.slopes: minimax has \[0\.39.*found \[0\.1, "):
        minimax.config_of(spec.replace({"layers.0.mixer.slopes": [0.1] * 6}))
    for change in ({"layers.0.ffn": spec.node("layers.1.ffn")}, {"layers.1.ffn": None}, {"layers.0.mixer": None}):
        with pytest.raises(FusionTreeError, match="layers: in minimax a mixer and experts take turns"):
            minimax.config_of(spec.replace(change))


@torch.no_grad()
@pytest.mark.parametrize("name", ["recurrent_gemma", "minimax"])
def test_files_of_transformers_are_read_and_ours_by_transformers(name, tmp_path):
    """The files of MiniMax have other names than its class, and its decays beside the weights."""
    both = pair(name)
    both.theirs.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", both.family)
    tokens = torch.arange(60).reshape(2, 30)
    wanted = both.theirs(tokens, use_cache=False).logits
    again = type(both.theirs).from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    for found in (ft.load(tmp_path / "ours")(tokens), again(tokens, use_cache=False).logits):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.abs().max())))
