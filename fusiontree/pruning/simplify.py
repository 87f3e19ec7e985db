"""A separate edit after pruning: removes empty layers and fusions that only pass on one branch, then renumbers layers.
It returns a map from old to new paths."""

from typing import Any

from fusiontree.core.contracts.fusion import FusionSpec, branch_path
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.layers import LayerSpec
from fusiontree.core.model.model import LanguageModel
from fusiontree.core.model.spec import Lineage, ModelSpec
from fusiontree.pruning.surgery import tensors, with_weights

PathMap = dict[str, str]
"""Old path to new path of every moved part; paths below a moved part move with it."""


def simplify_spec(spec: ModelSpec) -> tuple[ModelSpec, PathMap]:
    """The spec without what does nothing, and the map of paths."""
    moved: PathMap = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(spec.expanded_layers()):
        if layer.mixer is None and layer.ffn is None:
            continue
        old, new = f"layers.{index}", f"layers.{len(layers)}"
        if old != new:
            moved[old] = new
        layers.append(_simple_layer(layer, old, new, moved))
    if not moved and len(layers) == len(spec.expanded_layers()):
        return spec, {}
    edit = Lineage(parent=spec.digest(), edit="simplify").data()
    data = spec.data() | {"layers": layers, "lineage": [*(entry.data() for entry in spec.lineage), edit]}
    return ModelSpec.parse(data).fold(), moved


def _simple_layer(layer: LayerSpec, old: str, new: str, moved: PathMap) -> dict[str, Any]:
    data = layer.data()
    for slot in ("mixer", "ffn"):
        node = getattr(layer, slot)
        if node is not None:
            data[slot] = _simple(node, f"{old}.{slot}", f"{new}.{slot}", moved)
    return data


def _simple(node: NodeSpec, old: str, new: str, moved: PathMap) -> dict[str, Any]:
    """A node's data without fusions that do nothing; notes where its parts have gone."""
    if isinstance(node, FusionSpec) and (branch := node.passthrough_branch()) is not None:
        inside = branch_path(old, branch)
        moved[inside] = new
        return _simple(node.branches[branch], inside, new, moved)
    data = node.data()
    if node.kv_source is not None and node.kv_source_field is not None:
        data[node.kv_source_field] = new_path(node.kv_source, moved)  # whose layer has been here before
    for step, child in node.children():
        place = data
        *above, last = step.split(".")
        for name in above:
            place = place[name]
        place[last] = _simple(child, f"{old}.{step}", f"{new}.{step}", moved)
    return data


def still_needed(spec: ModelSpec) -> list[str]:
    """The fusions of a single branch that stay, since their norm, projection or rule changes what the branch gives."""
    return [
        path for path, fusion in spec.fusions() if len(fusion.branches) == 1 and fusion.passthrough_branch() is None
    ]


def new_path(path: str, moved: PathMap) -> str:
    """Where a path has gone: the longest mapped path that it lies below decides.

    >>> moved = {"layers.3": "layers.2", "layers.3.mixer.branches.a": "layers.2.mixer"}
    >>> new_path("layers.3.mixer.branches.a.out.weight", moved)
    'layers.2.mixer.out.weight'
    """
    for old in sorted(moved, key=len, reverse=True):
        if path == old or path.startswith(f"{old}."):
            return moved[old] + path[len(old) :]
    return path


def simplify(model: LanguageModel) -> tuple[LanguageModel, PathMap]:
    """The same function from a simpler tree, and the map of paths."""
    spec, moved = simplify_spec(model.spec)
    weights = {new_path(name, moved): tensor for name, tensor in tensors(model).items()}
    return with_weights(spec, weights, training=model.training), moved
