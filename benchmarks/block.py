"""Where the time of a model goes, and how much of what the machine can do it uses.

    python benchmarks/block.py --task forward --tokens 4096
    python benchmarks/block.py --task training --tokens 2048 --side fusiontree --dtype float32

The layout is that of `peers.py`. The limit is the model's products (`fusiontree show`; a training step makes three
times those of a forward pass) at the speed at which this machine multiplies 2048 x 2048 matrices of the dtype. Writes
`benchmarks/results/<units>/block-<task>-<tokens>-<window>.json` (see `results`).
"""

import argparse
import time
from collections import defaultdict
from typing import Any

import peers
import torch
from results import machine, write
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import fusiontree as ft
from fusiontree.bench.limits import measure_limits
from fusiontree.core.model.cost import costs
from fusiontree.kernels.registry import Op

PARTS = {
    "ssd": ("fusiontree::ssd",),
    "attention": ("fusiontree::attention", "aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "linear maps": ("aten::mm", "aten::addmm", "aten::linear", "mkldnn::", "_Widened"),
    "compiled loops (norms, gates, convolutions, rotations)": ("## Call CompiledFxGraph", "CompiledFunction"),
    "convolutions": ("fusiontree::causal_conv1d", "_Shifted"),
}
REST = "the rest (norms, gates, rotations, loss, Python)"
CALLS = 3


def name_operators() -> None:
    """Let a profile show every operator of ours, which without gradients are plain functions."""
    serve = Op.serve

    def named(self: Op[Any], inputs: Any, backend: str = "auto") -> Any:
        with record_function(f"fusiontree::{self.name}"):
            return serve(self, inputs, backend)

    Op.serve = named


def part(event: FunctionEvent) -> str:
    """Which part of the model an event belongs to: the outermost event around it that says so."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    for above in reversed(chain):
        for name, starts in PARTS.items():
            if above.name.startswith(starts):
                return name
    return next((name for name, starts in PARTS.items() if event.name.startswith(starts)), REST)


def seconds_by_part(run: Any) -> tuple[dict[str, float], float]:
    """What a call spends where, and the whole call."""
    run()
    run()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(CALLS):
            run()
    whole = (time.perf_counter() - start) / CALLS
    parts: dict[str, float] = defaultdict(float)
    for event in found.events() or []:
        parts[part(event)] += event.self_cpu_time_total / 1e6 / CALLS
    parts[REST] = whole - sum(seconds for name, seconds in parts.items() if name != REST)
    return dict(parts), whole


def main() -> None:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["forward", "training"], default="forward")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["fusiontree", "fusiontree compiled"], default="fusiontree compiled")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side == "fusiontree":
        name_operators()
    dtype = getattr(torch, arguments.dtype)
    net = peers.model(arguments.side, arguments.window, dtype).train(arguments.task == "training")
    assert isinstance(net, ft.LanguageModel)
    tokens = torch.randint(0, net.spec.vocab_size, (1, arguments.tokens))
    parts, whole = seconds_by_part(peers.call(net, arguments.task, tokens))
    flops = costs(net.spec, length=arguments.tokens)[0].flops * arguments.tokens
    flops *= 3 if arguments.task == "training" else 1
    speed = measure_limits(dtype, torch.device("cpu")).flops
    of_limit = flops / speed / whole
    name = f"block-{arguments.task}-{arguments.tokens}-{arguments.window or 'all'}"
    name += "" if arguments.dtype == "bfloat16" else f"-{arguments.dtype}"
    figures = {"flops": flops, "flops_per_second_of_products": speed, "seconds": whole, "of_limit": of_limit}
    write(name, {**vars(arguments), **machine(), **figures, "parts": parts})
    print(
        f"{name}: {whole:.2f} s, {flops / whole / 1e9:.0f} GFLOP/s, {of_limit:.0%} of the machine's {speed / 1e9:.0f}"
    )
    for label, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"{seconds:7.2f} s  {seconds / whole:4.0%}  {label}")


if __name__ == "__main__":
    main()
