"""Rotary embeddings beyond the length that a model was trained on: slower rotations, by kind.

Each kind turns channel pairs by a mix of their own frequency f and of f / factor. A frequency that depended on the
length of the sequence (dynamic NTK, LongRoPE) would make keys in a cache wrong as it grows, so there is none.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal, Self

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from fusiontree.components import Count, Flag, Positive, Registry, Spec, invalid

Frequencies = Float[Tensor, "pairs"]
"""Radians a position, of each pair of channels."""


class RopeScaling(Spec, ABC):
    """How rotations slow down: `factor` times, for pairs of channels that do not keep their frequency."""

    factor: Positive

    @property
    def magnitude(self) -> float:
        """What rotated channels are multiplied by."""
        return 1.0

    def scaled(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """The frequencies theta^(-2i/dim) slowed down, in their type."""
        kept = self.kept(frequencies, theta)
        return frequencies * (kept + (1 - kept) / self.factor)

    @abstractmethod
    def kept(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """How much of each frequency stays as it is, in [0, 1]."""


scalings: Registry[RopeScaling] = Registry("scaling", RopeScaling)
AnyScaling = Annotated[RopeScaling, scalings]
"""A field that holds any scaling."""


@scalings.register
class LinearScaling(RopeScaling):
    """Position interpolation (arXiv 2306.15595): every pair of channels slows down."""

    kind: Literal["linear"] = "linear"

    def kept(self, frequencies: Frequencies, theta: float) -> Frequencies:
        return torch.zeros_like(frequencies)


@scalings.register
class YarnScaling(RopeScaling):
    """YaRN (arXiv 2309.00071): pairs of channels that turn slowly slow down.

    Pairs that turn `beta_fast` times or more within the `original_length` stay as they are, those that turn
    `beta_slow` times or less slow down, and between the two the share falls linearly from pair to pair. `truncate`
    rounds the two ends outwards to whole pairs. Rotated channels are multiplied by `attention_factor`,
    0.1 ln(factor) + 1 unless given.
    """

    kind: Literal["yarn"] = "yarn"
    original_length: Count
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    truncate: Flag = True

    @model_validator(mode="after")
    def _fast_is_faster(self) -> Self:
        if self.beta_fast < self.beta_slow:
            raise invalid({("beta_fast",): f"expected at least beta_slow ({self.beta_slow}), found {self.beta_fast}"})
        return self

    @property
    def magnitude(self) -> float:
        """The attention factor."""
        return self.attention_factor or yarn_magnitude(self.factor)

    def kept(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """A ramp from 1 to 0 over the pairs."""
        pairs = len(frequencies)
        first, last = (self._pair(turns, theta, pairs) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        ramp = torch.arange(pairs, dtype=frequencies.dtype, device=frequencies.device) - first
        return 1 - (ramp / (last - first or 0.001)).clamp(0, 1)  # a step where the ends meet, as in the paper's code

    def _pair(self, turns: float, theta: float, pairs: int) -> float:
        """Which pair, in fractions, turns this often within the original length."""
        return pairs * math.log(self.original_length / (2 * math.pi * turns)) / math.log(theta)


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """0.1 scale ln(factor) + 1, and 1 where nothing slows down."""
    return 0.1 * scale * math.log(max(factor, 1.0)) + 1.0


@scalings.register
class Llama3Scaling(RopeScaling):
    """The rule of Llama 3.1 (arXiv 2407.21783): pairs of channels that turn slowly slow down.

    Pairs that turn `high_freq_factor` times or more within the `original_length` stay as they are, those that turn
    `low_freq_factor` times or less slow down, and between the two the share falls linearly with the frequency.
    """

    kind: Literal["llama3"] = "llama3"
    original_length: Count
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0

    @model_validator(mode="after")
    def _high_is_higher(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise invalid({("high_freq_factor",): f"expected a number above low_freq_factor ({low}), found {high}"})
        return self

    def kept(self, frequencies: Frequencies, theta: float) -> Frequencies:
        """A ramp over how often a pair turns within the original length."""
        turns = frequencies * self.original_length / (2 * math.pi)
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
