"""Dropping parts: spec to spec and weights to weights, both pure (law 8).

Every parameter belongs to a path, so the weights of a pruned model are those of its paths and nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusiontree.core.contracts.fusion import FusionSpec, nodes
from fusiontree.core.contracts.node import BranchSpec
from fusiontree.core.model.layers import LayerSpec, Residual
from fusiontree.core.model.model import LanguageModel, build
from fusiontree.core.model.narrow import narrow_spec, narrow_weights
from fusiontree.core.model.spec import Lineage, ModelSpec
from fusiontree.core.spec import paths
from fusiontree.errors import SpecError, suggest
from fusiontree.pruning.evidence import PruneError


def drop_from_spec(spec: ModelSpec, drops: Iterable[str]) -> ModelSpec:
    """The spec less some branches, sub-layers (`layers.3.ffn`) or layers, and less what only they used.

    No path changes: a fusion may be left with one branch, and a layer with nothing is `{}`.

    Raises:
        PruneError: a path that is no branch, sub-layer or layer, the last branch of a fusion, or a sub-layer that
            cannot go without changing the others.
    """
    drops = _outermost(drops)
    _check_kv_sources(spec, drops)
    data = spec.expand().data()
    for path in drops:
        _drop(data, path, spec)
    _drop_unnamed(data)
    data["lineage"].append(Lineage(parent=spec.digest(), edit=f"drop {', '.join(drops)}").data())
    return ModelSpec.parse(data).fold(like=spec)


def _outermost(drops: Iterable[str]) -> list[str]:
    """Each path once, and none that lies inside another."""
    every = dict.fromkeys(drops)
    return [path for path in every if not any(path.startswith(f"{other}.") for other in every)]


def _check_kv_sources(spec: ModelSpec, drops: list[str]) -> None:
    """Refuse drops of keys and values that a node which stays reads."""
    nodes_by_path = {path: node for path, node, _ in spec.layer_nodes()}
    gone = {path for path in nodes_by_path if any(path == drop or path.startswith(f"{drop}.") for drop in drops)}
    for path, node in nodes_by_path.items():
        if node.kv_source in gone and path not in gone:
            raise PruneError(f"{node.kv_source}: cannot be dropped exactly: {path} reads its keys; drop that, too")


def _drop(data: dict[str, Any], path: str, spec: ModelSpec) -> None:
    known, branches = droppable(spec), dict(spec.branches())
    if path not in known:
        raise PruneError(f"{path}: nothing there can be dropped{suggest(path, known):.300}")
    if path in branches:
        above, name = branches[path]
        place = paths.split(above)
        fusion = nodes.parse(paths.get(data, place))
        assert isinstance(fusion, FusionSpec)
        try:
            paths.put(data, place, fusion.without_branch(name).data())
        except SpecError as error:
            raise PruneError(f"{path}: {error}") from None
    else:
        _drop_sublayer(data, path)


def _drop_sublayer(data: dict[str, Any], path: str) -> None:
    index, *slot = paths.split(path)[1:]
    layer = data["layers"][int(index)]
    residual = Residual.model_validate(layer["residual"])
    if residual.keep != 1 or residual.source != "stream":
        found = f"its residual is {residual.source} * {residual.keep}"
        raise PruneError(f"{path}: cannot be dropped exactly: {found}, not the stream as it is")
    left = {name: layer[name] for name in ("mixer", "ffn") if slot and slot != [name] and layer[name]}
    data["layers"][int(index)] = layer | {"mixer": None, "ffn": None} | left if left else LayerSpec().data()


def droppable(spec: ModelSpec) -> list[str]:
    """Every path that a plan may drop: branches, sub-layers and layers."""
    branches = dict(spec.branches())
    found = [path for path, *_ in spec.layer_nodes() if path in branches or path.count(".") == 2]
    layers = [f"layers.{index}" for index, layer in enumerate(spec.expanded_layers()) if layer.mixer or layer.ffn]
    return [*layers, *found]


def _drop_unnamed(data: dict[str, Any]) -> None:
    """Removes shared nodes without a use, then encodings that no branch names."""
    used = {node.uses for _, node, _ in ModelSpec.parse(data).layer_nodes()}
    data["shared"] = {name: node for name, node in data["shared"].items() if name in used}
    branches = (node for _, node in ModelSpec.parse(data).nodes() if isinstance(node, BranchSpec))
    named = {name for branch in branches for name in branch.encodings}
    data["encodings"] = {name: encoding for name, encoding in data["encodings"].items() if name in named}


def carry(weights: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The weights that a pruned spec still has, unchanged.

    Raises:
        PruneError: one is missing or has another shape, so that the spec is no pruning of the weights' model.
    """
    wanted = {name: tuple(p.shape) for name, p in build(spec, device="meta").state_dict().items()}
    for name, shape in wanted.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise PruneError(f"{name}: the pruned spec says {shape}, the model has {found}")
    return {name: weights[name] for name in wanted}


def tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The weights of a model, by name, which know whether they are trained."""
    return model.state_dict(keep_vars=True)


def with_weights(spec: ModelSpec, weights: Mapping[str, Tensor], *, training: bool) -> LanguageModel:
    """A model of exactly these weights (copies, so that neither model changes the other), trained where they are."""
    model = build(spec, device="meta")
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(weights[name].requires_grad)
    return model.train(training)


def narrow(model: LanguageModel, path: str, axis: str, keep: Sequence[int]) -> LanguageModel:
    """A new model in which a node keeps only the given indices of an axis; see `narrow_spec`.

    Raises:
        SpecError: no such path, axis or index, or no narrower model computes the same as this one does while the
            parts are silent.
    """
    with torch.enable_grad():  # parts of what is trained are trained
        weights = narrow_weights(model.spec, tensors(model), path, axis, keep)
    return with_weights(narrow_spec(model.spec, path, axis, keep), weights, training=model.training)
