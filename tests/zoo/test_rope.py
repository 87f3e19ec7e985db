"""Scaled rotations in configs: one line for what is not expressed."""

import pytest
from public import LLAMA3, SMALL, YARN

from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of

LLAMA = family_of("llama")


def spec(**options):
    return LLAMA.spec_of(SMALL | options)


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
