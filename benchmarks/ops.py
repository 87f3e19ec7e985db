"""Each operator alone, beside what other code does on a CPU with the same numbers: tokens a second and ratios.

    python benchmarks/ops.py --pairs 5

All sides take turns in one process. Each is first held against ours (values), so that a side that computes something
else cannot be compared. Writes `benchmarks/results/ops-<case>.json`. (transformers would import a `kernels.py` here.)
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mambapy.pscan import pscan
from results import machine, write
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from fusiontree.kernels.attention import attention
from fusiontree.kernels.selective_scan import selective_scan
from fusiontree.kernels.ssd import ssd

HEADS, KV_HEADS, HEAD_DIM, STATE = 16, 4, 64, 128
ATTENTION_HEADS = 8
CHANNELS, ENTRIES = 1024, 16
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


class Case(NamedTuple):
    """One question: the inputs, and the sides that answer it, ours first."""

    tokens: int
    training: bool
    inputs: list[Tensor]
    sides: dict[str, Callable[..., Tensor]]
    baseline: str
    tolerance: float


def _ssd_inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    x, B, C = torch.randn(1, tokens, HEADS, HEAD_DIM), *torch.randn(2, 1, tokens, 1, STATE)
    dt = F.softplus(torch.randn(1, tokens, HEADS) - 3)
    return [x.to(dtype), dt, -torch.rand(HEADS) * 4, B.to(dtype) / 8, C.to(dtype) / 8]


def _ssd(*inputs: Tensor) -> Tensor:
    return ssd(*inputs)[0]


def _transformers_ssd(chunk: int) -> Callable[..., Tensor]:
    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        found: Any = mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk)
        return (found[0] if isinstance(found, tuple) else found).to(x.dtype)

    return run


def ssd_case(tokens: int, training: bool, dtype: torch.dtype) -> Case:
    """The scan of Mamba-2: 16 heads of 64 channels, 128 entries, one group; no D, no gate."""
    sides = {
        "fusiontree": _ssd,
        "fusiontree compiled": torch.compile(_ssd, dynamic=False),
        "transformers (chunks of 256)": _transformers_ssd(256),
        "transformers (chunks of 64)": _transformers_ssd(64),
    }
    return Case(tokens, training, _ssd_inputs(tokens, dtype), sides, "transformers (chunks of 256)", TOLERANCE[dtype])


def _attention_inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(1, tokens, heads, HEAD_DIM).to(dtype) for heads in (ATTENTION_HEADS, KV_HEADS, KV_HEADS)]


def _windowed(window: int, backend: str = "auto") -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, window=window, scale=HEAD_DIM**-0.5, backend=backend)

    return run


def _band(tokens: int, window: int) -> Tensor:
    own = torch.arange(tokens)
    return (own[:, None] >= own) & (own[:, None] < own + window)


def _sdpa(mask: Tensor) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def _naive(mask: Tensor) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = q.shape[2] // k.shape[2]
        k, v = (tensor.repeat_interleave(share, 2).transpose(1, 2) for tensor in (k, v))
        scores = (q.transpose(1, 2) @ k.mT * HEAD_DIM**-0.5).float().masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1).to(q.dtype) @ v).transpose(1, 2)

    return run


def attention_case(tokens: int, training: bool, dtype: torch.dtype, window: int) -> Case:
    """Attention with a window: 8 heads on 4 of keys and values, 64 channels."""
    mask = _band(tokens, window)
    sides = {"fusiontree": _windowed(window), "SDPA with a band mask": _sdpa(mask)}
    if tokens <= 4096:
        sides["softmax(q k + mask) v"] = _naive(mask)
    if not training:
        sides["FlexAttention compiled"] = _windowed(window, "flex_cpu")
    return Case(tokens, training, _attention_inputs(tokens, dtype), sides, "SDPA with a band mask", TOLERANCE[dtype])


def _s6(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return selective_scan(x, dt, A, B, C)[0]


def _transformers_s6(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    x, dt, B, C = (tensor.transpose(1, 2) for tensor in (x, dt, B, C))
    found: Any = mamba_selective_scan(x, dt, A, B, C)
    return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)


def _mambapy_s6(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    inflow = (dt * x)[..., None] * B[:, :, None]
    states: Any = pscan(torch.exp(dt[..., None] * A), inflow)
    return (states @ C[..., None])[..., 0]


def selective_case(tokens: int, training: bool, baseline: str = "transformers") -> Case:
    """The scan of Mamba-1: 1024 channels of 16 entries, in float32. transformers steps through tokens, which nobody
    waits for in training on long sequences."""
    x, dt = torch.randn(1, tokens, CHANNELS), F.softplus(torch.randn(1, tokens, CHANNELS) - 3)
    B, C = torch.randn(2, 1, tokens, ENTRIES)
    sides = {"fusiontree": _s6, "mambapy": _mambapy_s6}
    if baseline == "transformers":
        sides[baseline] = _transformers_s6
    inputs = [x, dt, -torch.rand(CHANNELS, ENTRIES) * 4, B, C]
    return Case(tokens, training, inputs, sides, baseline, TOLERANCE[torch.float32])


CASES: dict[str, Callable[[], Case]] = {
    "ssd-forward-4096": lambda: ssd_case(4096, False, torch.bfloat16),
    "ssd-training-4096": lambda: ssd_case(4096, True, torch.bfloat16),
    "ssd-forward-4096-float32": lambda: ssd_case(4096, False, torch.float32),
    "ssd-training-4096-float32": lambda: ssd_case(4096, True, torch.float32),
    "window512-forward-4096": lambda: attention_case(4096, False, torch.bfloat16, 512),
    "window512-training-4096": lambda: attention_case(4096, True, torch.bfloat16, 512),
    "window1024-training-16384": lambda: attention_case(16384, True, torch.bfloat16, 1024),
    "selective_scan-forward-2048": lambda: selective_case(2048, False),
    "selective_scan-training-128": lambda: selective_case(128, True),
    "selective_scan-training-2048": lambda: selective_case(2048, True, "mambapy"),
}


def once(run: Callable[..., Tensor], case: Case) -> tuple[float, Tensor]:
    """Seconds of a call, with its gradients if it is about training, and what it gave."""
    inputs = [tensor.detach().requires_grad_(case.training) for tensor in case.inputs]
    start = time.perf_counter()
    with torch.set_grad_enabled(case.training):
        y = run(*inputs)
        if case.training:
            torch.autograd.grad(y, inputs, torch.ones_like(y))
    return time.perf_counter() - start, y.detach()


def agree(name: str, case: Case) -> dict[str, float]:
    """Seconds of the first calls, compilation included, of sides that all give the same."""
    firsts, wanted = {}, None
    for side, run in case.sides.items():
        firsts[side], y = once(run, case)
        wanted = y.float() if wanted is None else wanted
        error = float((y.float() - wanted).abs().max() / wanted.abs().max())
        if not error <= case.tolerance:
            raise SystemExit(f"{name}: {side} computes something else, the error is {error:.2g}")
    return firsts


def compare(name: str, pairs: int) -> dict[str, Any]:
    """Medians and extremes of all sides, and how many times faster than the baseline they are, turn by turn."""
    torch.manual_seed(0)
    case = CASES[name]()
    firsts = agree(name, case)
    seconds: dict[str, list[float]] = {side: [] for side in case.sides}
    for turn in range(pairs):
        for side, run in case.sides.items():
            seconds[side].append(min(once(run, case)[0] for _ in range(2)))
        print(f"{name} {turn + 1}/{pairs}", file=sys.stderr, end="\r")
    theirs = seconds[case.baseline]
    return {
        side: {
            "tokens_per_second": case.tokens / statistics.median(times),
            "slowest": case.tokens / max(times),
            "fastest": case.tokens / min(times),
            "ratio": statistics.median(b / a for a, b in zip(times, theirs, strict=True)),
            "first_call_seconds": firsts[side],
        }
        for side, times in seconds.items()
    }


def main() -> None:
    """Run cases, print tables, write results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.cases:
        sides = compare(name, arguments.pairs)
        write(f"ops-{name}", {"case": name, "threads": arguments.threads, **machine(), "sides": sides})
        print(f"\n{name:32} {'tokens/s':>9} {'spread':>17} {'ratio':>6}")
        for side, row in sides.items():
            spread = f"{row['slowest']:.0f} to {row['fastest']:.0f}"
            print(f"{side:32} {row['tokens_per_second']:9.0f} {spread:>17} {row['ratio']:6.1f}")


if __name__ == "__main__":
    main()
