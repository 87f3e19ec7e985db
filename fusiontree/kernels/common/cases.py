"""Calls of an operator in given sizes, which its package describes once: laws, `bench` and `doctor` use them.

case = SSD.cases["ssd"]
SSD(case.inputs(4096, torch.bfloat16), "chunked")
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fusiontree.kernels.common.documents import accumulation_dtype

Device = torch.device | str


class Draw:
    """Random tensors of a dtype, the same on every device."""

    def __init__(self, dtype: torch.dtype, device: Device, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int) -> Float[Tensor, "*shape"]:
        """Standard normal, in the dtype."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Float[Tensor, "*shape"]:
        """Between two numbers, in the dtype that step sizes and rates are kept in."""
        drawn = low + (high - low) * torch.rand(shape, generator=self.generator)
        return drawn.to(self.device, accumulation_dtype(self.dtype))


@dataclass(frozen=True)
class Case(ABC):
    """Rows of tokens through an operator.

    Attributes:
        op: the operator's name in `fusiontree.kernels.OPS`.
        carried: the argument that holds what came before the call.
        values: the arguments that results are linear in.
        decodes: whether it has a `step`; of the others decoding is an operator of its own.
        learns: whether it has gradients.
        loops: whether its reference takes one token at a time.
        compiled: the backends that make something else of a call inside `torch.compile`.
    """

    op: ClassVar[str]
    carried: ClassVar[str] = "initial_state"
    values: ClassVar[tuple[str, ...]] = ("x",)
    decodes: ClassVar[bool] = True
    learns: ClassVar[bool] = True
    loops: ClassVar[bool] = True
    compiled: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def about(self, tokens: int) -> str:
        """The sizes, for people."""

    @abstractmethod
    def inputs(self, tokens: int, dtype: torch.dtype, device: Device = "cpu", *, seed: int = 0, rows: int = 1) -> Any:
        """Random arguments of a call, as the operator takes them."""

    @abstractmethod
    def flops(self, tokens: int) -> float:
        """FLOPs of one forward call of one row, by the reference's matrix products, whatever a backend computes."""

    def made(self, tokens: int) -> int:
        """The number of output tokens of one row."""
        return tokens

    def results(self, inputs: Any) -> list[Tensor]:
        """Empty tensors like the results."""
        return inputs.results()

    def carry(self, inputs: Any, results: list[Tensor]) -> Any:
        """The final state, which a continuing call takes as `carried`; None: no call can continue."""
        return results[1]

    def step(self, state: Tensor, *arguments: Tensor) -> Tensor:
        """The outputs of one token of each row, with the state updated in place; `arguments` are the other tensors of a
        call, without their time."""
        raise NotImplementedError(f"{self.op} has no step of its own")
