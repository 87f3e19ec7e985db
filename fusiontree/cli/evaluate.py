"""The command `eval`."""

import logging
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from fusiontree.cli.console import AsJson, Saved, console, print_json, print_rows
from fusiontree.errors import FusionTreeError


def evaluate(
    model: Saved,
    tasks: Annotated[
        list[str],
        typer.Option(help="A task's YAML file, a folder of them, or a name that lm-eval knows; again for more."),
    ],
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that run at once; results do not depend on it.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window; else what the model says, else 2048.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness on a saved model, byte models and imported ones alike."""
    try:
        from fusiontree.evaluation import harness
    except ImportError as error:
        missing = str(error.name).partition(".")[0]
        raise FusionTreeError(f"eval: {missing} is not installed; pip install 'fusiontree[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    options = {"batch_size": batch_size, "limit": limit, "max_length": max_length, "device": device}
    found = harness.evaluate(model, tasks, **options)
    if as_json:
        return print_json(found)
    for name, results in found["results"].items():
        console.print(f"{name}, {found['n-samples'][name]['effective']} documents", style="bold")
        print_rows("", list(_rows(results)))
    return None


def _rows(results: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Metrics with their standard errors; lm-eval writes both as `name,filter`."""
    for key, value in results.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        error = results.get(f"{name}_stderr,{kind}")
        spread = f"± {error:.4g}" if isinstance(error, float) else ""
        yield name, "" if kind == "none" else kind, f"{value:.6g}", spread
