"""What was measured, as text for a table and as plain data."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fusiontree.bench.kernels import FORWARD, TRAINING, Row, Speed
from fusiontree.bench.reasons import by_reason

TITLES = {FORWARD: "forward", TRAINING: "forward+backward"}
KEY = (
    "* what auto picks. +-: half the distance between the quartiles of the repeats. limit: the least time that the "
    "FLOPs of the operator's definition, or its inputs and outputs through memory, take at this machine's rates, "
    "over the time taken; more than 100 % is work from a cache. error: the largest, over the largest value of the "
    "float64 reference."
)


def headers(tasks: Sequence[str]) -> list[str]:
    """Of the columns."""
    return ["backend", *(title for task in tasks for title in (f"{TITLES[task]}\ntokens/s", "\nlimit")), "\nerror"]


def cells(row: Row, tasks: Sequence[str], asked: int) -> list[str]:
    """One line of the table; `asked` are the tokens that most rows are timed on."""
    name = row.form.name if row.tokens == asked else f"{row.form.name}, {row.tokens} tokens"
    speeds = [row.speeds.get(task) for task in tasks]
    figures = [text for speed in speeds for text in _figures(speed)]
    error = "" if row.error is None else f"{row.error:.1e}{' wrong' if row.wrong else ''}"
    return [name, *figures, error]


def _figures(speed: Speed | None) -> tuple[str, str]:
    if speed is None:
        return "-  ", "-"
    mark = "*" if speed.picked else " "
    return f"{speed.tokens_per_second:,.0f} +-{speed.spread:.0%} {mark}", percent(speed.share_of_limit)


def percent(share: float) -> str:
    """Two digits where there are no more before the point.

    >>> percent(0.123), percent(0.0123), percent(0.0001)
    ('12 %', '1.2 %', '<0.1 %')
    """
    if share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def notes(rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, list[str]]:
    """Why some rows lack figures: the names that share a reason. Reasons of one task only begin with it."""
    found: dict[str, list[str]] = {}
    for reasons in (_reasons(row, tasks) for row in rows):
        for name, why in reasons:
            found.setdefault(why, []).append(name)
    return found


def _reasons(row: Row, tasks: Sequence[str]) -> list[tuple[str, str]]:
    failed = {task: f"failed: {why}" for task, why in row.failures.items()}
    shared = by_reason({TITLES[task]: why for task, why in (row.refusals | failed).items()})
    everywhere = len(row.refusals) + len(failed) == len(tasks)
    return [
        (row.form.name, why if everywhere and len(shared) == 1 else f"no {', no '.join(titles)}: {why}")
        for why, titles in shared.items()
    ]


def data(row: Row) -> dict[str, Any]:
    """Plain data; `share_of_limit`, `spread` and `error` are fractions."""
    return {
        "case": row.form.case,
        "op": row.op,
        "backend": row.form.backend,
        "compiled": row.form.compiled,
        "tokens": row.tokens,
        **{task: asdict(speed) for task, speed in row.speeds.items()},
        "refusals": row.refusals,
        "failures": row.failures,
        "error": row.error,
        "wrong": row.wrong,
    }
