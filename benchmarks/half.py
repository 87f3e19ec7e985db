"""bfloat16 beside float32 on this machine, and what widening its products costs in memory.

    python benchmarks/half.py --task training --tokens 2048

A model in float32, one in bfloat16, and one in bfloat16 whose products are left in bfloat16, each in a process of its
own and in turns. The layout is that of `peers.py`. Where the processor multiplies bfloat16 natively the last two are
the same. Writes `benchmarks/results/<units>/half-<task>-<tokens>.json` (see `results`).
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import peers
import torch
from results import machine, write

import fusiontree.machine

SIDES = {"float32": "float32", "bfloat16": "bfloat16", "bfloat16 products": "bfloat16"}
CALLS = 3


def measure(side: str, task: str, tokens: int, threads: int) -> dict[str, float]:
    """Tokens a second (the best of some calls; one where products are slow), and memory beyond the imports, at the
    end of the first call."""
    torch.set_num_threads(threads)
    if side == "bfloat16 products":
        fusiontree.machine.multiplies = lambda dtype: True
    before = peers.peak_megabytes()
    net = peers.model("fusiontree", None, getattr(torch, SIDES[side])).train(task == "training")
    run = peers.call(net, task, torch.randint(0, peers.LAYOUT["vocab_size"], (1, tokens)))
    times = [peers.seconds(run)]
    peak = peers.peak_megabytes() - before
    times += [peers.seconds(run) for _ in range(0 if side == "bfloat16 products" else CALLS)]
    return {"tokens_per_second": tokens / min(times), "peak_megabytes": peak}


def apart(side: str, task: str, tokens: int, threads: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--task", task, f"--tokens={tokens}", f"--threads={threads}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Take turns, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["forward", "training", "prefill"], default="forward")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setting = arguments.task, arguments.tokens, arguments.threads
    if arguments.side:
        print(json.dumps(measure(arguments.side, *setting)))
        return
    turns = [[apart(side, *setting) for side in ("float32", "bfloat16")] for _ in range(arguments.pairs)]
    ratio = statistics.median(half["tokens_per_second"] / wide["tokens_per_second"] for wide, half in turns)
    runs = {"float32": [wide for wide, _ in turns], "bfloat16": [half for _, half in turns]}
    runs["bfloat16 products"] = [apart("bfloat16 products", *setting)]
    sides: dict[str, Any] = {
        side: {key: statistics.median(run[key] for run in found) for key in found[0]} for side, found in runs.items()
    }
    about = {"task": setting[0], "tokens": setting[1], "threads": setting[2], "pairs": arguments.pairs, **machine()}
    write(f"half-{setting[0]}-{setting[1]}", about | {"sides": sides, "ratio": ratio})
    print(f"{setting[0]}, {setting[1]} tokens, {about['processor']}, {about['date']}")
    for side, row in sides.items():
        print(f"{side:20} {row['tokens_per_second']:9.0f} tokens/s {row['peak_megabytes']:8.0f} MB")
    print(f"bfloat16 has {ratio:.2f} times the tokens a second of float32")


if __name__ == "__main__":
    main()
