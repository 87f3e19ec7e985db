"""Every operator keeps every law; the laws find what is planted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusiontree.errors import FusionTreeError
from fusiontree.kernels import OPS
from fusiontree.kernels.common import chunks, tiling
from fusiontree.kernels.common.tiling import TilingLimits
from fusiontree.kernels.gated_delta import GATED_DELTA
from fusiontree.kernels.linear_recurrence import LINEAR_RECURRENCE
from fusiontree.kernels.linear_recurrence.cases import LinearRecurrenceCase
from fusiontree.kernels.registry import Backend, serves_all
from fusiontree.kernels.selective_scan import SELECTIVE_SCAN
from fusiontree.testing import OP_LAWS, OperatorBroken, check_op
from fusiontree.testing.operators import ROWS

LAWS = {law.name: law for law in OP_LAWS}
DECODED = {"attention_step"}
"""Operators of one token, which tests/kernels/test_step_kernels.py compares with those of sequences."""


NOT_TRIED = {("attention", "steps")}


def test_every_operator_has_examples() -> None:
    assert {name for name, op in OPS.items() if not op.examples} == DECODED
    with pytest.raises(FusionTreeError, match="attention_step has no examples"):
        check_op(OPS["attention_step"])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("op", sorted(OPS.keys() - DECODED))
def test_laws_hold(op: str, law: str) -> None:
    assert check_op(OPS[op], laws=(LAWS[law],)) == ([] if (op, law) in NOT_TRIED else [law])


def test_an_unknown_backend_is_no_backend_that_is_right() -> None:
    with pytest.raises(FusionTreeError, match="did you mean 'two_level'"):
        check_op(LINEAR_RECURRENCE, backends=("two_levels",))


def limits(entries: int) -> dict[str, TilingLimits]:
    """Other limits than the usual ones, which make one block of everything that is tested."""
    return {
        "many blocks of one chunk": TilingLimits(32 * entries, whole=512, chunk=64),
        "two rows at once": TilingLimits(2 * 40 * entries, whole=64, chunk=64),
        "chunks side by side": TilingLimits(6 * 40 * entries, whole=8, chunk=5),
    }


TILED = [law for law in OP_LAWS if law.name not in ("steps", "compiles", "flops")]


@pytest.mark.parametrize("cut", limits(1))
@pytest.mark.parametrize(("op", "entries"), [(SELECTIVE_SCAN, 20), (LINEAR_RECURRENCE, 7)], ids=["scan", "linear"])
def test_laws_hold_however_time_is_cut(op: Any, entries: int, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiling.LIMITS, "cpu", limits(entries)[cut])
    assert check_op(op, laws=tuple(TILED), backends=("two_level",)) == [law.name for law in TILED]


def test_laws_hold_where_a_step_has_not_the_whole_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "DECAYS_A_STEP", 2 * ROWS * 4 * chunks.CHUNK**2)
    assert check_op(GATED_DELTA, laws=tuple(TILED), backends=("chunked",)) == [law.name for law in TILED]


Change = Callable[[Any], Any]


def wrong_results(change: Callable[[Any, Any], Any]) -> Change:
    """A backend that changes the right results."""
    return lambda inputs: change(inputs, LINEAR_RECURRENCE(inputs, "reference"))


def wrong_inputs(**changes: Callable[[Any], Any]) -> Change:
    """A backend that is right about other arguments."""
    return lambda inputs: LINEAR_RECURRENCE(
        inputs._replace(**{name: change(inputs) for name, change in changes.items()}), "reference"
    )


def _not_at_edges(inputs: Any) -> Any:
    """Without the documents that start at multiples of 64."""
    if inputs.segments is None or inputs.segments.shape[1] < 100:
        return inputs.segments
    begins = inputs.segments.diff(dim=1, prepend=inputs.segments[:, :1])
    begins[:, 64::64] = 0
    return torch.where(inputs.segments < 0, inputs.segments, inputs.segments[:, :1] + begins.clamp(min=0).cumsum(1))


def _leaks(inputs: Any, results: Any) -> Any:
    y, end = results
    return y + 1e-20 * inputs.x.detach()[:, :1], end


def _one_row_at_least(inputs: Any, results: Any) -> Any:
    return tuple(result if len(result) else result.new_zeros(1, *result.shape[1:]) for result in results)


def _with_documents(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return wrong_inputs(segments=lambda inputs: None if inputs.segments is None else change(inputs.segments))


def _coarse(inputs: Any, results: Any) -> Any:
    y, end = results
    return (y * (1 + 1 / 64), end) if y.dtype == torch.bfloat16 else results


PLANTED: dict[str, tuple[str, Change]] = {
    "values": ("agrees", wrong_results(lambda inputs, results: (results[0] * (1 + 1e-7), results[1]))),
    "narrow states": ("agrees", wrong_results(lambda inputs, results: (results[0], results[1].to(inputs.x.dtype)))),
    "coarse in bfloat16": ("agrees", wrong_results(_coarse)),
    "no gradient of a": ("gradcheck", wrong_inputs(a=lambda inputs: inputs.a.detach())),
    "no documents": ("alone", _with_documents(lambda segments: segments.clamp(max=0))),
    "no documents at edges": ("edges", wrong_inputs(segments=_not_at_edges)),
    "a little of the one before": ("forgets", wrong_results(_leaks)),
    "no initial state": ("split", wrong_inputs(initial_state=lambda inputs: None)),
    "padding joins": ("padding", _with_documents(lambda segments: segments.cummax(1).values.clamp(min=0))),
    "no rows": ("rows", wrong_results(_one_row_at_least)),
}


@pytest.mark.parametrize("defect", PLANTED)
def test_planted_defects_are_found(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    law, run = PLANTED[defect]
    monkeypatch.setitem(LINEAR_RECURRENCE.backends, "planted", Backend("planted", run, -1, serves_all))
    with pytest.raises(OperatorBroken, match=f"^{law}: .*\n  broken: planted"):
        check_op(LINEAR_RECURRENCE, laws=(LAWS[law],), backends=("planted",))


def test_a_wrong_step_and_wrong_flops_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearRecurrenceCase.step
    monkeypatch.setattr(LinearRecurrenceCase, "step", lambda self, state, *rest: right(self, state.clone(), *rest))
    monkeypatch.setattr(LinearRecurrenceCase, "flops", lambda self, tokens: 1.0 * tokens)
    for law in ("steps", "flops"):
        with pytest.raises(OperatorBroken, match=f"^{law}: "):
            check_op(LINEAR_RECURRENCE, laws=(LAWS[law],))


def test_a_broken_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(inputs: Any) -> Any:
        torch._dynamo.graph_break()
        return LINEAR_RECURRENCE(inputs, "reference")

    monkeypatch.setitem(LINEAR_RECURRENCE.backends, "planted", Backend("planted", run, 99, serves_all))
    with pytest.raises(Exception, match="graph_break"):
        check_op(LINEAR_RECURRENCE, laws=(LAWS["compiles"],))
