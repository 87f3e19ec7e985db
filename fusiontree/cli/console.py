"""The parts that all commands share: the console, common arguments, and functions to print and write.

Command modules import torch only inside functions, so that help, version and completion do not load it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fusiontree.errors import FusionTreeError
from fusiontree.files import write_text

if TYPE_CHECKING:
    from fusiontree.core.model.spec import ModelSpec

# output to a file or a pipe is not wrapped, because it has no screen width
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 4096)

Model = Annotated[str, typer.Argument(help="A preset's name, a YAML or JSON file, or a saved model's directory.")]
Saved = Annotated[Path, typer.Argument(help="A saved model's directory.")]
Out = Annotated[Path, typer.Argument(help="A directory to write.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="path=value, any number; paths are those of the expanded spec.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def spec_of(model: str, overrides: list[str] | None) -> "ModelSpec":
    """Load the spec that a command names, and apply its edits."""
    from fusiontree.core.spec import yaml
    from fusiontree.zoo.presets import load_spec

    spec = load_spec(model)
    return spec.replace(yaml.assignments(overrides)) if overrides else spec


def print_json(data: Any) -> None:
    """Print data as JSON, for programs."""
    print(json.dumps(data, indent=1))


def print_rows(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table without headers; nothing if there are no rows."""
    if not rows:
        return
    if title:
        console.print(f"\n{title}")
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def short(value: float) -> str:
    """A number with a unit prefix: 1536 is 1.54 k."""
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"


def write_file(path: Path, text: str) -> None:
    """Write a file and the directories above it.

    Raises:
        FusionTreeError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise FusionTreeError(f"{path}: cannot be written: {error.strerror or error}") from None
