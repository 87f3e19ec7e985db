"""The command line: parses, calls the library, prints. Exit codes: 0, 1 (the job failed), 2 (bad input, one line)."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Column, Table

import fusiontree
from fusiontree.core import yaml
from fusiontree.core.contracts import REGISTRIES
from fusiontree.core.cost import Cost, costs
from fusiontree.core.files import write_text
from fusiontree.core.model_spec import ModelSpec
from fusiontree.errors import FusionTreeError, suggest

if TYPE_CHECKING:
    from fusiontree.bench.kernels import Form, Row, Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
prune_app = typer.Typer(no_args_is_help=True, help="Edit a trained model's spec by what its gates say.")
app.add_typer(prune_app, name="prune")
bench_app = typer.Typer(no_args_is_help=True, help="Measure how fast things are on this machine.")
app.add_typer(bench_app, name="bench")
# what goes to a file or a pipe is not wrapped to a screen that is not there
console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 4096)
ClickException: Any = typer.BadParameter.__mro__[2]  # typer carries its own copy of click since 0.20

Model = Annotated[str, typer.Argument(help="A preset's name, a YAML or JSON file, or a saved model's directory.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="path=value, any number; paths are those of the expanded spec.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Lines = tuple[tuple[str, str], ...]
Length = Annotated[int, typer.Option(help="Tokens of the sequence that FLOPs and cache bytes are for.", min=1)]


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
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except FusionTreeError as error:
        code = _fail(str(error))
    except ClickException as error:
        code = _fail(error.format_message()) if error.format_message() else 2  # the help has been printed
    sys.exit(code if isinstance(code, int) else 0)


def _fail(text: str) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _spec(model: str, overrides: list[str] | None) -> ModelSpec:
    from fusiontree.zoo.presets import load_spec

    spec = load_spec(model)
    return spec.replace(yaml.assignments(overrides)) if overrides else spec


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1))


@app.command()
def kinds(
    kind: Annotated[str | None, typer.Argument(help="Show the fields of this kind.")] = None, as_json: AsJson = False
) -> None:
    """List every branch, fusion, gate and encoding, plugins included; or the fields of one."""
    if kind is not None:
        return _show_kind(kind, as_json)
    rows = [row for family in REGISTRIES for row in _kind_rows(family)]
    if as_json:
        return _print_json([dict(zip(("family", "kind", "from", "what"), row, strict=True)) for row in rows])
    table = Table("family", "kind", "from", "what", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return None


def _show_kind(kind: str, as_json: bool) -> None:
    from fusiontree.reference import fields, summary

    homes = {name: registry for registry in REGISTRIES.values() for name in registry.names()}
    if kind not in homes:
        raise FusionTreeError(f"kinds: no kind is called {kind!r}{suggest(kind, homes)}")
    spec = homes[kind].get(kind)
    if as_json:
        return _print_json([vars(field) for field in fields(spec)])
    console.print(summary(spec) + "\n")
    table = Table("field", "holds", "default", box=None, pad_edge=False)
    for field in fields(spec):
        table.add_row(field.name, field.allowed, "needed" if field.default is None else field.default)
    console.print(table)
    return None


def _kind_rows(family: str) -> list[tuple[str, str, str, str]]:
    registry = REGISTRIES[family]
    rows = []
    for kind in registry.names():
        try:
            spec = registry.get(kind)
            rows.append((family, kind, spec.__module__, _summary(spec.__doc__ or "")))
        except FusionTreeError as error:
            rows.append((family, kind, registry.plugins[kind].value, str(error)))
    return rows


def _summary(docstring: str) -> str:
    """The first sentence."""
    return " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


@app.command()
def validate(model: Model, overrides: Overrides = None) -> None:
    """Check a spec and print its digest."""
    console.print(f"valid, digest {_spec(model, overrides).digest()}")


@app.command()
def schema(run: Annotated[bool, typer.Option("--run", help="That of a run file.")] = False) -> None:
    """Print the JSON Schema of a model spec, plugins included."""
    from fusiontree.training import RunSpec

    _print_json((RunSpec if run else ModelSpec).model_json_schema())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, and which kernel backend serves what here, and why not the others."""
    from fusiontree.doctor import report

    data = report()
    if as_json:
        return _print_json(data)
    _print_rows("", [(name, text) for name, text in _facts(data).items()])
    _print_rows("packages", _package_rows(data))
    _print_kernels(data["kernels"])
    _print_rows("plugins", _plugin_rows(data))
    return None


