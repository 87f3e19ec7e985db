"""The commands `prune ...`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusiontree.cli.console import AsJson, Out, Saved, console, print_json, write_file
from fusiontree.errors import FusionTreeError

if TYPE_CHECKING:
    from fusiontree.core.model.spec import ModelSpec

app = typer.Typer(no_args_is_help=True, help="Edit a trained model's spec by what its gates say.")

PlanFile = Annotated[Path, typer.Argument(help="A plan file.")]


@app.command("plan")
def prune_plan(
    model: Saved,
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
    """Decide which branches to drop, and write the plan."""
    from fusiontree import pruning
    from fusiontree.core.spec import yaml
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
    write_file(out, made.to_json())
    for decision in made.decisions:
        mark = "drop" if decision.drop else "keep"
        console.print(f"{mark}  {decision.path}  mean {decision.mean:.3f}  {decision.reason}")
    console.print(f"{len(made.drops)} to drop, written to {out}")


@app.command("diff")
def prune_diff(model: Saved, plan: PlanFile, as_json: AsJson = False) -> None:
    """Show the changes of a plan to the spec, and the savings; nothing is written."""
    from fusiontree import pruning
    from fusiontree.zoo.presets import load_spec

    spec = load_spec(model)
    edited = pruning.Plan.from_file(plan).edit(spec)
    changes, saved = spec.diff(edited), _savings(spec, edited)
    if as_json:
        return print_json({"changes": changes, "saved": saved})
    for path, (here, there) in changes.items():
        if there is None:
            console.print(f"- {path}: {_brief(here)}", style="red")
        else:
            console.print(f"~ {path}: {_brief(here)} -> {_brief(there)}", style="yellow")
    for name, (before, after) in saved.items():
        console.print(f"{name}: {before:,.0f} -> {after:,.0f} ({(after - before) / max(before, 1):+.1%})")
    return None


def _brief(value: Any) -> Any:
    """A part of a spec on one line, without fields that are null, false or empty."""
    if not isinstance(value, Mapping):
        return value
    said = {name: part for name, part in value.items() if part is not None and part is not False and part != []}
    return " ".join([str(said.pop("kind", "")), *(f"{name}={_brief(part)}" for name, part in said.items())]).strip()


def _savings(spec: "ModelSpec", edited: "ModelSpec") -> dict[str, tuple[float, float]]:
    from fusiontree.core.model.cost import costs

    here, there = (costs(each, length=4096)[0] for each in (spec, edited))
    names = {"parameters": "parameters", "FLOPs per token": "flops", "cache bytes at 4096": "cache_bytes"}
    return {label: (getattr(here, name), getattr(there, name)) for label, name in names.items()}


@app.command("apply")
def prune_apply(model: Saved, plan: PlanFile, out: Out) -> None:
    """Write the pruned model, after checking it against the original."""
    from fusiontree import pruning
    from fusiontree.core.model.weights import load, save
    from fusiontree.data.tokenizer_files import tokenizer_files

    if out.resolve() == model.resolve():
        raise FusionTreeError(f"prune apply: {out} is the original itself; choose another directory")
    original, made = load(model), pruning.Plan.from_file(plan)
    smaller = pruning.apply(original, made)
    console.print(pruning.verify(original, smaller, made).text)
    save(smaller, out, beside=tokenizer_files(model))
    console.print(f"written to {out}")


@app.command("verify")
def prune_verify(
    model: Saved, pruned: Annotated[Path, typer.Argument(help="The pruned model's directory.")], plan: PlanFile
) -> None:
    """Check that a pruned model computes the same as the original with the plan's parts silenced."""
    from fusiontree import pruning
    from fusiontree.core.model.weights import load

    verdict = pruning.verify(load(model), load(pruned), pruning.Plan.from_file(plan))
    console.print(verdict.text)


@app.command("simplify")
def prune_simplify(model: Saved, out: Out) -> None:
    """Write the model without fusions and layers that do nothing, and a map of the changed paths."""
    from fusiontree import pruning
    from fusiontree.core.model.weights import load, save
    from fusiontree.data.tokenizer_files import tokenizer_files

    simple, moved = pruning.simplify(load(model))
    save(simple, out, beside=tokenizer_files(model))
    write_file(out / "paths.json", json.dumps(moved, indent=1) + "\n")
    kept = pruning.still_needed(simple.spec)
    if kept:
        console.print(f"single branches whose fusion still acts on them (norm, projection, rule): {', '.join(kept)}")
    console.print(f"{len(moved)} paths moved (paths.json), written to {out}")
