"""The subject of laws: a small float64 model with random parameters, and comparisons."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree.core.model.model import LanguageModel, build
from fusiontree.core.model.spec import ModelSpec

Ids = Int[Tensor, "batch time"]
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Subject:
    """A spec under test."""

    spec: ModelSpec
    seed: int = 0

    @cached_property
    def model(self) -> LanguageModel:
        """The model, not training, every parameter moved from its start so that none is 0."""
        return randomised(build(self.spec, seed=self.seed, dtype=torch.float64), self.seed).eval()

    def tokens(self, rows: int, time: int, *, salt: int = 0) -> Ids:
        """Random tokens, the same for the same arguments."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 7 * salt + time)
        return torch.randint(0, self.spec.vocab_size, (rows, time), generator=generator)


@torch.no_grad()
def randomised(model: LanguageModel, seed: int) -> LanguageModel:
    """The model with noise on every parameter and buffer, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.state_dict().values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_((0.2 * noise).to(parameter.dtype))
    return model


def difference(found: Float[Tensor, "..."], wanted: Float[Tensor, "..."], tolerance: float = TOLERANCE) -> str | None:
    """How two tensors differ, where that is more than `tolerance` times max(1, max |wanted|); None if they agree."""
    if found.shape != wanted.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    if found.numel() == 0:
        return None
    found, wanted = found.detach(), wanted.detach()
    difference = (found - wanted).abs()
    allowed = tolerance * max(1.0, float(wanted.abs().max()))
    worst = float(difference.max())
    if worst <= allowed:
        return None
    place = tuple(int(i) for i in torch.nonzero(~(difference <= allowed))[0])
    return f"off by {worst:.3g} (allowed {allowed:.3g}), first at {place}"
