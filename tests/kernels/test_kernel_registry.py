from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from fusiontree.kernels import OPS, Choice, Op, UnsupportedError, use_backend
from fusiontree.kernels.attention import attention
from fusiontree.kernels.registry import UnsupportedError as Documented
from fusiontree.kernels.ssd import ssd


class Call(NamedTuple):
    request: str = "cpu"


@pytest.fixture
def op() -> Iterator[Op[Call]]:
    op: Op[Call] = Op("test_op")
    yield op
    del OPS["test_op"]


def add(op: Op[Call], name: str, priority: int, refusal: str | None = None) -> list[str]:
    """Register a backend that returns its name; the requests it was asked about."""
    asked: list[str] = []

    def supports(request: str) -> str | None:
        asked.append(request)
        return refusal

    op.backend(name, priority=priority, supports=supports)(lambda call: name)
    return asked


def test_auto_takes_the_best_that_serves_and_remembers(op: Op[Call]) -> None:
    asked = add(op, "slow", 1)
    add(op, "fast", 2)
    add(op, "fastest", 3, refusal="not on Mondays")
    assert [op(Call()), op(Call()), op(Call("cuda"))] == ["fast", "fast", "fast"]
    assert asked == ["cpu", "cuda"]


def test_a_later_backend_is_considered(op: Op[Call]) -> None:
    add(op, "slow", 1)
    assert op(Call()) == "slow"
    add(op, "fast", 2)
    assert op(Call()) == "fast"


def test_explain_lists_all_with_reasons(op: Op[Call]) -> None:
    add(op, "slow", 1)
    add(op, "fast", 2)
    add(op, "fastest", 3, refusal="not on Mondays")
    assert op.explain("cpu") == [
        Choice("fastest", False, "not on Mondays"),
        Choice("fast", True, None),
        Choice("slow", False, None),
    ]


def test_a_named_backend_serves_or_raises(op: Op[Call]) -> None:
    add(op, "slow", 1)
    add(op, "fast", 2, refusal="not on Mondays")
    assert op(Call(), "slow") == "slow"
    with pytest.raises(UnsupportedError, match="test_op backend 'fast' cannot serve this call: not on Mondays"):
        op(Call(), "fast")
    with pytest.raises(
        UnsupportedError, match=r"test_op backend: unknown 'slo', did you mean 'slow'\? \(known: fast, slow\)"
    ):
        op(Call(), "slo")


def test_nothing_serves(op: Op[Call]) -> None:
    add(op, "fast", 2, refusal="not on Mondays")
    with pytest.raises(UnsupportedError, match=r"no backend serves this call \(fast: not on Mondays\)"):
        op(Call())


def test_use_backend_replaces_auto_only_and_only_inside(op: Op[Call]) -> None:
    add(op, "slow", 1)
    add(op, "fast", 2)
    with use_backend({"test_op": "slow"}):
        assert [op(Call()), op(Call(), "fast")] == ["slow", "fast"]
        with use_backend({"test_op": "auto"}):
            assert op(Call()) == "fast"
        assert op(Call()) == "slow"
    assert op(Call()) == "fast"


def test_use_backend_knows_the_names(op: Op[Call]) -> None:
    with (
        pytest.raises(UnsupportedError, match="kernel: unknown 'sdd', did you mean 'ssd'"),
        use_backend({"sdd": "x"}),
    ):
        pass
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(UnsupportedError, match="ssd backend: unknown 'chunk', did you mean 'chunked'"):
        ssd(one, one[0], one[0, 0, 0], one, one, backend="chunk")
    assert issubclass(Documented, ValueError)


def test_use_backend_reaches_the_operators() -> None:
    q = torch.ones(1, 4, 2, 8)
    with use_backend({"attention": "sdpa"}), pytest.raises(UnsupportedError, match="a window"):
        attention(q, q, q, window=2, scale=1.0)
    assert attention(q, q, q, scale=1.0).shape == q.shape
