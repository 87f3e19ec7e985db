"""Configs of Mamba's families: a published one, and one line for each that is not expressed or contradicts itself."""

import pytest
import transformers
from public import JAMBA, MAMBA

import fusiontree as ft
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of

MAMBA_130M = {
    **{"architectures": ["MambaForCausalLM"], "model_type": "mamba", "torch_dtype": "float32", "use_cache": True},
    **{"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "vocab_size": 50280, "conv_kernel": 4},
    **{"expand": 2, "intermediate_size": 1536, "time_step_rank": 48, "hidden_act": "silu", "initializer_range": 0.1},
    **{"use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "residual_in_fp32": True},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "rescale_prenorm_residual": False},
    **{"time_step_floor": 1e-4, "time_step_max": 0.1, "time_step_min": 1e-3, "time_step_scale": 1.0},
    **{"time_step_init_scheme": "random", "d_inner": 1536, "d_model": 768, "n_layer": 24, "ssm_cfg": {}},
    **{"rms_norm": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8},
}
"""state-spaces/mamba-130m-hf."""


def test_a_published_config():
    family = family_of("mamba")
    spec = family.spec_of(MAMBA_130M)
    mixer = {"kind": "mamba1", "inner": 1536, "state": 16, "rank": 48}
    assert spec == ft.ModelSpec.parse(
        {"vocab_size": 50280, "width": 768, "layers": [{"repeat": 24, "layers": [{"mixer": mixer}]}]}
    )
    assert family.spec_of(family.config_of(spec)) == spec
    assert sum(p.numel() for p in ft.build(spec, device="meta").parameters()) == 129_135_360  # as transformers' own


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("mamba", {"d_model": 64}, "d_model: found 64, mamba is known with 48"),
        ("mamba", {"rms_norm": False}, "rms_norm: found False, mamba is known with True"),
        ("mamba", {"mixer_rms_eps": 1e-6}, "mixer_rms_eps: mamba is not known to have it"),
        ("mamba", {"time_step_rank": "some"}, "time_step_rank: expected a whole number of at least 1, found 'some'"),
        ("mamba", {"hidden_size": "48"}, "hidden_size: expected a whole number of at least 1, found '48'"),
        ("jamba", {"num_experts": 2, "num_experts_per_tok": 3}, "top_k: found 3, there are 2 experts"),
        ("jamba", {"num_experts": 0}, "num_experts: expected a whole number of at least 1, found 0"),
        ("jamba", {"expert_layer_period": 0}, "expert_layer_period: expected a whole number of at least 1, found 0"),
        ("jamba", {"attn_layer_period": 0}, "attn_layer_period: expected a whole number of at least 1, found 0"),
        ("jamba", {"num_attention_heads": 0}, "num_attention_heads: expected a whole number of at least 1, found 0"),
        ("jamba", {"sliding_window": 8}, "sliding_window: jamba is not known to have it, found 8"),
        ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms: found False"),
        ("jamba", {"num_hidden_layers": 10**12}, "10001 layers, at most 10000 are allowed"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_one_line(name, changes, line):
    config = {"mamba": MAMBA, "jamba": JAMBA}[name] | changes
    with pytest.raises(FusionTreeError) as caught:
        family_of(name).spec_of({key: value for key, value in config.items() if value is not ...})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("places", [(), (2,), (1, 4), (0, 1, 2, 3, 4)])
def test_attention_stands_where_a_period_puts_it(places):
    spec = jamba(places)
    config = family_of("jamba").config_of(spec)
    assert family_of("jamba").spec_of(config) == spec
    theirs = transformers.JambaConfig(**config)
    assert tuple(n for n, kind in enumerate(theirs.layers_block_type) if kind == "attention") == places


@pytest.mark.parametrize(("places", "found"), [((3, 4), 3), ((0, 2), 4), ((0, 1, 3), 2)])
def test_attention_elsewhere_names_the_layer(places, found):
    with pytest.raises(FusionTreeError, match=rf"layers\.{found}\.mixer: jamba has "):
        family_of("jamba").config_of(jamba(places))


def jamba(places):
    """Five layers, attention in these."""
    both = [family_of("jamba").spec_of(JAMBA).node(f"layers.{index}.mixer").data() for index in (0, 1)]
    plain = family_of("jamba").spec_of(JAMBA)
    return plain.replace({f"layers.{index}.mixer": both[index in places] for index in range(5)})


def test_a_width_of_its_own():
    narrow = family_of("mamba").spec_of(MAMBA).replace({"layers.*.mixer.inner": 50})
    assert transformers.MambaConfig(**family_of("mamba").config_of(narrow)).intermediate_size == 50
    with pytest.raises(FusionTreeError, match=r"layers: in jamba .* a multiple of the width 48 wide, found 50"):
        family_of("jamba").config_of(jamba(()).replace({"layers.*.mixer.inner": 50}))


def test_mamba_and_falcon_mamba_are_told_apart_by_the_norm():
    mamba = family_of("mamba").spec_of(MAMBA)
    with pytest.raises(FusionTreeError, match=r"layers\.0\.mixer\.norm: falcon_mamba has .* found nothing"):
        family_of("falcon_mamba").config_of(mamba)
    falcon = family_of("falcon_mamba").spec_of(MAMBA)
    with pytest.raises(FusionTreeError, match=r"layers\.0\.mixer\.norm: mamba has nothing there"):
        family_of("mamba").config_of(falcon)
