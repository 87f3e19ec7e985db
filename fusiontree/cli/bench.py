"""The commands `bench ...`."""

from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from fusiontree.cli.console import AsJson, console, print_json, short

if TYPE_CHECKING:
    from fusiontree.bench.kernels import Form, Row, Settings

app = typer.Typer(no_args_is_help=True, help="Measure how fast things are on this machine.")


@app.command("kernels")
def bench_kernels(
    op: Annotated[list[str] | None, typer.Option(help="An operator; may be given again. All by default.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of the sequence; for attention_step, of each cache.")] = 4096,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; torch's choice by default.")] = None,
    train: Annotated[bool | None, typer.Option("--train/--forward", help="Only one of both.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="For how long each figure is measured.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Time every kernel backend that runs on this machine, compare with the machine's limits, and check its values."""
    from fusiontree import machine
    from fusiontree.bench import kernels, table

    forms, tasks = kernels.forms(op or ()), kernels.tasks(train)
    progress = Console(stderr=True, quiet=as_json)
    with _status(progress) as status:
        status.update("the machine's limits")
        settings = kernels.settings(tokens, dtype, device, threads=threads, tasks=tasks, seconds=seconds)
    about, rows = machine.about(settings.device), []
    if not as_json:
        _print_machine(about, settings)
    for _, some in groupby(forms, key=lambda form: form.case):
        rows += _measured(list(some), settings, progress)
        if not as_json:
            _print_case([row for row in rows if row.form.case == rows[-1].form.case], settings)
    if as_json:
        limits = dict(zip(("flops_per_second", "bytes_per_second"), settings.limits, strict=True))
        about |= {"limits": limits, "dtype": dtype, "tokens": tokens, "seconds": seconds}
        print_json({**about, "rows": [table.data(row) for row in rows]})
    else:
        console.print(f"\n{table.KEY}")
    if any(row.wrong or row.failures for row in rows):
        raise typer.Exit(1)


def _print_machine(about: dict[str, Any], settings: "Settings") -> None:
    load = "" if about["load"] is None else f"; load before this {about['load']:.1f} on {about['cpus']} CPUs"
    console.print(f"{about['device']}, threads: {about['threads']}, torch {about['torch']}{load}")
    flops, moved = settings.limits
    dtype = str(settings.dtype).removeprefix("torch.")
    console.print(f"limits: {short(flops)}FLOP/s in a {dtype} product, {short(moved)}B/s in a copy (read + written)")
    console.print(f"{dtype}, one row of {settings.tokens} tokens unless said otherwise")


def _status(progress: Console) -> Status:
    """A status line that redraws once a second, to disturb the timing little."""
    return progress.status("", refresh_per_second=1)


def _measured(forms: list["Form"], settings: "Settings", progress: Console) -> list["Row"]:
    """The rows of one case; progress goes to standard error."""
    from fusiontree.bench.kernels import measure_form

    rows = []
    with _status(progress) as status:
        for place, form in enumerate(forms, 1):
            status.update(f"{form.case}: {form.name} ({place} of {len(forms)})")
            rows.append(measure_form(form, settings))
    return rows


def _print_case(rows: list["Row"], settings: "Settings") -> None:
    from fusiontree.bench import table
    from fusiontree.bench.kernels import CASES

    case = rows[0].form.case
    console.print(f"\n{case}: {CASES[case].about(settings.tokens)}", style="bold")
    tasks = [task for task in settings.tasks if any(task in row.speeds for row in rows)]
    shown = Table(*table.headers(tasks), box=None, pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        if row.speeds:
            shown.add_row(*table.cells(row, tasks, settings.tokens), style="red" if row.wrong else "")
    if shown.rows:
        console.print(shown)
    for why, names in table.notes(rows, settings.tasks).items():
        console.print(f"{', '.join(names)}: {why}", style="dim")
