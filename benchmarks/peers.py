"""Falcon-H1's layout here and in transformers, with the same weights: tokens a second and peak memory.

Each figure is a process of its own; ours and theirs take turns, so that a busy neighbour hits both.

    python benchmarks/peers.py --task forward --tokens 4096 --pairs 5

writes `benchmarks/results/<units>/peers-forward-4096-all-batch1.json` (see `results`) and prints medians, the spread,
and the ratio.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import transformers
from results import machine, write
from torch import Tensor, nn

import fusiontree as ft
from fusiontree.zoo import family_of

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
LONG = 2**15
"""Tokens of a sequence of which one call is enough: transformers takes minutes for it."""
STEPS = 64
MEGABYTE = 1024  # of the kilobytes in which Linux counts


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    task: str
    tokens: int
    batch: int
    window: int | None
    threads: int
    dtype: str

    @property
    def name(self) -> str:
        """Of the results' file."""
        parts = [self.task, self.tokens, self.window or "all", f"batch{self.batch}"]
        return "-".join(map(str, [*parts, self.dtype] if self.dtype != "bfloat16" else parts))

    def words(self) -> list[str]:
        """For a command line."""
        return [f"--{name}={value}" for name, value in vars(self).items() if value is not None]


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE


def model(side: str, window: int | None, dtype: torch.dtype) -> nn.Module:
    """The model of one side; theirs has no window."""
    options: dict[str, Any] = LAYOUT | {"use_cache": False}
    config = transformers.FalconH1Config(**options)
    torch.manual_seed(0)
    if side == "transformers":
        theirs: Any = transformers.FalconH1ForCausalLM(config)
        return theirs.to(dtype)
    spec = family_of("falcon_h1").spec_of(config.to_dict())
    if window is not None:
        spec = spec.replace({"layers.*.mixer.branches.attention.window": window})
    ours = ft.build(spec, dtype=dtype)
    if side == "fusiontree compiled":
        ours.compile()
    return ours


def call(net: nn.Module, task: str, tokens: Tensor) -> Callable[[], None]:
    """What is timed."""
    make = {"forward": _forward, "training": _training, "prefill": _prefill, "decode": _decode}[task]
    return make(net, tokens)


def _forward(net: nn.Module, tokens: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def forward() -> None:
        net(tokens)

    return forward


def _training(net: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """A forward pass, each side's own loss and the gradients."""

    def training() -> None:
        if isinstance(net, ft.LanguageModel):
            loss = net.cross_entropy(tokens, tokens) / tokens.numel()
        else:
            loss = net(tokens, labels=tokens).loss
        loss.backward()
        net.zero_grad(set_to_none=True)

    return training


def _prefill(net: Any, tokens: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def prefill() -> None:
        _filled(net, tokens)

    return prefill


def _filled(net: Any, tokens: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The logits behind a prompt, and a function from next tokens to the next logits."""
    if isinstance(net, ft.LanguageModel):
        cache = net.new_cache(len(tokens), tokens.shape[1] + STEPS)
        features = net.features(tokens, cache=cache)[:, -1:]
        return net.logits(features), lambda new: net(new, cache=cache)
    memory = "cache_params" if "cache_params" in signature(net.forward).parameters else "past_key_values"
    given = {memory: transformers.DynamicCache(config=net.config)} if net.config.model_type == "recurrent_gemma" else {}
    found = net(tokens, use_cache=True, logits_to_keep=1, **given)
    past = given or {memory: found[memory]}
    return found.logits, lambda new: net(new, use_cache=True, **past).logits


@torch.no_grad()
def _decode(net: Any, tokens: Tensor) -> Callable[[], None]:
    """One greedy step."""
    logits, step = _filled(net, tokens)

    @torch.no_grad()
    def decode() -> None:
        nonlocal logits
        logits = step(logits[:, -1:].argmax(-1))

    return decode


def seconds(run: Callable[[], None], times: int = 1) -> float:
    """How long some calls take."""
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def measure(side: str, setting: "Setting") -> dict[str, float]:
    """Tokens a second (the median of some calls, after one that is not counted), and memory beyond the imports."""
    torch.set_num_threads(setting.threads)
    before = peak_megabytes()
    net = model(side, setting.window, getattr(torch, setting.dtype)).train(setting.task == "training")
    decoding = setting.task == "decode"
    shape = setting.batch, setting.tokens
    run = call(net, setting.task, torch.randint(0, LAYOUT["vocab_size"], shape))
    calls = 1 if setting.tokens > LONG else CALLS
    times = [seconds(run) for _ in range(STEPS if decoding else calls + 1)]
    tokens = setting.batch if decoding else setting.batch * setting.tokens
    return {
        "tokens_per_second": tokens / statistics.median(times[1:]),
        "first_call_seconds": times[0],
        "peak_megabytes": peak_megabytes() - before,
    }


def apart(side: str, setting: "Setting") -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--side", side, *setting.words()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and extremes of each side, and how many times faster than transformers it is, pair by pair."""
    found: dict[str, Any] = {}
    for side, results in runs.items():
        speeds = [result["tokens_per_second"] for result in results]
        found[side] = {
            "tokens_per_second": statistics.median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "peak_megabytes": statistics.median(result["peak_megabytes"] for result in results),
            "first_call_seconds": results[0]["first_call_seconds"],
        }
        if theirs := runs.get("transformers"):
            ratios = (a / b["tokens_per_second"] for a, b in zip(speeds, theirs, strict=True))
            found[side]["ratio"] = statistics.median(ratios)
    return found


def main() -> None:
    """Take turns, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["forward", "training", "prefill", "decode"], default="forward")
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence, or of the prompt to decode after")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, help="of our attention; theirs has none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, metavar="SIDE", help="some of the sides")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setting = Setting(**{name: getattr(arguments, name) for name in Setting.__dataclass_fields__})
    if arguments.side:
        print(json.dumps(measure(arguments.side, setting)))
        return
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in arguments.sides}
    for pair in range(arguments.pairs):
        for side in runs:
            runs[side].append(apart(side, setting))
            print(f"{pair + 1}/{arguments.pairs} {side}: {runs[side][-1]['tokens_per_second']:.0f}", file=sys.stderr)
    found = summary(runs)
    about = vars(setting) | {"pairs": arguments.pairs, **machine(), "transformers": transformers.__version__}
    write(f"peers-{setting.name}", about | {"sides": found})
    print(f"{setting.name}, {about['processor']}, {about['date']}")
    print(f"{'':20} {'tokens/s':>9} {'spread':>15} {'ratio':>6} {'peak MB':>8}")
    for side, row in found.items():
        spread = f"{row['slowest']:.0f} to {row['fastest']:.0f}"
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else ""
        print(f"{side:20} {row['tokens_per_second']:9.0f} {spread:>15} {ratio:>6} {row['peak_megabytes']:8.0f}")


if __name__ == "__main__":
    main()
