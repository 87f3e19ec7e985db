"""Products in half precision where the processor has no units for it: the same numbers, and nothing that grows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fusiontree import build, load_spec, machine, products
from fusiontree.kernels.attention import attention
from fusiontree.kernels.ssd import ssd

ROUNDING = 2**-8
"""The most that rounding to bfloat16 once changes a number by."""


@pytest.fixture(params=["no units", "units"])
def units(request, monkeypatch):
    """A processor without units for bfloat16, and one with."""
    monkeypatch.setattr(machine, "multiplies", lambda dtype: request.param == "units" or dtype not in products.HALF)
    return request.param == "units"


@pytest.fixture
def no_units(monkeypatch):
    monkeypatch.setattr(machine, "multiplies", lambda dtype: dtype not in products.HALF)


def drawn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def error(found, wanted):
    return float((found.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-300))


def exact(function, *inputs):
    """A function's value and gradients in float64, for a gradient of ones that alternate in sign."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    return run(function, *leaves)


def run(function, *leaves):
    y = function(*leaves)
    signs = torch.ones_like(y).flatten()
    signs[::2] = -1
    return [y, *torch.autograd.grad(y, leaves, signs.view_as(y))]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 7, 5), (3, 7, 5), (4, 7, 5), (5, 1, 1), (37, 130, 1030)])
def test_linear_is_torchs_up_to_one_rounding(units, rows, inputs, outputs, biased):
    leaves = [drawn(2, rows, inputs), drawn(outputs, inputs, seed=1)] + biased * [drawn(outputs, seed=2)]
    for found, wanted in zip(run(products.linear, *leaves), exact(F.linear, *leaves), strict=True):
        assert found.dtype == torch.bfloat16
        assert error(found, wanted) < ROUNDING


def test_blocks_of_rows_and_of_outputs_sum_up(no_units, monkeypatch):
    monkeypatch.setattr(products, "SIDE", 5)
    leaves = [drawn(3, 9, 8), drawn(13, 8, seed=1), drawn(13, seed=2)]
    for found, wanted in zip(run(products.linear, *leaves), exact(F.linear, *leaves), strict=True):
        assert error(found, wanted) < ROUNDING


def test_no_block_is_large(no_units, monkeypatch):
    """Neither a second copy of the weights, nor one of the inputs, nor a whole product in float32."""
    sizes, whole = [], products.BLOCK
    original = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: sizes.append(self.numel()) or original(self))
    run(products.linear, drawn(3000, 1200), drawn(2100, 1200, seed=1))
    assert max(sizes) <= whole < 3000 * 1200


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 4))
def test_any_shape(batch, inputs, outputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "multiplies", lambda dtype: dtype not in products.HALF)
        x, weight = drawn(*batch, inputs), drawn(outputs, inputs, seed=1)
        found = run(products.linear, x, weight)
        for one, wanted in zip(found, exact(F.linear, x, weight), strict=True):
            assert one.shape == wanted.shape
            torch.testing.assert_close(one.double(), wanted, atol=0.1, rtol=0.02)


def test_only_gradients_that_are_wanted_are_made(no_units):
    x, weight = drawn(6, 3), drawn(2, 3, seed=1)
    products.linear(x.detach(), weight).sum().backward()
    assert weight.grad is not None and x.grad is None
    products.linear(x, weight.detach()).sum().backward()
    assert x.grad is not None


