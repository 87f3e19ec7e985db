"""Operators with several interchangeable backends: choosing one, and explaining the choice."""

from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from fusiontree import machine
from fusiontree.errors import FusionTreeError, suggest
from fusiontree.kernels.common.cases import Case
from fusiontree.kernels.common.shapes import Shapes

machine.resolve_vector_math()  # every model and every operator comes by here before it computes anything


class UnsupportedError(FusionTreeError):
    """A backend that does not exist, or that cannot serve the request it was named for."""


class Inputs(Protocol):
    """The arguments of one call of an operator."""

    @property
    def request(self) -> Hashable:
        """What the choice of a backend may depend on: device, dtype, features; no tensors, no sizes."""
        ...


InputsT = TypeVar("InputsT", bound=Inputs)


def serves_all(request: Any) -> str | None:
    """The `supports` of a backend that refuses nothing."""
    return None


class Backend(NamedTuple):
    """One implementation: `supports(request)` gives the reason of a refusal, or None."""

    name: str
    run: Callable[[Any], Any]
    priority: int
    supports: Callable[[Any], str | None]


class Choice(NamedTuple):
    """One line of an explanation: `refusal` is None for a backend that could serve."""

    backend: str
    picked: bool
    refusal: str | None


OPS: dict[str, "Op[Any]"] = {}
_overrides: dict[str, str] = {}
"""A plain dictionary, and no context variable: `torch.compile` watches it, so that a compiled model follows it."""


def _named(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise UnsupportedError(f"{kind}: unknown {name!r}{suggest(name, known)}")
    return known[name]


class Op(Generic[InputsT]):
    """An operator: backends register with it, calls go through it.

    Its package describes typical calls (`cases`, for `bench` and `doctor`) and small ones that use every feature
    (`examples`, for the laws of `fusiontree.testing.check_op`).

    >>> class Number(NamedTuple):
    ...     value: float
    ...     request: str = "cpu"
    >>> double = Op("double")
    >>> @double.backend("adding")
    ... def adding(inputs):
    ...     return inputs.value + inputs.value
    >>> double(Number(2.0)), double.explain("cpu")
    (4.0, [Choice(backend='adding', picked=True, refusal=None)])
    >>> del OPS["double"]
    """

    def __init__(self, name: str, shapes: Shapes | None = None) -> None:
        self.name, self.shapes = name, shapes
        self.backends: dict[str, Backend] = {}
        self._picked: dict[Hashable, Backend] = {}
        self.cases: dict[str, Case] = {}
        self.examples: tuple[Case, ...] = ()
        OPS[name] = self

    def backend(
        self, name: str, *, priority: int = 0, supports: Callable[[Any], str | None] = serves_all
    ) -> Callable[[Callable[[InputsT], Any]], Callable[[InputsT], Any]]:
        """Register the decorated function of the operator's inputs; `auto` tries high priorities first."""

        def register(run: Callable[[InputsT], Any]) -> Callable[[InputsT], Any]:
            assert name not in self.backends, f"{self.name} has two backends named {name!r}"
            self.backends[name] = Backend(name, run, priority, supports)
            self._picked.clear()
            return run

        return register

    def __call__(self, inputs: InputsT, backend: str = "auto") -> Any:
        """Run the named backend; "auto" runs the one set by `use_backend`, else the best.

        Raises:
            FusionTreeError: the arguments' shapes do not agree.
            UnsupportedError: see `pick`.
        """
        if self.shapes is not None:
            self.shapes.check(self.name, inputs)
        return self.serve(inputs, backend)

    def serve(self, inputs: InputsT, backend: str = "auto") -> Any:
        """`__call__` without the check of shapes, for callers inside a model that have checked them."""
        if backend == "auto":
            backend = _overrides.get(self.name, "auto")
        return self.pick(inputs.request, backend).run(inputs)

    def pick(self, request: Hashable, backend: str = "auto") -> Backend:
        """The backend that serves `request`; "auto" is decided once for each request.

        Raises:
            UnsupportedError: the named backend is unknown or refuses, or every backend refuses.
        """
        if backend != "auto":
            return self._explicit(request, backend)
        if torch.compiler.is_compiling():  # a dictionary that changes would be a guard that fails
            return self._best(request)
        if request not in self._picked:
            self._picked[request] = self._best(request)
        return self._picked[request]

    def explain(self, request: Hashable) -> list[Choice]:
        """All backends, best first: which one auto picks for `request`, and why not the others."""
        ranked = sorted(self.backends.values(), key=lambda backend: -backend.priority)
        refusals = {backend.name: backend.supports(request) for backend in ranked}
        first = next((name for name, refusal in refusals.items() if refusal is None), None)
        return [Choice(name, name == first, refusal) for name, refusal in refusals.items()]

    def named(self, name: str) -> Backend:
        """The backend of a name.

        Raises:
            UnsupportedError: there is none.
        """
        return _named(f"{self.name} backend", name, self.backends)

    def _explicit(self, request: Hashable, name: str) -> Backend:
        backend = self.named(name)
        refusal = backend.supports(request)
        if refusal is not None:
            raise UnsupportedError(f"{self.name} backend {name!r} cannot serve this call: {refusal}")
        return backend

    def _best(self, request: Hashable) -> Backend:
        choices = self.explain(request)
        for choice in choices:
            if choice.picked:
                return self.backends[choice.backend]
        reasons = "; ".join(f"{choice.backend}: {choice.refusal}" for choice in choices)
        raise UnsupportedError(f"{self.name}: no backend serves this call ({reasons or 'none registered'})")


@contextmanager
def use_backend(backends: Mapping[str, str]) -> Generator[None]:
    """Replace "auto" by named backends inside the block, e.g. `{"ssd": "reference"}`.

    Raises:
        UnsupportedError: an operator or a backend of that name does not exist.
    """
    for name, backend in backends.items():
        op = _named("kernel", name, OPS)
        if backend != "auto":
            op.named(backend)
    before = dict(_overrides)
    _overrides.update(backends)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
