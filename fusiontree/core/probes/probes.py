"""Context managers that observe, force or drop a model's gates and branches without editing the model."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusiontree.compiling import eagerly
from fusiontree.core.contracts.fusion import Fusion, branch_path
from fusiontree.core.contracts.gate import Gate, Weights
from fusiontree.core.contracts.node import Node
from fusiontree.core.probes.gate_statistics import Observation, Real
from fusiontree.errors import SpecError, suggest


def gates(model: nn.Module) -> dict[str, Gate]:
    """Every gate by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Gate)}


class HasMode(Protocol):
    """A module with a training mode and an evaluation mode."""

    training: bool

    def train(self, mode: bool = True) -> object:
        """Set the mode."""
        ...


@contextmanager
def evaluating(model: HasMode) -> Generator[None]:
    """Use evaluation mode while the block runs, so that gates add no noise."""
    was_training = model.training
    if was_training:
        model.train(False)
    try:
        yield
    finally:
        if was_training:
            model.train()


@contextmanager
def watch(gates: Mapping[str, Gate], see: Callable[[str, Weights, Real | None], None]) -> Generator[None]:
    """Calls `see` with the values of every gate that runs inside the block.

    Args:
        gates: by their paths.
        see: receives the gate's path, its values by branch, and the mask [batch, time] of real tokens (neither padding
            nor prefix; None: all are real). A gate that reads no tokens has values [units].
    """
    with eagerly() if gates else nullcontext(), ExitStack() as stack:
        for path, gate in gates.items():
            stack.callback(gate.register_forward_hook(_showing(path, see)).remove)
        yield


def _showing(path: str, see: Callable[[str, Weights, Real | None], None]) -> Callable[..., None]:
    def hook(gate: Gate, inputs: tuple[Any, ...], output: Weights) -> None:
        see(path, output, inputs[1].real)

    return hook


@contextmanager
def observe(model: nn.Module) -> Generator[Observation]:
    """Collect statistics of every gate while the block runs."""
    observation = Observation()
    with watch(gates(model), observation.add):
        yield observation


@contextmanager
def force(model: nn.Module, values: Mapping[str, Mapping[str, float]]) -> Generator[None]:
    """Give gates constant values, by the path of a gate or of its fusion, then by branch name.

    Branches that are not named share what is left equally.

    Raises:
        SpecError: no such gate or branch, or values that cannot sum to 1.
    """
    fusions = {f"{path}.gate": m for path, m in model.named_modules() if isinstance(m, Fusion) and m.gate is not None}
    with eagerly(), ExitStack() as stack:
        for path, given in values.items():
            fusion = fusions.get(path) or fusions.get(f"{path}.gate")
            if fusion is None or fusion.gate is None:
                raise SpecError(f"{path}: no gate is there{suggest(path, fusions)}")
            _take_over(fusion.gate, complete(path, given, list(fusion.branches)), stack)
        yield


def _take_over(gate: Gate, shares: dict[str, float], stack: ExitStack) -> None:
    """Force a gate; the innermost of nested calls wins. The hook runs first, so that `watch` sees the forced values."""
    stack.callback(setattr, gate, "forced", gate.forced)
    gate.forced = shares
    stack.callback(gate.register_forward_hook(_replace, prepend=True).remove)


def _replace(gate: Gate, inputs: tuple[Any, ...], output: Weights) -> Weights:
    assert gate.forced is not None
    return {branch: torch.full_like(value, gate.forced[branch]) for branch, value in output.items()}


def complete(path: str, given: Mapping[str, float], branches: list[str]) -> dict[str, float]:
    """Values for all branches, given the values of some; the other branches share the rest of 1 equally."""
    for branch, value in given.items():
        if branch not in branches:
            raise SpecError(f"{path}: no branch is called {branch!r}{suggest(branch, branches)}")
        if not 0 <= value <= 1:
            raise SpecError(f"{path}.{branch}: found {value}, a gate value is in [0, 1]")
    others = [branch for branch in branches if branch not in given]
    left = 1 - sum(given.values())
    if left < -1e-6 or (not others and abs(left) > 1e-6):
        raise SpecError(f"{path}: expected values that sum to 1, found the sum {sum(given.values()):g}")
    return {branch: given.get(branch, left / max(len(others), 1)) for branch in branches}


@contextmanager
def drop(model: nn.Module, paths: Iterable[str]) -> Generator[None]:
    """Silence branches, sub-layers or whole layers: their output is 0 before anything reads it (law 8)."""
    modules = dict(model.named_modules())
    with eagerly(), ExitStack() as stack:
        for path in dict.fromkeys([paths] if isinstance(paths, str) else paths):
            for place, node in _dropped(modules, path):
                stack.callback(node.register_forward_hook(_zero).remove)
                _mark_dropped(modules, place, stack)
        yield


def _dropped(modules: Mapping[str, nn.Module], path: str) -> list[tuple[str, Node]]:
    known = [p for p, m in modules.items() if isinstance(m, Node)]
    layers = [p.rsplit(".", 1)[0] for p in known if p.count(".") == 2]
    if path not in known and path not in layers:
        raise SpecError(f"{path}: no branch, fusion or layer is there{suggest(path, [*known, *layers])}")
    places = [path] if path in known else [f"{path}.{slot}" for slot in ("mixer", "ffn")]
    return [(place, module) for place in places if isinstance(module := modules.get(place), Node)]


def _zero(node: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _mark_dropped(modules: Mapping[str, nn.Module], place: str, stack: ExitStack) -> None:
    """Tell the fusion around a branch, and its gate, that the branch is dropped."""
    fusion, name = _branches(modules).get(place, (None, ""))
    for module in (fusion, fusion and fusion.gate):
        if module is not None:
            stack.callback(setattr, module, "dropped", module.dropped)
            module.dropped = module.dropped | {name}


def _branches(modules: Mapping[str, nn.Module]) -> dict[str, tuple[Fusion, str]]:
    """For each branch, by its path: its fusion, and its name in the fusion."""
    fusions = [(path, module) for path, module in modules.items() if isinstance(module, Fusion)]
    return {branch_path(path, name): (fusion, name) for path, fusion in fusions for name in fusion.branches}
