"""Run the laws on a component: on its examples, in small models around them."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from fusiontree.core.contracts.encoding import EncodingSpec, encodings
from fusiontree.core.contracts.fusion import FusionSpec
from fusiontree.core.contracts.gate import GateSpec
from fusiontree.core.contracts.node import BranchSpec, NodeSpec, branches
from fusiontree.core.model.spec import ModelSpec
from fusiontree.core.spec.base import Spec
from fusiontree.testing.laws import LAWS, Law
from fusiontree.testing.subject import Subject

WIDTH = 16
VOCABULARY = 11


class LawBroken(AssertionError):
    """A law that does not hold: which, for what, on which input, and the spec to see it with."""

    def __init__(self, law: Law, subject: Subject, problem: str) -> None:
        self.law, self.subject, self.problem = law, subject, problem
        super().__init__(f"{law.name}: {law.text}\n  broken: {problem}\n  in this model:\n{subject.spec.to_yaml()}")


def check(component: type[Spec], *, laws: tuple[Law, ...] = LAWS) -> list[str]:
    """Run every law on a component and return the names of those that hold.

    Args:
        component: the registered spec class of a branch, a fusion, a gate or an encoding.
        laws: which ones.

    Raises:
        LawBroken: the first that does not hold, with a minimal example.
    """
    for model in models(component):
        check_spec(model, laws=laws)
    return [law.name for law in laws]


def check_spec(spec: ModelSpec, *, laws: tuple[Law, ...] = LAWS) -> None:
    """Run laws on a model.

    Raises:
        LawBroken: the first that does not hold.
    """
    subject = Subject(spec)
    for law in laws:
        problem = law.broken(subject)
        if problem:
            raise LawBroken(law, subject, problem)


def models(component: type[Spec]) -> Iterator[ModelSpec]:
    """Small models around a component's examples, one for each way that they can be used."""
    if not isinstance(component, type):
        raise TypeError(f"check takes a spec class, such as fusiontree.branches.Attention; found {component!r:.60}")
    if issubclass(component, BranchSpec):
        yield from _around_branch(component)
    elif issubclass(component, FusionSpec):
        yield from map(_model, examples(component, WIDTH))
    elif issubclass(component, GateSpec):
        yield from (_model(_gated(gate)) for gate in examples(component, NAMES, WIDTH))
    elif issubclass(component, EncodingSpec):
        yield from _around_encoding(component)
    else:
        raise TypeError(f"{component.__qualname__} is neither a branch, a fusion, a gate nor an encoding")


def examples(component: type[Any], *around: Any) -> list[Any]:
    """All examples of a component.

    Raises:
        TypeError: its `examples` is no class method that gives instances of the class, one at least.
    """
    place = f"{component.__qualname__}.examples"
    if getattr(component.examples, "__self__", None) is not component:
        raise TypeError(f"{place}: expected a class method, found {component.examples!r:.60}")
    given: Any = component.examples(*around)
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, Spec) else []
    if not found or any(not isinstance(each, component) for each in found):
        wanted = f"expected an iterator of instances of {component.__qualname__}, one at least"
        raise TypeError(f"{place}: {wanted}, found {found or given!r:.100}")
    return found


def _model(mixer: NodeSpec, named: dict[str, EncodingSpec] | None = None) -> ModelSpec:
    needs = mixer.example_needs(WIDTH)
    layers: list[Any] = [{"mixer": mixer}, {"ffn": {"kind": "mlp", "hidden": 8}}, *needs.get("layers", [])]
    data = {"vocab_size": VOCABULARY, "width": WIDTH, "encodings": named or {}, **needs, "layers": layers}
    return ModelSpec.model_validate(data)


def _around_branch(component: type[BranchSpec]) -> Iterator[ModelSpec]:
    """Each example by itself, and the first with every encoding that it has a hook for."""
    every = examples(component, WIDTH)
    yield from map(_model, every)
    for _, kind in encodings.usable():
        yield from _naming(every[0], examples(kind, WIDTH)[0])


def _around_encoding(component: type[EncodingSpec]) -> Iterator[ModelSpec]:
    """The first example shared by every kind of branch that has a hook for it, the others by one kind."""
    for number, encoding in enumerate(examples(component, WIDTH)):
        around = (model for _, kind in branches.usable() for model in _naming(examples(kind, WIDTH)[0], encoding))
        yield from around if number == 0 else islice(around, 1)


def _naming(branch: BranchSpec, encoding: EncodingSpec) -> Iterator[ModelSpec]:
    if encoding.hooks & branch.hooks:
        yield _model(branch.model_copy(update={"encodings": ("time",)}), {"time": encoding})


NAMES = ("first", "second")


def _gated(gate: GateSpec) -> NodeSpec:
    from fusiontree.fusions import Gated

    parts = [{"kind": "mlp", "hidden": 8}, {"kind": "swiglu", "hidden": 8}]
    return Gated.model_validate({"branches": dict(zip(NAMES, parts, strict=True)), "gate": gate})
