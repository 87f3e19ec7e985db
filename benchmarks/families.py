"""Every family of the zoo here and in transformers: the same weights in one process, calls in turn.

    python benchmarks/families.py              # all
    python benchmarks/families.py jamba lfm2   # some
    python benchmarks/families.py --tasks decode

writes `benchmarks/results/<units>/family-NAME.json` for each (see `results`) and prints tokens a second and the ratio,
in bfloat16 or another type. Both sides run as they come, without `torch.compile`. Decoding is timed in pairs: its ratio
is the median over the pairs, with the interval that holds the true median 95 times in 100.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from layouts import LAYOUTS, SIZES
from peers import call, seconds
from results import machine, write

import fusiontree as ft
from fusiontree.zoo import family_of

TASKS = {"forward": 1024, "training": 1024, "decode": 256}
"""Tokens of a sequence, or of the prompt to decode after."""
STEPPING = {"mamba", "falcon_mamba", "jamba"}
"""Of Mamba-1, which transformers steps through in Python: a quarter of the tokens, or it would take minutes."""
TURNS = {"forward": 5, "training": 5, "decode": 20}
STEPS = 3
"""Of decoding, in one turn."""
LONGEST = 20.0
"""Seconds after which a task has no further turn, but for decoding."""
INTERVAL = (5, 14)
"""Of 20 ordered ratios those between which the median of all is, 95.9 times in 100 (from the binomial distribution)."""
SIDES = ("transformers", "fusiontree")


def models(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Both sides, with the weights of theirs."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **LAYOUTS[name])
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    family = family_of(name)
    ours = ft.build(family.spec_of(config.to_dict()), dtype=dtype)
    ours.load_state_dict(family.weights_of(config.to_dict(), theirs.state_dict()))
    return dict(zip(SIDES, (theirs, ours), strict=True))


def measure(sides: dict[str, Any], task: str, length: int) -> dict[str, float]:
    """Tokens a second of each side, the median over turns, after one that is not counted; and the ratio, that of
    decoding the median over pairs of turns with its interval."""
    tokens = torch.randint(0, SIZES["vocab_size"], (1, length))
    calls = {side: call(net.train(task == "training"), task, tokens) for side, net in sides.items()}
    times: dict[str, list[float]] = {side: [] for side in sides}
    start = time.perf_counter()
    for turn in range(TURNS[task] + 1):
        if task != "decode" and turn > 1 and time.perf_counter() - start > LONGEST:
            break
        for side in SIDES if turn % 2 else SIDES[::-1]:
            times[side].append(seconds(calls[side], STEPS if task == "decode" else 1))
    count = STEPS if task == "decode" else length
    found = {side: count / statistics.median(spent[1:]) for side, spent in times.items()}
    if task != "decode":
        return found | {"ratio": found["fusiontree"] / found["transformers"]}
    ratios = sorted(theirs / ours for theirs, ours in zip(*(times[side][1:] for side in SIDES), strict=True))
    low, high = (ratios[place] for place in INTERVAL)
    return found | {"ratio": statistics.median(ratios), "ratio_low": low, "ratio_high": high}


def one(name: str, threads: int, dtype: str, tasks: Sequence[str]) -> None:
    """Measure a family and write what was found."""
    torch.set_num_threads(threads)
    sides = models(name, getattr(torch, dtype))
    share = 4 if name in STEPPING else 1
    found = {task: measure(sides, task, TASKS[task] // share) for task in tasks}
    parameters = sum(parameter.numel() for parameter in sides["fusiontree"].parameters())
    about = machine() | {"transformers": transformers.__version__, "threads": threads, "dtype": dtype}
    write(
        f"family-{name}" + ("" if dtype == "bfloat16" else f"-{dtype}"),
        {"family": name, "parameters": parameters, "share": share, **about, "tasks": found},
    )
    cells = (f"{task} {row['fusiontree']:,.0f} ({_ratio(row)})" for task, row in found.items())
    print(f"{name:18} {parameters / 1e6:4.0f}M  {'   '.join(cells)}", flush=True)


def _ratio(row: dict[str, float]) -> str:
    interval = f", {row['ratio_low']:.2f} to {row['ratio_high']:.2f}" if "ratio_low" in row else ""
    return f"{row['ratio']:.2f}{interval}"


def main() -> None:
    """Each family in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(LAYOUTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in arguments.families or LAYOUTS:
        if name not in LAYOUTS:
            parser.error(f"no family is called {name!r}")
        if arguments.alone:
            one(name, arguments.threads, arguments.dtype, arguments.tasks)
        else:
            options = [f"--threads={arguments.threads}", f"--dtype={arguments.dtype}", "--tasks", *arguments.tasks]
            subprocess.run([sys.executable, __file__, name, "--alone", *options], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
