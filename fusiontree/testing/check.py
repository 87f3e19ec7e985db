"""Run the laws on a component: on its example, in a small model around it."""

from collections.abc import Iterator
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
    """Small models around a component's example, one for each way that it can be used."""
    if not isinstance(component, type):
        raise TypeError(f"check takes a spec class, such as fusiontree.branches.Attention; found {component!r:.60}")
    if issubclass(component, BranchSpec):
        yield from _around_branch(component.example(WIDTH))
    elif issubclass(component, FusionSpec):
        yield _model(component.example(WIDTH))
    elif issubclass(component, GateSpec):
        yield from (_model(_gated(gate)) for gate in _gates(component))
    elif issubclass(component, EncodingSpec):
        yield from _around_encoding(component.example(WIDTH))
    else:
        raise TypeError(f"{component.__qualname__} is neither a branch, a fusion, a gate nor an encoding")


def _model(mixer: NodeSpec, named: dict[str, EncodingSpec] | None = None) -> ModelSpec:
    needs = mixer.example_needs(WIDTH)
    layers: list[Any] = [{"mixer": mixer}, {"ffn": {"kind": "mlp", "hidden": 8}}, *needs.get("layers", [])]
    data = {"vocab_size": VOCABULARY, "width": WIDTH, "encodings": named or {}, **needs, "layers": layers}
    return ModelSpec.model_validate(data)


def _around_branch(branch: BranchSpec) -> Iterator[ModelSpec]:
    """Plain, and with every encoding that it has a hook for."""
    yield _model(branch)
    for _, kind in encodings.usable():
        encoding = kind.example(WIDTH)
        if encoding.hooks & branch.hooks:
            yield _model(branch.model_copy(update={"encodings": ("time",)}), {"time": encoding})


def _around_encoding(encoding: EncodingSpec) -> Iterator[ModelSpec]:
    """Shared by every kind of branch that has a hook for it."""
    for _, kind in branches.usable():
        branch = kind.example(WIDTH)
        if encoding.hooks & branch.hooks:
            yield _model(branch.model_copy(update={"encodings": ("time",)}), {"time": encoding})


def _gates(component: type[GateSpec]) -> Iterator[GateSpec]:
    """The example, and every granularity where there is a choice."""
    example = component.example(NAMES, WIDTH)
    yield example
    if "granularity" in component.model_fields:
        options = [
            {"granularity": "layer"},
            {"granularity": "token"},
            {"granularity": "head", "heads": 4},
            {"granularity": "head", "heads": 4, "static": True},
            {"granularity": "channel"},
            {"granularity": "channel", "static": True},
            {"granularity": "channel", "rank": 2},
        ]
        yield from (component.model_validate({"kind": example.data()["kind"], **option}) for option in options)


NAMES = ("first", "second")


def _gated(gate: GateSpec) -> NodeSpec:
    from fusiontree.fusions import Gated

    parts = [{"kind": "mlp", "hidden": 8}, {"kind": "swiglu", "hidden": 8}]
    return Gated.model_validate({"branches": dict(zip(NAMES, parts, strict=True)), "gate": gate})
