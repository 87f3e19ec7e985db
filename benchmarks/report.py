"""Tables and the figure of `docs/performance.md`, from what is in `benchmarks/results/`.

python benchmarks/report.py
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from results import classes, read

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURE = DOCS / "performance.md", DOCS / "performance.svg"
TASKS = ("forward", "training", "prefill", "decode")
FAMILY_TASKS = ("forward", "training", "decode")
COLOURS = {"transformers": "#b0b0b0", "fusiontree": "#4c78a8", "fusiontree compiled": "#1b3a5c"}


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """In Markdown, all columns but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peers(units: str) -> list[dict[str, Any]]:
    """Results beside transformers, by task, window, length, batch and dtype."""
    found = (result for result in read(units, "peers-") if "transformers" in result["sides"])
    order = ("window", "tokens", "batch", "dtype")
    return sorted(found, key=lambda r: (TASKS.index(r["task"]), *(r[name] or 0 for name in order)))


def label(result: dict[str, Any]) -> str:
    """What was measured, in a few words."""
    after = "after" if result["task"] == "decode" else ""
    window = f", our window {result['window']}" if result["window"] else ""
    batch = f", batch {result['batch']}" if result["task"] == "decode" else ""
    dtype = f", {result['dtype']}"
    return f"{result['task']} {after} {result['tokens']:,} tokens{batch}{window}{dtype}".replace("  ", " ")


def peer_rows(units: str) -> Iterator[Sequence[str]]:
    """A line for each side of each result."""
    for result in peers(units):
        for side, row in result["sides"].items():
            spread = f"{row['slowest']:,.0f} to {row['fastest']:,.0f}"
            first = f"{row['first_call_seconds']:.1f}"
            cells = f"{row['tokens_per_second']:,.0f}", spread, f"{row['ratio']:.1f}", f"{row['peak_megabytes']:,.0f}"
            name, turns = (label(result), str(result["pairs"])) if side == "transformers" else ("", "")
            yield name, turns, side, *cells, first


def half_rows(units: str) -> Iterator[Sequence[str]]:
    """A line for each task: bfloat16 beside float32, and beside products left in bfloat16."""
    for result in read(units, "half-"):
        sides = result["sides"]
        wide, half, left = (sides[name] for name in ("float32", "bfloat16", "bfloat16 products"))
        speeds = (f"{side['tokens_per_second']:,.0f}" for side in (wide, half, left))
        peaks = (f"{side['peak_megabytes']:,.0f}" for side in (half, left))
        yield f"{result['task']} {result['tokens']:,} tokens", *speeds, f"{result['ratio']:.2f}", *peaks


def ratio(row: dict[str, float]) -> str:
    """With its interval where there is one."""
    interval = f" ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})" if "ratio_low" in row else ""
    return (f"{row['ratio']:.2f}" if interval else f"{row['ratio']:.1f}") + interval


def family_rows(units: str) -> Iterator[Sequence[str]]:
    """A line for each family: our tokens a second, and how many times transformers' they are, where measured."""
    for result in read(units, "family-"):
        rows = (result["tasks"].get(task) for task in FAMILY_TASKS)
        cells = (f"{row['fusiontree']:,.0f} | {ratio(row)}" if row else " | " for row in rows)
        name = f"`{result['family']}`" + (" (256 tokens)" if result["share"] > 1 else "")
        name += ", float32" if result.get("dtype") == "float32" else ""
        yield name, f"{result['parameters'] / 1e6:.0f}M", *cells


def operator_rows(units: str) -> Iterator[Sequence[str]]:
    """A line for each side of each operator."""
    for result in read(units, "ops-"):
        for place, (side, row) in enumerate(result["sides"].items()):
            spread = f"{row['slowest']:,.0f} to {row['fastest']:,.0f}"
            name = result["case"] if place == 0 else ""
            yield name, side, f"{row['tokens_per_second']:,.0f}", spread, f"{row['ratio']:.1f}"


def length_rows(units: str) -> Iterator[Sequence[str]]:
    """Our figures with a window, at several lengths."""
    windowed = [result for result in read(units, "peers-") if result["window"]]
    for result in sorted(windowed, key=lambda r: (TASKS.index(r["task"]), r["tokens"])):
        row = result["sides"]["fusiontree compiled"]
        spread = f"{row['slowest']:,.0f} to {row['fastest']:,.0f}"
        peak = f"{row['peak_megabytes']:,.0f}"
        yield label(result), str(result["pairs"]), f"{row['tokens_per_second']:,.0f}", spread, peak


