"""Scaled rotations in configs: both forms that transformers has had, and one line for what is not expressed."""

import pytest
from public import LLAMA3, SMALL, YARN, config_of

from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of

LLAMA, GEMMA3 = family_of("llama"), family_of("gemma3_text")


def spec(**options):
    return LLAMA.spec_of(SMALL | options)


@pytest.mark.parametrize(
    "scaling", [LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}], ids=lambda s: s["rope_type"]
)
def test_the_older_form_says_the_same(scaling):
    new = spec(rope_parameters={"rope_theta": 5e5, **scaling})
    assert new == spec(rope_theta=5e5, rope_scaling=scaling)
    older = {key: value for key, value in scaling.items() if key != "rope_type"} | {"type": scaling["rope_type"]}
    assert new == spec(rope_theta=5e5, rope_scaling=older)
    assert new.encodings["rope"].scaling.kind == scaling["rope_type"]


def test_the_older_form_of_gemma_says_the_same():
    config = config_of("gemma3_text, scaled, capped, biases").to_dict()
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    older |= {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8}}
    found = GEMMA3.spec_of(older)
    assert found == GEMMA3.spec_of(config)
    assert found.encodings["local_rope"].scaling is None


def test_an_original_length_that_is_left_out_is_the_longest():
    assert spec(max_position_embeddings=64, rope_scaling={"type": "yarn", "factor": 2.0}) == spec(
        rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    )


@pytest.mark.parametrize(
    ("parameters", "line"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'default' or 'linear' or 'llama3' or 'yarn'"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_parameters.rope_type: found 'longrope'"),
        ({"rope_type": "default", "factor": 2.0}, "rope_parameters.factor: llama is not known to have it"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor"),
        ({"rope_type": "linear"}, "encodings.rope.scaling.factor: is needed"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "encodings.rope.scaling.beta_fast: unknown key"),
        (LLAMA3 | {"high_freq_factor": 0.1}, "scaling.high_freq_factor: has to be above low_freq_factor (0.25)"),
        (YARN | {"beta_fast": 0.1}, "scaling.beta_fast: has to be at least beta_slow (1.0)"),
        (YARN | {"rope_theta": 1.0}, "encodings.rope.theta: has to be above 1 where there is scaling"),
    ],
    ids=str,
)
def test_what_is_not_expressed_is_one_line(parameters, line):
    with pytest.raises(FusionTreeError) as caught:
        spec(rope_parameters=parameters)
    assert line in str(caught.value)
