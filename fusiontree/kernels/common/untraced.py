"""Backends that `torch.compile` cannot look into: a compiled model calls each as one operator.

Libraries of GPU kernels read sizes back, tune themselves and import when first called, and none of that can be
traced. The operator's backward makes the forward again, which is some percent of a training step, because an
operator cannot hold a graph of autograd; outside compiled models nothing is made twice.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from types import NoneType, UnionType
from typing import Any, Generic, Protocol, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


class Shaped(Protocol):
    """The arguments of an operator that knows its results; a named tuple."""

    def results(self) -> list[Tensor]:
        """Empty tensors like the results."""
        ...


InputsT = TypeVar("InputsT", bound=Shaped)


def _learns(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _schema(inputs: type, leave_out: Sequence[str]) -> list[str]:
    """The fields of a named tuple as `torch.library` declares arguments."""
    hints = {name: hint for name, hint in get_type_hints(inputs).items() if name not in leave_out}
    return [f"{_declared(hint)} {name}" for name, hint in hints.items()]


def _declared(hint: Any) -> str:
    """`Float[Tensor, "batch"] | None` is `Tensor?`, `int` is `int`, a tuple of floats `float[]`."""
    if get_origin(hint) in (Union, UnionType):
        kinds = {_declared(kind) for kind in get_args(hint) if kind is not NoneType}
        (kind,) = kinds
        return f"{kind}?" if NoneType in get_args(hint) else kind
    if get_origin(hint) is tuple:
        return f"{_declared(get_args(hint)[0])}[]"
    return "Tensor" if hasattr(hint, "dim_str") else hint.__name__  # jaxtyping's annotations have one


class Untraced(Generic[InputsT]):
    """Decorates backends of one operator, whose arguments are the fields of a named tuple. The last fields,
    `leave_out`, are served by no such backend."""

    def __init__(self, name: str, make: type[InputsT], *, leave_out: Sequence[str] = ()) -> None:
        fields = _schema(make, leave_out)
        schema, self.make, self.fields = ", ".join(fields), cast(Callable[..., InputsT], make), len(fields)
        self.runs: dict[str, Callable[[InputsT], Any]] = {}
        name, arguments = f"fusiontree::{name}", f"{schema}, str backend"
        self.forward = torch.library.custom_op(
            name, self._forward, mutates_args=(), schema=f"({arguments}) -> Tensor[]"
        )
        self.forward.register_fake(lambda *arguments: self.make(*arguments[:-1]).results())
        self.forward.register_autograd(self._propagate, setup_context=_keep)
        # No custom_op: those run with autograd switched off.
        torch.library.define(f"{name}_backward", f"(Tensor[] grads, {arguments}) -> Tensor[]")
        torch.library.impl(f"{name}_backward", "CompositeExplicitAutograd", self._backward)
        torch.library.register_fake(f"{name}_backward", _gradient_shapes)
        self.backward: Any = getattr(torch.ops.fusiontree, f"{name.partition('::')[2]}_backward")

    def __call__(self, run: Callable[[InputsT], Any]) -> Callable[[InputsT], Any]:
        """The backend; inside a compiled model it is one opaque operator."""
        self.runs[run.__name__] = run

        @wraps(run)
        def call(inputs: Any) -> Any:
            if not torch.compiler.is_compiling():
                return run(inputs)
            results = self.forward(*inputs[: self.fields], run.__name__)
            return results[0] if len(results) == 1 else tuple(results)

        return call

    def _forward(self, *arguments: Any) -> list[Tensor]:
        *fields, backend = arguments
        return [result.contiguous() for result in _listed(self.runs[backend](self.make(*fields)))]

    def _backward(self, grads: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
        *fields, backend = arguments
        leaves = [field.detach().requires_grad_() if _learns(field) else field for field in fields]
        with torch.enable_grad():
            results = _listed(self.runs[backend](self.make(*leaves)))
        learning = [leaf for leaf in leaves if _learns(leaf)]
        found = torch.autograd.grad(results, learning, grads, materialize_grads=True)
        return [grad.contiguous() for grad in found]

    def _propagate(self, ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        arguments = [
            kept if other is None else other for kept, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        ]
        found = iter(self.backward(grads, *arguments))
        return tuple(next(found) if _learns(argument) else None for argument in arguments)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(argument if isinstance(argument, Tensor) else None for argument in inputs))
    ctx.others = [None if isinstance(argument, Tensor) else argument for argument in inputs]


def _gradient_shapes(grads: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    like = [argument for argument in arguments if _learns(argument)]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like]
