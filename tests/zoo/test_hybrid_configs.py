"""Configs of Bamba, Granite and Nemotron-H: first conversions, and one line for what is not expressed."""

import pytest
from public import BAMBA, EXPERTS_OF_NEMOTRON_H, GRANITE, GRANITE_EXPERTS, NEMOTRON_H

from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of

CONFIGS = {
    **{"bamba": BAMBA, "granitemoehybrid": GRANITE_EXPERTS},
    "nemotron_h": NEMOTRON_H | EXPERTS_OF_NEMOTRON_H,
}


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("bamba", {"attn_layer_indices": 3}, "attn_layer_indices: expected a list of whole numbers, found 3"),
        ("bamba", {"attn_layer_indices": ["1"]}, "attn_layer_indices: expected a list of whole numbers, found ['1']"),
        ("bamba", {"mamba_d_head": 5}, "mamba_d_head: found 5, bamba is known with 'auto' or 8"),
        ("bamba", {"mamba_n_heads": 7}, "mamba_n_heads: 7 heads do not divide 96 features"),
        ("bamba", {"mamba_expand": 1.5}, "mamba_expand: expected a whole number of at least 1, found 1.5"),
        ("bamba", {"partial_rotary_factor": 1.0}, "partial_rotary_factor: found 1.0, bamba is known with 0.5"),
        (
            "bamba",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": "half"}},
            "rope_parameters.partial_rotary_factor: expected a number above 0, at most 1, found 'half'",
        ),
        ("bamba", {"num_hidden_layers": 10**12}, "10001 layers, at most 10000 are allowed"),
        ("bamba", {"sliding_window": 8}, "sliding_window: bamba is not known to have it, found 8"),
        ("granitemoehybrid", {"logits_scaling": 0}, "logits_scaling: expected a finite number above 0, found 0"),
        ("granitemoehybrid", {"logits_scaling": 10**400}, "logits_scaling: expected a finite number above 0, found 1"),
        ("granitemoehybrid", {"layer_types": "mamba"}, "layer_types: expected a list, found 'mamba'"),
        ("granitemoehybrid", {"layer_types": ["moe"] * 3}, "layer_types: granitemoehybrid knows no layer 'moe'"),
        ("granitemoehybrid", {"num_hidden_layers": 4}, "num_hidden_layers: found 4, granitemoehybrid is known with 3"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type: found 'alibi'"),
        ("granitemoehybrid", {"num_experts_per_tok": 9}, "top_k: found 9, there are 5 experts"),
        ("granitemoehybrid", {"residual_multiplier": "x"}, "residual.add: expected a number, found 'x'"),
        ("nemotron_h", {"layers_block_type": None}, "nemotron_h needs 'hybrid_override_pattern'"),
        ("nemotron_h", {"layers_block_type": ["conv"]}, "layers_block_type: nemotron_h knows no layer 'conv'"),
        ("nemotron_h", {"layers_block_type": [["mlp"]]}, "layers_block_type: nemotron_h knows no layer ['mlp']"),
        ("nemotron_h", {"moe_latent_size": 16}, "moe_latent_size: found 16, nemotron_h is known with None"),
        ("nemotron_h", {"n_group": 2}, "router.groups: 2 groups do not divide 5 experts"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act: found 'silu', nemotron_h is known with 'relu2'"),
        ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings: found True"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_does_not_fit_is_one_line(name, changes, line):
    with pytest.raises(FusionTreeError) as caught:
        family_of(name).spec_of(CONFIGS[name] | changes)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scaling", [0.3, 1.7, 3, 6, 7.5, 8.0, 13, 16, 1e-3, 123456.789])
def test_the_divisor_of_logits_comes_back(scaling):
    family = family_of("granitemoehybrid")
    spec = family.spec_of(GRANITE | {"logits_scaling": scaling})
    assert spec.head.multiplier == 1 / scaling
    assert family.config_of(spec)["logits_scaling"] == scaling


def test_words_of_first_conversions():
    granite, nemotron = family_of("granitemoehybrid"), family_of("nemotron_h")
    old = GRANITE | {"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "nope"}
    assert granite.spec_of(old) == granite.spec_of(GRANITE)
    letters = {"hybrid_override_pattern": "M-*-M", "layers_block_type": None, "num_hidden_layers": 5}
    assert nemotron.spec_of(NEMOTRON_H | letters) == nemotron.spec_of(NEMOTRON_H)


def test_what_a_family_cannot_express_names_the_node():
    nemotron = family_of("nemotron_h")
    spec = nemotron.spec_of(NEMOTRON_H)
    both = spec.replace({"layers.0.ffn": {"kind": "mlp", "activation": "relu2", "hidden": 80}})
    with pytest.raises(FusionTreeError, match=r"layers\.0: nemotron_h has one sub-layer in a layer, found two"):
        nemotron.config_of(both)
    with pytest.raises(FusionTreeError, match=r"layers\.0\.mixer\.dt_limit: nemotron_h has .*, found "):
        nemotron.config_of(spec.replace({"layers.0.mixer.dt_limit": [0.001, 0.1]}))
    granite = family_of("granitemoehybrid")
    routed = granite.spec_of(GRANITE_EXPERTS)
    with pytest.raises(FusionTreeError, match=r"layers\.1\.ffn\.router\.renormalise: granitemoehybrid has True there"):
        granite.config_of(routed.replace({"layers.1.ffn.router.renormalise": False}))
