"""The command line: parses, calls the library, prints. Exit codes: 0, 1 (the job failed), 2 (bad input, one line).

This module assembles the commands; each module of `cli` holds the commands of one subject.
"""

import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

import fusiontree
from fusiontree.cli import bench, prune
from fusiontree.cli.doctor import doctor
from fusiontree.cli.evaluate import evaluate
from fusiontree.cli.exchange import export, import_
from fusiontree.cli.runs import generate, train
from fusiontree.cli.specs import kinds, schema, show, validate
from fusiontree.errors import FusionTreeError
from fusiontree.machine import prepare

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for command in (kinds, validate, schema, doctor, show, train, generate, export):
    app.command()(command)
app.command("import")(import_)
app.command("eval")(evaluate)
app.add_typer(prune.app, name="prune")
app.add_typer(bench.app, name="bench")
ClickException: Any = typer.BadParameter.__mro__[2]  # typer carries its own copy of click since 0.20


def _print_version(asked: bool) -> None:
    if asked:
        print(fusiontree.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Hybrid language models from a spec."""


def main() -> None:
    """Run the command line."""
    prepare()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except FusionTreeError as error:
        code = _fail(str(error))
    except ClickException as error:
        code = _fail(error.format_message()) if error.format_message() else 2  # the help has been printed
    except OSError as error:
        code = _fail(f"{error.filename or 'standard output'}: {error.strerror or error}", 1)
        with suppress(OSError):
            sys.stdout.close()  # otherwise Python flushes again as it exits
    sys.exit(code if isinstance(code, int) else 0)


def _fail(text: str, code: int = 2) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
