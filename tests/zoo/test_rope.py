"""Scaled rotations in configs: the frequencies of real sizes, and one line for what is not expressed."""

import pytest
import torch
import transformers
from public import LLAMA3, SMALL, YARN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of

LLAMA = family_of("llama")


def spec(**options):
    return LLAMA.spec_of(SMALL | options)


REAL = {
    "Llama 3.1": LLAMA3
    | {"rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "Qwen 2.5": YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32768},
    "DeepSeek-V2": YARN
    | {"rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
    | {"beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 1.0},
}


@pytest.mark.parametrize("name", REAL)
def test_frequencies_of_real_sizes(name):
    config = SMALL | {"head_dim": 128, "rope_parameters": dict(REAL[name])}
    theirs = transformers.AutoConfig.for_model("llama", **config)
    wanted, magnitude = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs)
    rope = LLAMA.spec_of(theirs.to_dict()).encodings["rope"]
    found = rope.scaling.scaled(rope.theta ** (-torch.arange(64, dtype=torch.float64) / 64), rope.theta)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=0)
    assert rope.scaling.magnitude == pytest.approx(magnitude)
    assert 0.0 < float(rope.scaling.kept(found, rope.theta).mean()) < 1.0


@pytest.mark.parametrize(
    ("parameters", "line"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'default' or 'linear' or 'llama3' or 'yarn'"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_parameters.rope_type: found 'longrope'"),
        ({"rope_type": "default", "factor": 2.0}, "rope_parameters.factor: llama is not known to have it"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor"),
        ({"rope_type": "linear"}, "encodings.rope.scaling.factor: is needed"),
        (
            {"rope_type": "linear", "factor": 2.0, "beta_fast": 3},
            "rope_parameters.beta_fast: llama is not known to have it with",
        ),
        (
            LLAMA3 | {"high_freq_factor": 0.1},
            "scaling.high_freq_factor: expected a number above low_freq_factor (0.25)",
        ),
        (YARN | {"beta_fast": 0.1}, "scaling.beta_fast: expected at least beta_slow (1.0)"),
        (YARN | {"rope_theta": 1.0}, "encodings.rope.theta: expected a number above 1 where there is scaling"),
    ],
    ids=str,
)
def test_what_is_not_expressed_is_one_line(parameters, line):
    with pytest.raises(FusionTreeError) as caught:
        spec(rope_parameters=parameters)
    assert line in str(caught.value)
