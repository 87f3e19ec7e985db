"""The law of narrowing: a narrower model computes what the whole one does with the parts that left silenced."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fusiontree.core.contracts import axes
from fusiontree.core.contracts.axes import Kept
from fusiontree.core.model.model import LanguageModel, build
from fusiontree.core.model.narrow import (
    Table,
    axis_tables,
    narrow_spec,
    narrow_weights,
    narrowed_axes,
    running_over,
)
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import SpecError
from fusiontree.testing.subject import Subject, difference


def narrowed(subject: Subject) -> str | None:
    """A narrower model is the whole one with the parts that left silenced, at once and step by step."""
    for path, node in subject.spec.nodes():
        if unknown := node.plain - set(type(node).model_fields):
            return f"{path}: `plain` names {', '.join(sorted(unknown))}, which is no field"
    problems = ((case, problem_of(subject, *where)) for case, where in _cases(subject.spec))
    return next((f"{case}: {problem}" for case, problem in problems if problem), None)


def _cases(spec: ModelSpec) -> Iterator[tuple[str, tuple[str, str, list[int]]]]:
    """Yields every axis of every node, with every second part removed."""
    for path, axis, size in axes_of(spec):
        keep = list(range(size % 2, size, 2)) or [0]
        yield f"{path}, {axis} {size} to {len(keep)}", (path, axis, keep)


def axes_of(spec: ModelSpec) -> Iterator[tuple[str, str, int]]:
    """Yields (path, axis, size) of every axis with more than one part."""
    for path, (_, sizes) in axis_tables(spec).items():
        yield from ((path, axis, size) for axis, size in sizes.items() if size > 1)


def problem_of(subject: Subject, path: str, axis: str, keep: Sequence[int]) -> str | None:
    """What is wrong with a narrowing; a refusal is right where it names the node and the axis's reason."""
    spec = subject.spec
    try:
        narrower = narrow_spec(spec, path, axis, keep)
    except SpecError:
        return None
    weights = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    model = build(narrower, dtype=torch.float64).eval()
    model.load_state_dict(narrow_weights(spec, weights, path, axis, keep))
    if sum(p.numel() for p in model.parameters()) >= sum(p.numel() for p in subject.model.parameters()):
        return "no parameter has left"
    wanted = silenced(subject.model, path, axis, keep)(subject.tokens(2, 9))
    found = {"at once": model(subject.tokens(2, 9)), "step by step": _stepped(model, subject.tokens(2, 9))}
    problems = ((way, difference(logits, wanted, 1e-10)) for way, logits in found.items())
    return next((f"{way} {problem}" for way, problem in problems if problem), None)


@torch.no_grad()
def _stepped(model: LanguageModel, tokens: Tensor) -> Tensor:
    """The logits of a prompt of 5 tokens and of one token at a time behind it."""
    cache = model.new_cache(len(tokens))
    return torch.cat([model(part, cache=cache) for part in (tokens[:, :5], *tokens[:, 5:].split(1, 1))], 1)


def silenced(model: LanguageModel, path: str, axis: str, keep: Sequence[int]) -> LanguageModel:
    """A model whose parameters are 0 where a narrowing would take them away, and which never chooses routed parts."""
    state, tables = {name: tensor.clone() for name, tensor in model.state_dict().items()}, axis_tables(model.spec)
    silent = build(model.spec, dtype=torch.float64).eval()
    nodes = dict(model.spec.nodes())
    every = narrowed_axes(model.spec, path, axis, keep)
    for place, channels in _narrower_outputs(model.spec, path, narrow_spec(model.spec, path, axis, keep), every):
        _replace_output(silent.get_submodule(place), channels, 0.0)
    for place, kept in every.items():
        routed = place in nodes and bool(nodes[place].routed & set(kept))
        for name in running_over(tables[place][0], kept):
            chooses = routed and state[f"{place}.{name}"].ndim == 1
            _fill(state[f"{place}.{name}"], tables[place], name, kept, value=-torch.inf if chooses else 0.0)
        if routed:
            gone = _gone(tables[place], "router.weight", kept)[0]
            _replace_output(silent.get_submodule(f"{place}.router"), gone, -torch.inf)
    silent.load_state_dict(state)
    return silent


def _narrower_outputs(
    spec: ModelSpec, path: str, narrower: ModelSpec, every: Mapping[str, Kept]
) -> Iterator[tuple[str, Tensor]]:
    """The nodes inside the one at a path that return fewer features, and which of them leave."""
    scopes = {place: (node, scope) for place, node, scope in spec.nodes_with_scope()}
    for place, node, scope in narrower.nodes_with_scope():
        if place in every and place != path:
            before, outer = scopes[place][0].output_width(scopes[place][1]), every[path]
            if node.output_width(scope) < before:
                keep = next(indices for axis, indices in outer.items() if axis.endswith("width"))
                yield place, torch.tensor(sorted(set(range(before)) - set(keep)))


def _replace_output(module: nn.Module, channels: Tensor, value: float) -> None:
    module.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, channels, value))


def _fill(tensor: Tensor, table: Table, name: str, kept: Kept, *, value: float) -> None:
    for dimension, gone in enumerate(_gone(table, name, kept)):
        tensor.index_fill_(dimension, gone, value)


def _gone(table: Table, name: str, kept: Kept) -> list[Tensor]:
    """Along each dimension of a parameter, the indices that leave."""
    dimensions, sizes = table[0][name], table[1]
    every = [set(range(axes.size(dimension, sizes))) for dimension in dimensions]
    stay = [set(axes.positions(dimension, sizes, kept).tolist()) for dimension in dimensions]
    return [torch.tensor(sorted(whole - left), dtype=torch.long) for whole, left in zip(every, stay, strict=True)]