def _print_rows(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """A table without headers, where there is something in it."""
    if not rows:
        return
    if title:
        console.print(f"\n{title}")
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _facts(data: dict[str, Any]) -> dict[str, str]:
    device, free = data["device"], data["device"]["free_bytes"]
    units = device["matrix_units"]
    return {
        **data["versions"],
        "device": f"{device['type']}: {device['name']}",
        "free memory": "unknown" if free is None else f"{_short(free)}B",
        "processor": device["processor"],
        "matrix units": "unknown" if units is None else ", ".join(units) or "none",
        "threads": str(device["threads"]),
        "compiler": data["compiler"] or "none: nothing can be compiled on the CPU",
    }


def _package_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(name, entry["version"] or "not installed", entry["for"]) for name, entry in data["packages"].items()]


def _print_kernels(answers: list[dict[str, Any]]) -> None:
    """A block for each operator and answer, under the calls that it is the answer to."""
    blocks: dict[str, list[tuple[str, str]]] = {}
    for (op, rows), calls in _same_answers(answers):
        blocks[f"{op}: {'; '.join(calls)}"] = list(rows)
    longest = max(len(names) for rows in blocks.values() for names, _ in rows)
    console.print("\nkernels: what serves each call here, and why the others do not")
    for title, rows in blocks.items():
        console.print(title)
        table = Table("", Column(width=min(longest, console.width // 2)), "", box=None, show_header=False)
        for row in rows:
            table.add_row("", *row)
        console.print(table)


def _same_answers(answers: list[dict[str, Any]]) -> Iterable[tuple[tuple[str, Lines], list[str]]]:
    """An operator and what is said of its backends, with all calls for which just that is said."""
    calls: dict[tuple[str, Lines], list[str]] = {}
    for row in answers:
        calls.setdefault((row["op"], _lines(row)), []).append(row["request"])
    return calls.items()


def _lines(row: dict[str, Any]) -> Lines:
    from fusiontree.bench.reasons import by_reason

    reasons = by_reason(row["others"]).items()
    return (row["picked"] or "nothing", "serves"), *((", ".join(names), why) for why, names in reasons)


def _plugin_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(row["family"], row["kind"], row["from"], row["state"]) for row in data["plugins"]]


@app.command()
def show(model: Model, overrides: Overrides = None, length: Length = 4096, as_json: AsJson = False) -> None:
    """Print a spec's tree with parameters, FLOPs per token and cache bytes of every node."""
    spec = _spec(model, overrides)
    found = costs(spec, length=length)
    if as_json:
        data = {"digest": spec.digest(), "length": length, "nodes": [vars(cost) for cost in found]}
        return _print_json(data)
    columns = [f"digest {spec.digest()}", "kind", "parameters", "FLOPs/token", f"cache at {length}"]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for label, cost in _tree_rows(spec, found):
        table.add_row(label, cost.kind, f"{cost.parameters:,}", _short(cost.flops), f"{_short(cost.cache_bytes)}B")
    console.print(table)
    return None


def _tree_rows(spec: ModelSpec, found: list[Cost]) -> list[tuple[str, Cost]]:
    """Rows with indented labels; of a run of equal layers the first stands for all."""
    runs = _runs(spec)
    rows = [(cost.path.split(".") if cost.path else ["model"], cost) for cost in found]
    kept = [(steps, cost) for steps, cost in rows if steps[0] != "layers" or int(steps[1]) in runs]
    return [(_label(steps, runs), cost) for steps, cost in kept]


def _runs(spec: ModelSpec) -> dict[int, int]:
    """The first and the last index of every run of equal layers."""
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


def _short(value: float) -> str:
    """A number with a unit prefix: 1536 is 1.54 k."""
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="A run file, or a recipe's name: quickstart, v1, v2, v3.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="path=value, any number.")] = None,
) -> None:
    """Train what a run file describes; the same command again resumes. For several processes use torchrun."""
    from fusiontree.recipes.train import main as train_main

    raise typer.Exit(train_main([str(run), *(overrides or [])]))


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="A saved model's directory.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely tokens with this mass.")] = None,
    seed: int = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End behind this text; may be given again.")] = None,
) -> None:
    """Continue a text, byte by byte, as it is drawn."""
    from fusiontree.core.generation import Sampling, stream
    from fusiontree.core.weights import load
    from fusiontree.data import ByteTokenizer

    tokenizer, loaded = ByteTokenizer(), load(model)
    if loaded.spec.vocab_size != tokenizer.vocab_size:
        found = f"{model}: its vocabulary has {loaded.spec.vocab_size} tokens"
        raise FusionTreeError(f"{found}; only byte vocabularies ({tokenizer.vocab_size}) can be read as text")
    text = tokenizer.encode(sys.stdin.buffer.read() if prompt == "-" else prompt)
    endings = [(tokenizer.end,), *(tokenizer.encode(ending).tolist() for ending in stop or [])]
    tokens, sampling = [text.tolist() or [tokenizer.end]], Sampling(temperature, top_k, top_p, seed)
    longest = loaded.spec.longest
    if longest is not None and len(tokens[0]) + max_new_tokens > longest:
        found = f"{len(tokens[0])} of the prompt and {max_new_tokens} new ones"
        raise FusionTreeError(f"--max-new-tokens: the encodings have {longest} positions, found {found}")
    steps = stream(loaded, tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop=endings)
    first = next(steps)  # what cannot be done is said before anything is written
    out = sys.stdout.buffer
    out.write(tokenizer.decode_bytes(text))
    for (token,) in chain([first], steps):
        if token is not None and token != tokenizer.end:
            out.write(bytes([token]))
        out.flush()
    out.write(b"\n")


