"""Small modules that components are built from. Each declares how its own parameters are initialised.

Construction only declares shapes (it runs on the meta device); `initialise` draws the values.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import model_validator
from torch import Generator, Tensor, nn

from fusiontree import products
from fusiontree.core.spec.base import Count, Positive, Spec, invalid
from fusiontree.errors import SpecError, WeightsError

Init = Callable[[Tensor, Generator], object]
"""Fills a float32 tensor on the CPU in place. A function of a module or a `partial` of one: models are pickled."""


def normal(std: float) -> Init:
    """Draw from a normal distribution around 0."""
    return partial(_draw, std=std)


def fan_in(scale: float = 1.0) -> Init:
    """Draw so that unit inputs give outputs of standard deviation `scale` (LeCun et al., Efficient BackProp)."""
    return partial(_draw_by_inputs, scale=scale)


def constant(value: float) -> Init:
    """The same value everywhere."""
    return partial(_fill, value=value)


def _draw(tensor: Tensor, generator: Generator, *, std: float) -> None:
    tensor.normal_(0.0, std, generator=generator)


def _draw_by_inputs(tensor: Tensor, generator: Generator, *, scale: float) -> None:
    tensor.normal_(0.0, scale / math.sqrt(tensor.shape[-1]), generator=generator)


def _fill(tensor: Tensor, generator: Generator, *, value: float) -> None:
    tensor.fill_(value)


LARGEST_PARAMETER = 2**59
"""The most elements of a parameter: at 8 bytes each, their bytes still fit a signed 64-bit integer."""


class Module(nn.Module):
    """A module that declares each of its own parameters together with its initialiser."""

    def __init__(self) -> None:
        super().__init__()
        self.initial: dict[str, Init] = {}
        self.decayed: set[str] = set()
        """Names of own parameters under weight decay. Names, because a tool may replace the parameter objects."""

    def declare(self, name: str, shape: tuple[int, ...], init: Init, *, decay: bool = False) -> nn.Parameter:
        """Add a parameter of this shape.

        Args:
            decay: whether weight decay shrinks it. Maps from features to features need it; biases, gains, embeddings,
                initial vectors and decay rates of a state do not.

        Raises:
            WeightsError: no memory could hold it.
        """
        if math.prod(shape) > LARGEST_PARAMETER:
            raise WeightsError(f"weights: a parameter {name!r} of shape {shape} is larger than any memory")
        parameter = nn.Parameter(torch.empty(shape))
        self.register_parameter(name, parameter)
        self.initial[name] = init
        if decay:
            self.decayed.add(name)
        return parameter

    def declare_unlearned(self, name: str, shape: tuple[int, ...], init: Init) -> Tensor:
        """Add a buffer that belongs to the weights, but that no gradient trains."""
        self.register_buffer(name, torch.empty(shape))
        self.initial[name] = init
        return self.get_buffer(name)


class LinearModule(nn.Linear, Module):
    """y = x W^T + b. It derives from `nn.Linear`, so that tools for LoRA and quantisation find it."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, init: Init | None = None) -> None:
        Module.__init__(self)  # nn.Linear's own __init__ would draw values
        self.in_features, self.out_features = inputs, outputs
        self.weight = self.declare("weight", (outputs, inputs), init or fan_in(), decay=True)
        self.bias = self.declare("bias", (outputs,), constant(0.0)) if bias else None

    def forward(self, input: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Apply the map to the last dimension."""
        return products.linear(input, self.weight, self.bias)


class Norm(Spec):
    """How features are normalised over the width: root mean square (arXiv 1910.07467) or layer norm
    (arXiv 1607.06450, without a bias). `gain` is absent, a weight, or 1 + a weight that starts at 0 (Gemma). `count` is
    the number of features in the mean square (null: the width); after narrowing it still counts the removed features,
    as zeros."""

    kind: Literal["rms", "layer"] = "rms"
    gain: Literal["none", "weight", "one_plus"] = "weight"
    eps: Positive = 1e-5
    count: Count | None = None

    @model_validator(mode="after")
    def _has_a_mean_square(self) -> Self:
        if self.count is not None and self.kind == "layer":
            raise invalid({("count",): "a layer norm subtracts the mean of the features that there are; leave it out"})
        return self

    def narrowed(self, width: int, kept: Sequence[int]) -> Self:
        """The norm over the features `kept` of `width`, equal to this norm where the other features are 0.

        Raises:
            SpecError: this is a layer norm, which maps zeros to other values.
        """
        if self.kind == "layer":
            raise SpecError("a layer norm over it would move what is silent")
        return self.model_copy(update={"count": self.count or width})


class NormModule(Module):
    """The module of a `Norm`, over each of `groups` equal parts of the width; statistics in float32 or better."""

    def __init__(self, spec: Norm, width: int, *, groups: int = 1) -> None:
        super().__init__()
        self.spec, self.groups = spec, groups
        start = constant(1.0 if spec.gain == "weight" else 0.0)
        self.weight = None if spec.gain == "none" else self.declare("weight", (width,), start)
        self.counted = spec.count or width // groups
        self.eps = torch.tensor(spec.eps, dtype=torch.float64, device="cpu")

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Normalise the last dimension."""
        if self._counts_operations(x):
            return self._by_length(x)
        function = F.rms_norm if self.spec.kind == "rms" else F.layer_norm
        precise, gain = x.to(accumulation_dtype(x.dtype)), self._gain(accumulation_dtype(x.dtype))
        share = self.counted * self.groups / x.shape[-1]  # torch's functions divide by the present number of features
        eps, factor = self.spec.eps * share, share**0.5
        if self.groups == 1:
            return scaled(function(precise, x.shape[-1:], gain, eps=eps), factor).to(x.dtype)
        parts = precise.unflatten(-1, (self.groups, -1))
        normed = scaled(function(parts, parts.shape[-1:], eps=eps), factor).flatten(-2)
        return (normed if gain is None else normed * gain).to(x.dtype)

    def _counts_operations(self, x: Tensor) -> bool:
        """Whether the number of operations decides the time: on a CPU without gradients, where none are fused."""
        plain = x.device.type == "cpu" and not torch.is_grad_enabled()
        return plain and self.spec.kind == "rms" and not torch.compiler.is_compiling()

    def _by_length(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """The root mean square norm, in half as many operations as torch's own."""
        parts, precise = x if self.groups == 1 else x.unflatten(-1, (self.groups, -1)), accumulation_dtype(x.dtype)
        length = torch.linalg.vector_norm(parts, dim=-1, keepdim=True, dtype=precise)
        y = parts * torch.addcmul(self.eps, length, length, value=1 / self.counted).rsqrt_()
        y, weight = y if self.groups == 1 else y.flatten(-2), self.weight
        if weight is not None:
            y = y * weight if self.spec.gain == "weight" else torch.addcmul(y, y, weight.to(precise))
        return y.to(x.dtype)

    def _gain(self, dtype: torch.dtype) -> Float[Tensor, "width"] | None:
        if self.weight is None:
            return None
        weight = self.weight.to(dtype)
        return weight if self.spec.gain == "weight" else 1 + weight


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a constant; x itself where the constant is 1."""
    return x if factor == 1.0 else x * factor


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return reduce(torch.add, parts)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in where half precision is not enough: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
