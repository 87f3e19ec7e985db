"""Measures the speed of decoding and the size of the cache."""

import time
from dataclasses import dataclass

import torch

from fusiontree.core.model.model import LanguageModel


@dataclass(frozen=True)
class Decode:
    """The result of greedy decoding, measured step by step.

    Attributes:
        tokens_per_second: new tokens of all rows per second, at the median step.
        cache_bytes: bytes of the cache of all rows, after the last step.
    """

    tokens_per_second: float
    cache_bytes: int


@torch.no_grad()
def measure_decode(model: LanguageModel, *, prompt: int = 256, steps: int = 128, rows: int = 1) -> Decode:
    """Decode after a random prompt; the first eighth of the steps warms up and is not counted."""
    model.eval()
    device = model.device
    tokens = torch.randint(0, model.spec.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(rows, prompt + steps)
    logits = model(tokens.to(device), cache=cache)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(logits[:, -1:].argmax(-1), cache=cache)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    counted = sorted(seconds[steps // 8 :])
    return Decode(rows / counted[len(counted) // 2], cache.nbytes)
