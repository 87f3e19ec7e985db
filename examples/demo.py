"""The main job on real text, from a spec to a pruned model in use: what `make demo` runs.

Every step is a command that can be typed, or a few lines of the library; all files are left in outputs/quickstart.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

import fusiontree as ft
from fusiontree.data import ByteTokenizer
from fusiontree.evaluation.byte_models import byte_models
from fusiontree.evaluation.decode import measure_decode
from fusiontree.evaluation.gate_map import draw, gate_maps
from fusiontree.pruning import Evidence, PruneError, Threshold, plan
from fusiontree.recipes.train import load_run

OUT = Path("outputs/quickstart")
RUN = "quickstart"
PROMPT = "def test_"
DROPS = 2
console = Console(highlight=False, markup=False)


def main() -> None:
    """Run all steps."""
    start = time.monotonic()
    for title, step in STEPS.items():
        console.print(Rule(title, align="left", style="cyan"))
        step()
        console.print()
    console.print(f"{time.monotonic() - start:.0f} seconds on {torch.get_num_threads()} threads; files in {OUT}:")
    for file in sorted(path for path in OUT.iterdir() if path.name != "train.log"):
        console.print(f"  {file}")


def command(*arguments: str) -> None:
    """Show a command of the command line and run it; the demo ends where it fails."""
    console.print("$ fusiontree " + " ".join(arguments), style="bold")
    code = subprocess.run([sys.executable, "-m", "fusiontree.cli", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def describe() -> None:
    """The spec, and what it costs."""
    console.print(ft.load_spec("quickstart").to_yaml())
    command("show", "quickstart", "--length", "512")


def train() -> None:
    """Train on the standard library; the same command again resumes."""
    command("train", RUN, f"output={OUT}")


def compare() -> None:
    """Held-out bits per byte beside models that cost nothing."""
    data = load_run(RUN).text
    baselines = byte_models(data.corpus("train"), data.corpus("held_out"))
    lines = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
    ours = [line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line][-1]
    others = {name.replace("_", " "): value for name, value in asdict(baselines).items()}
    table = Table("held-out standard library", "bits per byte", box=None, pad_edge=False)
    for name, value in [*others.items(), ("quickstart", ours)]:
        table.add_row(name, f"{value:.3f}", style="bold green" if name == "quickstart" else None)
    console.print(table)
    best = min(others, key=lambda name: others[name])
    if ours >= others[best]:
        sys.exit(f"error: quickstart does not beat {best}")
    console.print(f"{1 - ours / others[best]:.0%} below the best of the others ({best})")


def gates() -> None:
    """What the gates did, as a table and as a figure."""
    evidence = Evidence.from_file(OUT / "gates.json")
    table = Table("gate", "branch", "mean", "std", "entropy", "saturated", "0 to 1", box=None, pad_edge=False)
    for path, branches in evidence.gates.items():
        for name, seen in branches.items():
            numbers = [f"{value:.3f}" for value in (seen.mean, seen.std, seen.entropy, seen.saturated)]
            table.add_row(path, name, *numbers, spark(seen.histogram))
    console.print(table)
    text = held_out_text(112)
    tokens = torch.from_numpy(ByteTokenizer().encode(text).astype("int64"))
    draw(gate_maps(ft.load(OUT / "model"), tokens), text, OUT / "gates.png", title="Gates along a held-out text")
    console.print(f"drawn in {OUT / 'gates.png'}")


def spark(histogram: tuple[float, ...]) -> str:
    """A histogram as a line of blocks, two bins a block."""
    pairs = [sum(pair) for pair in zip(histogram[::2], histogram[1::2], strict=True)]
    top = max(pairs) or 1.0
    return "".join("\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"[min(int(8 * share / top), 7)] for share in pairs)


def held_out_text(length: int) -> str:
    """The beginning of the first function of a held-out file, in ASCII."""
    for document in load_run(RUN).text.documents("held_out"):
        start = document.text.find(b"\ndef ") + 1
        text = document.text[start : start + length]
        if start and len(text) == length and text.isascii():
            return text.decode()
    return PROMPT.ljust(length)


def prune() -> None:
    """From gate statistics to a plan, a diff, and an exact smaller model."""
    spec, evidence = ft.load_spec(OUT / "model"), Evidence.from_file(OUT / "gates.json")
    try:
        found = len(plan(spec, evidence, Threshold()).drops)
        console.print(
            f"policy threshold (0.8 / 0.2, the origin's) would drop {found} of {2 * len(evidence.gates)} branches"
        )
    except PruneError as error:
        console.print(str(error))
    model, file, pruned = str(OUT / "model"), str(OUT / "plan.json"), str(OUT / "pruned")
    gates_file = str(OUT / "gates.json")
    command("prune", "plan", model, file, f"count={DROPS}", "--policy", "topk", "--gates", gates_file)
    command("prune", "diff", model, file)
    command("prune", "apply", model, file, pruned)
    command("prune", "verify", model, pruned, file)


def use() -> None:
    """Speed and memory before and after, and a sample."""
    table = Table("decoding one sequence of 512", "tokens/s", "cache bytes", box=None, pad_edge=False)
    for name in ("model", "pruned"):
        found = measure_decode(ft.load(OUT / name), prompt=384, steps=128)
        table.add_row(name, f"{found.tokens_per_second:.0f}", f"{found.cache_bytes:,}")
    console.print(table)
    command("generate", str(OUT / "model"), PROMPT, "--max-new-tokens", "300", "--temperature", "0.7", "--seed", "1")


STEPS = {
    "1. A model, described": describe,
    "2. Trained by torchtitan on Python's standard library": train,
    "3. Against byte models": compare,
    "4. What the gates did": gates,
    "5. Pruned by an edit of the spec": prune,
    "6. In use": use,
}

if __name__ == "__main__":
    main()
