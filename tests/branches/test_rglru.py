"""RG-LRU where what is kept is next to everything, or nothing."""

import pytest
import torch

import fusiontree as ft

UNIT = {"kind": "rglru", "heads": 2, "head_dim": 4}
SPEC = {"vocab_size": 11, "width": 8, "layers": [{"mixer": UNIT}]}
TOKENS = torch.arange(20)[None] % 11


@pytest.mark.parametrize("value", [-1e4, -30.0, 30.0, 1e4])
def test_decays_of_one_and_of_zero_can_be_learned(value):
    model = ft.build(ft.ModelSpec.model_validate(SPEC))
    with torch.no_grad():
        model.get_parameter("layers.0.mixer.Lambda").fill_(value)
    model(TOKENS).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_decays_start_slow():
    model = ft.build(ft.ModelSpec.model_validate(SPEC | {"layers": [{"mixer": UNIT | {"head_dim": 500}}]}))
    decays = torch.exp(-torch.nn.functional.softplus(model.get_parameter("layers.0.mixer.Lambda").detach()))
    assert 0.9 <= float(decays.min()) < 0.91
    assert 0.99 < float(decays.max()) <= 0.999
    assert abs(float(decays.square().mean()) - (0.9**2 + 0.999**2) / 2) < 0.01  # uniform in the square
