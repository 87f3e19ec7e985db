"""Falcon-H1's layout here and in transformers, with the same weights: tokens a second and peak memory.

Each figure is a process of its own; ours and theirs take turns, so that a busy neighbour hits both.

    python benchmarks/peers.py --task forward --tokens 4096 --pairs 5

writes `benchmarks/results/peers-<task>-<tokens>-<window>.json` and prints medians, the spread, and the ratio.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fusiontree as ft
from fusiontree.zoo import falcon_h1

RESULTS = Path(__file__).parent / "results"
SIDES = ("transformers", "fusiontree", "fusiontree compiled")
LAYOUT: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "mamba_d_ssm": 1024,
    "mamba_n_heads": 16,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 128,
    "max_position_embeddings": 2**20,
}
CALLS = 3
MEGABYTE = 1024  # of the kilobytes in which Linux counts


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE


def model(side: str, window: int | None) -> nn.Module:
    """The model of one side, in bfloat16; theirs has no window."""
    options: dict[str, Any] = LAYOUT | {"use_cache": False}
    config = transformers.FalconH1Config(**options)
    torch.manual_seed(0)
    if side == "transformers":
        theirs: Any = transformers.FalconH1ForCausalLM(config)
        return theirs.to(torch.bfloat16)
    spec = falcon_h1.spec_of(config.to_dict())
    if window is not None:
        spec = spec.replace({"layers.*.mixer.branches.attention.window": window})
    ours = ft.build(spec, dtype=torch.bfloat16)
    if side == "fusiontree compiled":
        ours.compile()
    return ours


def call(net: nn.Module, task: str, tokens: Tensor) -> Callable[[], None]:
    """One forward pass, or one with its backward."""

    def logits() -> Tensor:
        found = net(tokens)
        return found if isinstance(found, Tensor) else found.logits

    def forward() -> None:
        with torch.no_grad():
            logits()

    def training() -> None:
        nn.functional.cross_entropy(logits()[0].float(), tokens[0]).backward()
        net.zero_grad(set_to_none=True)

    return {"forward": forward, "training": training}[task]


def measure(side: str, task: str, length: int, window: int | None) -> dict[str, float]:
    """Tokens a second (the median of some calls, after one that is not counted), and memory beyond the imports."""
    torch.set_num_threads(2)
    before = peak_megabytes()
    net = model(side, window).train(task == "training")
    run = call(net, task, torch.randint(0, LAYOUT["vocab_size"], (1, length)))
    times = []
    for _ in range(CALLS + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {
        "tokens_per_second": length / statistics.median(times[1:]),
        "first_call_seconds": times[0],
        "peak_megabytes": peak_megabytes() - before,
    }


def apart(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    options = [f"--task={arguments.task}", f"--tokens={arguments.tokens}"]
    options += [] if arguments.window is None else [f"--window={arguments.window}"]
    command = [sys.executable, __file__, "--side", side, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    """What the machine calls its processor, and what it multiplies with."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if platform.system() == "Linux" else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f") if unit in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.processor())} ({', '.join(units)})"


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and extremes of each side, and how many times faster than transformers it is, pair by pair."""
    found: dict[str, Any] = {}
    for side, results in runs.items():
        speeds = [result["tokens_per_second"] for result in results]
        theirs = [result["tokens_per_second"] for result in runs["transformers"]]
        found[side] = {
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "peak_megabytes": statistics.median(result["peak_megabytes"] for result in results),
            "first_call_seconds": results[0]["first_call_seconds"],
            "ratio": statistics.median(a / b for a, b in zip(speeds, theirs, strict=True)),
        }
    return found


def main() -> None:
    """Take turns, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["forward", "training"], default="forward")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, help="of our attention; theirs has none")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.task, arguments.tokens, arguments.window)))
        return
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for pair in range(arguments.pairs):
        for side in SIDES:
            runs[side].append(apart(side, arguments))
            print(f"{pair + 1}/{arguments.pairs} {side}: {runs[side][-1]['tokens_per_second']:.0f}", file=sys.stderr)
    found = summary(runs)
    about = {
        "task": arguments.task,
        "tokens": arguments.tokens,
        "window": arguments.window,
        "threads": 2,
        "pairs": arguments.pairs,
        "processor": processor(),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"peers-{arguments.task}-{arguments.tokens}-{arguments.window or 'all'}.json"
    file.write_text(json.dumps(about | {"sides": found}, indent=2) + "\n", encoding="utf-8")
    print(f"{arguments.task}, {arguments.tokens} tokens, {about['processor']}, {about['date']}")
    print(f"{'':20} {'tokens/s':>9} {'spread':>15} {'ratio':>6} {'peak MB':>8}")
    for side, row in found.items():
        spread = f"{row['slowest']:.0f} to {row['fastest']:.0f}"
        print(
            f"{side:20} {row['tokens_per_second']:9.0f} {spread:>15} {row['ratio']:6.1f} {row['peak_megabytes']:8.0f}"
        )


if __name__ == "__main__":
    main()