def block_rows(units: str) -> Iterator[Sequence[str]]:
    """Shares of the time, and of the machine's limit."""
    for result in read(units, "block-"):
        window = f", window {result['window']}" if result["window"] else ""
        rate = result["flops"] / result["seconds"] / 1e9
        whole = f"{result['task']} {result['tokens']:,} tokens{window}, {result['dtype']}, {result['side']}"
        limit = f"{result['of_limit']:.0%} of {result['flops_per_second_of_products'] / 1e9:,.0f} GFLOP/s"
        yield whole, f"{result['seconds']:.2f}", f"{rate:,.0f} GFLOP/s, {limit}"
        for name, seconds in sorted(result["parts"].items(), key=lambda item: -item[1]):
            yield f"&emsp;{name}", f"{seconds:.2f}", f"{seconds / result['seconds']:.0%}"


PEERS = ("", "turns", "side", "tokens/s", "spread", "ratio", "peak MB", "first call, s")
LENGTHS = ("", "turns", "tokens/s", "spread", "peak MB")
FAMILIES = ["", "size", *(part for task in FAMILY_TASKS for part in (task, "ratio"))]
HALF = ("", "float32, tokens/s", "bfloat16", "products in bfloat16", "ratio to float32", "peak MB", "of products")
TABLES = {
    "peers": (PEERS, peer_rows),
    "half": (HALF, half_rows),
    "lengths": (LENGTHS, length_rows),
    "families": (FAMILIES, family_rows),
    "operators": (("", "side", "tokens/s", "spread", "ratio"), operator_rows),
    "block": (("", "seconds", "share"), block_rows),
}


def machines() -> str:
    """What all results were measured on."""
    found = {(u, r["processor"], r["threads"], r["torch"], r["date"]) for u in classes() for r in read(u, "")}
    lines = [f"{units}: {cpu}, {threads} threads, torch {torch}, {date}" for units, cpu, threads, torch, date in found]
    return "\n".join(f"- {line}" for line in sorted(lines))


def tables(name: str) -> str:
    """A table for each class of machines that has results."""
    head, rows = TABLES[name]
    found = {units: list(rows(units)) for units in classes()}
    return "\n\n".join(f"Units {units}:\n\n{table(head, iter(lines))}" for units, lines in found.items() if lines)


def filled(page: str) -> str:
    """The page with every section between its marks made anew."""
    sections = {"machine": machines(), **{name: tables(name) for name in TABLES}}
    for name, made in sections.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
        text = f"{marks[0]}\n{made}\n{marks[1]}"
        page = re.sub(pattern, lambda _, text=text: text, page, flags=re.DOTALL)
    return page


def draw() -> None:
    """How many times faster than its peer, whole models above, operators below, on the fastest class of machines that
    has figures of both."""
    units = next(units for units in classes() if peers(units) and read(units, "ops-"))
    figure, (whole, alone) = plt.subplots(2, 1, figsize=(8, 8), layout="constrained")
    bars(whole, {label(result): result["sides"] for result in peers(units)})
    ops = {result["case"]: result["sides"] for result in read(units, "ops-")}
    ours = {case: {side: row for side, row in sides.items() if side in COLOURS} for case, sides in ops.items()}
    bars(alone, ours)
    whole.set_title(f"Falcon-H1's layout, times transformers' tokens a second; units {units}", loc="left", fontsize=10)
    alone.set_title("operators alone, times their peer", loc="left", fontsize=10)
    whole.legend(frameon=False, fontsize=8)
    figure.savefig(FIGURE, metadata={"Date": None})


def bars(axes: Any, groups: dict[str, dict[str, Any]]) -> None:
    """A group of bars for each question, ours only, with their numbers."""
    sides = [side for side in COLOURS if side != "transformers"]
    for offset, side in zip((0.2, -0.2), sides, strict=True):
        known = [(place, found[side]["ratio"]) for place, found in enumerate(groups.values()) if side in found]
        places, ratios = [-place + offset for place, _ in known], [ratio for _, ratio in known]
        drawn = axes.barh(places, ratios, height=0.36, color=COLOURS[side], label=side)
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks([-place for place in range(len(groups))], list(groups), fontsize=8)
    axes.axvline(1, color=COLOURS["transformers"], linewidth=1)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw()
    print(f"{PAGE.name}, {FIGURE.name}")
