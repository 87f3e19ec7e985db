"""Computing in another type: what comes out is what a copy in that type gives, and the model is as it was."""

import pytest
import torch

import fusiontree as ft
from fusiontree.pruning.precision import computing_in

SPEC = ft.ModelSpec.parse(
    {
        "vocab_size": 11,
        "width": 16,
        "shared": {"block": {"kind": "swiglu", "hidden": 8}},
        "layers": [
            {"mixer": {"kind": "mamba2", "heads": 2, "head_dim": 4, "state": 4}, "ffn": {"kind": "use", "of": "block"}},
            {"mixer": {"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 4}},
        ],
    }
)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_is_a_copy_in_that_type(tied):
    model = ft.build(SPEC.replace({"head.tied": tied}), dtype=torch.bfloat16)
    tokens, before = torch.arange(11)[None], model.state_dict()
    with computing_in(model, torch.float64):
        cache = model.new_cache(1, 11)
        found = torch.cat([model(part, cache=cache) for part in tokens.split((7, 1, 1, 2), 1)], 1)
    copy = ft.build(model.spec, dtype=torch.float64)
    copy.load_state_dict(before)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, copy(tokens), rtol=0, atol=1e-12)
    assert model(tokens).dtype == torch.bfloat16
    assert all(tensor is model.get_parameter(name) for name, tensor in model.named_parameters())
    assert all(tensor.data_ptr() == before[name].data_ptr() for name, tensor in model.state_dict().items())


def test_what_fails_in_between_leaves_the_model_as_it_was():
    model = ft.build(SPEC)
    model.layers[0].mixer.x.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="planted"), computing_in(model, torch.float64):
        model(torch.arange(3)[None])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def _fail(*_):
    raise RuntimeError("planted")
