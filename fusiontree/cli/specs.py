"""The commands about specs: `kinds`, `validate`, `schema`, `show`."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fusiontree.cli.console import AsJson, Model, Overrides, console, print_json, short, spec_of
from fusiontree.errors import FusionTreeError, SpecError, suggest

if TYPE_CHECKING:
    from fusiontree.core.model.cost import Cost
    from fusiontree.core.model.spec import ModelSpec
    from fusiontree.core.spec.registry import Registry
    from fusiontree.training import RunSpec

Length = Annotated[int, typer.Option(help="Tokens of the sequence that FLOPs and cache bytes are for.", min=1)]


def kinds(
    kind: Annotated[str | None, typer.Argument(help="Show the fields of this kind.")] = None, as_json: AsJson = False
) -> None:
    """List every branch, fusion, gate, encoding and scaling, plugins included; or the fields of one kind."""
    if kind is not None:
        return _show_kind(kind, as_json)
    rows = [row for registry in _registries().values() for row in _kind_rows(registry)]
    if as_json:
        return print_json([dict(zip(("family", "kind", "from", "what"), row, strict=True)) for row in rows])
    table = Table("family", "kind", "from", "what", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return None


def _registries() -> "dict[str, Registry[Any]]":
    """The registries of the kinds in a model spec, by family."""
    from fusiontree.core.contracts.registries import REGISTRIES
    from fusiontree.encodings.rope_scaling import scalings

    return {**REGISTRIES, scalings.name: scalings}


def _show_kind(kind: str, as_json: bool) -> None:
    from fusiontree.reference import fields, summary

    homes = {name: registry for registry in _registries().values() for name in registry.names()}
    if kind not in homes:
        raise FusionTreeError(f"kinds: no kind is called {kind!r}{suggest(kind, homes)}")
    spec = homes[kind].get(kind)
    if as_json:
        return print_json([vars(field) for field in fields(spec)])
    console.print(summary(spec) + "\n")
    table = Table("field", "holds", "default", "what it is", box=None, pad_edge=False)
    for field in fields(spec):
        table.add_row(field.name, field.allowed, "needed" if field.default is None else field.default, field.meaning)
    console.print(table)
    return None


def _kind_rows(registry: "Registry[Any]") -> list[tuple[str, str, str, str]]:
    rows = []
    for kind in registry.names():
        try:
            spec = registry.get(kind)
            rows.append((registry.name, kind, spec.__module__, _summary(spec.__doc__ or "")))
        except FusionTreeError as error:
            rows.append((registry.name, kind, registry.plugins[kind].value, str(error)))
    return rows


def _summary(docstring: str) -> str:
    """The first sentence of a docstring."""
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def validate(
    model: Model,
    overrides: Overrides = None,
    run: Annotated[bool, typer.Option("--run", help="Check a run file, or a recipe by its name.")] = False,
) -> None:
    """Check a spec. Print its digest, or every problem on a line of its own."""
    try:
        spec = _run_of(model, overrides) if run else spec_of(model, overrides)
    except SpecError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        raise typer.Exit(2) from None
    console.print(f"valid, digest {spec.digest()}")


def _run_of(run: str, overrides: list[str] | None) -> "RunSpec":
    from fusiontree.recipes.train import load_run

    return load_run(run, overrides or [])


def schema(run: Annotated[bool, typer.Option("--run", help="That of a run file.")] = False) -> None:
    """Print the JSON Schema of a model spec or a run file, plugins included."""
    from fusiontree.core.model.spec import ModelSpec
    from fusiontree.training import RunSpec

    print_json((RunSpec if run else ModelSpec).model_json_schema())


def show(model: Model, overrides: Overrides = None, length: Length = 4096, as_json: AsJson = False) -> None:
    """Print a spec's tree with parameters, FLOPs per token and cache bytes of every node."""
    from fusiontree.core.model.cost import costs

    spec = spec_of(model, overrides)
    found = costs(spec, length=length)
    if as_json:
        data = {"digest": spec.digest(), "length": length, "nodes": [vars(cost) for cost in found]}
        return print_json(data)
    columns = [f"digest {spec.digest()}", "kind", "parameters", "FLOPs/token", f"cache at {length}"]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for label, cost in _tree_rows(spec, found):
        table.add_row(label, cost.kind, f"{cost.parameters:,}", short(cost.flops), f"{short(cost.cache_bytes)}B")
    console.print(table)
    return None


def _tree_rows(spec: "ModelSpec", found: "list[Cost]") -> "list[tuple[str, Cost]]":
    """The rows with indented labels. The first of several equal layers in a row stands for all of them."""
    runs = _runs(spec)
    rows = [(cost.path.split(".") if cost.path else ["model"], cost) for cost in found]
    kept = [(steps, cost) for steps, cost in rows if steps[0] != "layers" or int(steps[1]) in runs]
    return [(_label(steps, runs), cost) for steps, cost in kept]


def _runs(spec: "ModelSpec") -> dict[int, int]:
    """The last index, by first index, of every series of equal adjacent layers."""
    layers = spec.expanded_layers()
    firsts = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1]]
    nexts = [*firsts[1:], len(layers)]
    return {first: after - 1 for first, after in zip(firsts, nexts, strict=False)}


def _label(steps: list[str], runs: dict[int, int]) -> str:
    if steps[0] != "layers":
        return ".".join(steps)
    first, last = int(steps[1]), runs[int(steps[1])]
    if len(steps) == 2:
        return f"layers.{first}" + (f" to {last}" if last > first else "")
    named = [step for step in steps[2:] if step != "branches"]
    return "  " * len(named) + named[-1]