def test_under_autocast_the_result_has_its_dtype_and_the_weights_stay(units):
    x, weight = drawn(6, 3, dtype=torch.float32), drawn(2, 3, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = products.linear(x, weight)
        assert y.dtype == torch.bfloat16
        products.linear(y.repeat(1, 2)[:, :3], weight).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    torch.testing.assert_close(y, F.linear(x, weight).bfloat16(), atol=0.02, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x.double(), weight.double()).dtype == torch.float64


def test_batched_is_baddbmm(units):
    leaves = [drawn(3, 6, 4), drawn(3, 4, 5, seed=1), drawn(3, 5, seed=2)]
    wanted = exact(lambda x, weight, bias: torch.baddbmm(bias[:, None], x, weight), *leaves)
    for found, one in zip(run(products.batched, *leaves), wanted, strict=True):
        assert error(found, one) < ROUNDING


def test_float32_and_float64_are_torchs_bit_by_bit(no_units):
    for dtype in (torch.float32, torch.float64):
        x, weight, bias = drawn(9, 5, dtype=dtype), drawn(4, 5, seed=1, dtype=dtype), drawn(4, seed=2, dtype=dtype)
        assert torch.equal(products.linear(x, weight, bias), F.linear(x, weight, bias))


def test_operators_are_within_the_bounds_of_bfloat16(units):
    """Values and gradients of scans and attention; `tests/kernels` has the bounds."""
    B, C, A = drawn(2, 70, 1, 6, seed=1), drawn(2, 70, 1, 6, seed=2), -torch.rand(2)
    dt = torch.rand(2, 70, 2)
    scan = lambda x, B, C: ssd(x, dt.to(torch.promote_types(x.dtype, torch.float32)), A.to(x.dtype), B, C)[0]  # noqa: E731
    heads = [drawn(2, 140, 2, 8), drawn(2, 140, 1, 8, seed=1), drawn(2, 140, 1, 8, seed=2)]
    attend = lambda q, k, v: attention(q, k, v, scale=0.3, window=9)  # noqa: E731
    for function, leaves in ((scan, [drawn(2, 70, 2, 4), B, C]), (attend, heads)):
        for found, wanted in zip(run(function, *leaves), exact(function, *leaves), strict=True):
            assert error(found, wanted) < 8e-3


def test_a_model_is_as_precise_as_with_units(monkeypatch):
    """Loss and gradients, beside those of the same weights in float64."""
    spec = load_spec("quickstart").replace({"layers.*.mixer.branches.attention.window": 16})
    tokens = torch.arange(60).view(2, 30)

    def gradients(model):
        loss = model.cross_entropy(tokens[:, :-1], tokens[:, 1:])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    model = build(spec, dtype=torch.bfloat16)
    wanted, errors = gradients(copy.deepcopy(model).double()), {}
    for native in (True, False):
        monkeypatch.setattr(machine, "multiplies", lambda dtype, native=native: native or dtype not in products.HALF)
        errors[native] = error(gradients(model), wanted)
    assert errors[False] < 1.1 * errors[True] < 0.1


def test_exports_and_pickles_stay_portable(no_units):
    """A program exported here has torch's own products, for other machines."""
    module = nn.Sequential(nn.Identity())
    module.forward = lambda x, weight: products.linear(x, weight)  # type: ignore[method-assign]
    graph = torch.export.export(module, (drawn(6, 3).detach(), drawn(2, 3).detach())).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["aten.linear.default"]


@pytest.mark.parametrize("rows", [1, 3, 4, 20])
@pytest.mark.parametrize("mixed", ["weight", "bias"])
def test_what_torch_refuses_together_is_refused_at_every_length(units, rows, mixed):
    parts = {"x": drawn(rows, 8), "weight": drawn(6, 8), "bias": drawn(6)}
    parts[mixed] = parts[mixed].detach().float()
    with pytest.raises(RuntimeError, match="dtype"):
        products.linear(**parts)


def test_autocast_leaves_float64_to_torch(units):
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="dtype"):
        products.linear(drawn(8, 8), drawn(6, 8).double())


def test_gradients_of_gradients_and_transformed_functions_are_torchs(units):
    x, weight, bias = drawn(9, 8), drawn(6, 8, seed=1), drawn(6, seed=2)

    def twice(linear):
        loss = linear(x, weight, bias).square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.sum(), (x, weight, bias))

    for one, other in zip(twice(products.linear), twice(F.linear), strict=True):
        assert one.dtype == torch.bfloat16
        assert error(one, other.double()) < 4 * ROUNDING
    many = torch.func.vmap(lambda row: products.linear(row, weight.detach()))(x.detach()[None])
    assert error(many[0], F.linear(x.double(), weight.double())) < ROUNDING
