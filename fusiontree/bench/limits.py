"""What a machine can do at most: measured by one large matrix product and one large copy."""

from typing import NamedTuple

import torch

from fusiontree.bench.timing import repeat

SIDE = 2048
"""Of the square matrices."""
COPIED = 2**28
"""Bytes, far more than a cache holds."""


class Work(NamedTuple):
    """What a call cannot do without: floating-point operations (2 per multiply-add), and bytes to and from memory."""

    flops: float
    bytes: float


class MachineLimits(NamedTuple):
    """A machine's rates, a second; a copy counts what it reads and what it writes."""

    flops: float
    bytes: float

    def seconds(self, work: Work) -> float:
        """The least time that the work can take where both are done at once.

        >>> MachineLimits(flops=100.0, bytes=10.0).seconds(Work(flops=100.0, bytes=20.0))
        2.0
        """
        return max(work.flops / self.flops, work.bytes / self.bytes)


def measure_limits(
    dtype: torch.dtype, device: torch.device, *, side: int = SIDE, copied: int = COPIED, seconds: float = 0.5
) -> MachineLimits:
    """The best of several products in `dtype` and of several copies, each repeated for about `seconds`."""
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    product = min(repeat(lambda: a @ b, device, seconds=seconds))
    copy = min(repeat(lambda: target.copy_(source), device, seconds=seconds))
    return MachineLimits(2 * side**3 / product, 2 * copied / copy)