@bench_app.command("kernels")
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
    """Time every kernel backend that serves here, next to the machine's limit, and check its values."""
    from fusiontree.bench import kernels, machine, table

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
        _print_json({**about, "rows": [table.data(row) for row in rows]})
    else:
        console.print(f"\n{table.KEY}")
    if any(row.wrong or row.failures for row in rows):
        raise typer.Exit(1)


def _print_machine(about: dict[str, Any], settings: "Settings") -> None:
    load = "" if about["load"] is None else f"; load before this {about['load']:.1f} on {about['cpus']} CPUs"
    console.print(f"{about['device']}, threads: {about['threads']}, torch {about['torch']}{load}")
    flops, moved = settings.limits
    dtype = str(settings.dtype).removeprefix("torch.")
    console.print(f"limits: {_short(flops)}FLOP/s in a {dtype} product, {_short(moved)}B/s in a copy (read + written)")
    console.print(f"{dtype}, one row of {settings.tokens} tokens unless said otherwise")


def _status(progress: Console) -> Status:
    """It redraws rarely, as it runs beside what is timed."""
    return progress.status("", refresh_per_second=1)


def _measured(forms: list["Form"], settings: "Settings", progress: Console) -> list["Row"]:
    """Rows of one case, while standard error says where it is."""
    from fusiontree.bench.kernels import measure_form

    rows = []
    with _status(progress) as status:
        for place, form in enumerate(forms, 1):
            status.update(f"{form.case}: {form.name} ({place} of {len(forms)})")
            rows.append(measure_form(form, settings))
    return rows


def _print_case(rows: list["Row"], settings: "Settings") -> None:
    from fusiontree.bench import table
    from fusiontree.bench.cases import CASES

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


Trained = Annotated[Path, typer.Argument(help="A saved model's directory.")]
PlanFile = Annotated[Path, typer.Argument(help="A plan file.")]
Out = Annotated[Path, typer.Argument(help="A directory to write.")]


