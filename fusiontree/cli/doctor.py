"""The command `doctor`."""

from collections.abc import Iterable
from typing import Any

from rich.table import Column, Table

from fusiontree.cli.console import AsJson, console, print_json, print_rows, short

Lines = tuple[tuple[str, str], ...]


def doctor(as_json: AsJson = False) -> None:
    """Report what is installed, which kernel backend serves each call here, and why the others do not."""
    from fusiontree.doctor import report

    data = report()
    if as_json:
        return print_json(data)
    print_rows("", [(name, text) for name, text in _facts(data).items()])
    print_rows("packages", _package_rows(data))
    _print_kernels(data["kernels"])
    print_rows("plugins", _plugin_rows(data))
    return None


def _facts(data: dict[str, Any]) -> dict[str, str]:
    device, free = data["device"], data["device"]["free_bytes"]
    units = device["matrix_units"]
    return {
        **data["versions"],
        "device": f"{device['type']}: {device['name']}",
        "free memory": "unknown" if free is None else f"{short(free)}B",
        "processor": device["processor"],
        "matrix units": "unknown" if units is None else ", ".join(units) or "none",
        "half precision": ", ".join(device["native_products"]) or "no units: products are made in float32",
        "cores, threads": f"{device['cores']}, {device['threads']}",
        "compiler": data["compiler"] or "none: nothing can be compiled on the CPU",
    }


def _package_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(name, entry["version"] or "not installed", entry["for"]) for name, entry in data["packages"].items()]


def _print_kernels(answers: list[dict[str, Any]]) -> None:
    """Print one block per operator and list of backends, titled with the calls that give this list."""
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
    """Group the calls of an operator that give the same list of backends and reasons."""
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