@prune_app.command("plan")
def prune_plan(
    model: Trained,
    out: Annotated[Path, typer.Argument(help="The plan file to write.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of the policy as name=value.")] = None,
    gates: Annotated[Path | None, typer.Option(help="Gate statistics, gates.json of a training run.")] = None,
    policy: Annotated[
        str,
        typer.Option(help="threshold (options high, low, min_steps) or topk (count)."),
    ] = "threshold",
    drop: Annotated[
        list[str] | None, typer.Option(help="Drop this path; no policy is asked. May be given again.")
    ] = None,
) -> None:
    """Decide which branches go, and write that down."""
    from fusiontree import pruning
    from fusiontree.zoo.presets import load_spec

    spec = load_spec(model)
    if drop and (gates or options):
        raise FusionTreeError("prune plan: --drop names the branches itself; leave out --gates and options of policies")
    if drop:
        made = pruning.plan_by_hand(spec, drop)
    elif gates:
        rule = pruning.policies.get(policy).parse({"kind": policy, **yaml.assignments(options or [])})
        made = pruning.plan(spec, pruning.Evidence.from_file(gates), rule)
    else:
        raise FusionTreeError("prune plan: needs --gates FILE, or --drop PATH")
    _write(out, made.to_json())
    for decision in made.decisions:
        mark = "drop" if decision.drop else "keep"
        console.print(f"{mark}  {decision.path}  mean {decision.mean:.3f}  {decision.reason}")
    console.print(f"{len(made.drops)} to drop, written to {out}")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise FusionTreeError(f"{path}: cannot be written: {error.strerror or error}") from None


@prune_app.command("diff")
def prune_diff(model: Trained, plan: PlanFile, as_json: AsJson = False) -> None:
    """Show what a plan changes in the spec, and what that saves; nothing is written."""
    from fusiontree import pruning
    from fusiontree.zoo.presets import load_spec

    spec = load_spec(model)
    edited = pruning.Plan.from_file(plan).edit(spec)
    changes, saved = spec.diff(edited), _savings(spec, edited)
    if as_json:
        return _print_json({"changes": changes, "saved": saved})
    for path, (here, there) in changes.items():
        if there is None:
            console.print(f"- {path}: {_brief(here)}", style="red")
        else:
            console.print(f"~ {path}: {_brief(here)} -> {_brief(there)}", style="yellow")
    for name, (before, after) in saved.items():
        console.print(f"{name}: {before:,.0f} -> {after:,.0f} ({(after - before) / max(before, 1):+.1%})")
    return None


def _brief(value: Any) -> Any:
    """A part of a spec on one line, without what is switched off."""
    if not isinstance(value, Mapping):
        return value
    said = {name: part for name, part in value.items() if part is not None and part is not False and part != []}
    return " ".join([str(said.pop("kind", "")), *(f"{name}={_brief(part)}" for name, part in said.items())]).strip()


def _savings(spec: ModelSpec, edited: ModelSpec) -> dict[str, tuple[float, float]]:
    here, there = (costs(each, length=4096)[0] for each in (spec, edited))
    names = {"parameters": "parameters", "FLOPs per token": "flops", "cache bytes at 4096": "cache_bytes"}
    return {label: (getattr(here, name), getattr(there, name)) for label, name in names.items()}


@prune_app.command("apply")
def prune_apply(model: Trained, plan: PlanFile, out: Out) -> None:
    """Write the pruned model, after checking it against the original."""
    from fusiontree import pruning
    from fusiontree.core.weights import load, save

    if out.resolve() == model.resolve():
        raise FusionTreeError(f"prune apply: {out} is the original itself; choose another directory")
    original, made = load(model), pruning.Plan.from_file(plan)
    smaller = pruning.apply(original, made)
    console.print(pruning.verify(original, smaller, made).text)
    save(smaller, out)
    console.print(f"written to {out}")


@prune_app.command("verify")
def prune_verify(
    model: Trained, pruned: Annotated[Path, typer.Argument(help="The pruned model's directory.")], plan: PlanFile
) -> None:
    """Check that a pruned model is the original with the plan's parts silent."""
    from fusiontree import pruning
    from fusiontree.core.weights import load

    verdict = pruning.verify(load(model), load(pruned), pruning.Plan.from_file(plan))
    console.print(verdict.text)


@prune_app.command("simplify")
def prune_simplify(model: Trained, out: Out) -> None:
    """Write the model without fusions and layers that do nothing, and the map of the paths that changed."""
    from fusiontree import pruning
    from fusiontree.core.weights import load, save

    simple, moved = pruning.simplify(load(model))
    save(simple, out)
    _write(out / "paths.json", json.dumps(moved, indent=1) + "\n")
    kept = pruning.still_needed(simple.spec)
    if kept:
        console.print(f"single branches whose fusion still acts on them (norm, projection, rule): {', '.join(kept)}")
    console.print(f"{len(moved)} paths moved (paths.json), written to {out}")


if __name__ == "__main__":
    main()
