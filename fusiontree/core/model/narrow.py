"""Narrowing: removes parts of one node along one axis, from the spec and from the weights; both functions are pure."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fusiontree.core.contracts import axes
from fusiontree.core.contracts.axes import Kept, Narrowing
from fusiontree.core.contracts.encoding import EncodingSpec
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import Lineage, ModelSpec
from fusiontree.core.spec import paths
from fusiontree.errors import SpecError, suggest

Table = tuple[Mapping[str, tuple[str, ...]], Mapping[str, int]]
"""What each dimension of each parameter of a node runs over, by the parameter's name, and the size of each axis."""


def axis_tables(spec: ModelSpec) -> dict[str, Table]:
    """The table of every node and of every encoding, by path."""
    nodes = {path: (node.axes(), node.sizes(scope)) for path, node, scope in spec.nodes_with_scope()}
    return nodes | {f"encodings.{name}": (e.axes(), e.sizes(spec.width)) for name, e in spec.encodings.items()}


def narrow_spec(spec: ModelSpec, path: str, axis: str, keep: Sequence[int]) -> ModelSpec:
    """The spec in which a node (or an encoding) keeps only the given indices of an axis.

    Args:
        path: of the node in the expanded form, or `encodings.NAME`.
        axis: one of its `axes()`.
        keep: rising indices, one at least.

    Raises:
        SpecError: no such path, axis or index, or no narrower spec computes what this one does while the parts are
            silent (while their values are 0 where the next map or norm reads them).
    """
    narrower, size = _narrowing(spec, path, axis, keep).spec, axis_tables(spec)[path][1][axis]
    if len(keep) == size:
        return spec
    data = spec.expand().data()
    paths.put(data, paths.split(path), narrower.data())
    edit = f"narrow {path}, {axis}, to {len(keep)} of {size}"
    data["lineage"].append(Lineage(parent=spec.digest(), edit=edit).data())
    return ModelSpec.parse(data).fold(like=spec)


def narrow_weights(
    spec: ModelSpec, weights: Mapping[str, Tensor], path: str, axis: str, keep: Sequence[int]
) -> dict[str, Tensor]:
    """The weights of `narrow_spec`'s model. Unchanged tensors are the given ones, narrowed tensors are copies.

    Raises:
        SpecError: as `narrow_spec`.
    """
    tables, narrower = axis_tables(spec), dict(weights)
    for place, kept in narrowed_axes(spec, path, axis, keep).items():
        table, sizes = tables[place]
        for name in running_over(table, kept):
            full = f"{place}.{name}"
            narrower[full] = axes.narrow(weights[full], table[name], sizes, kept)
    return narrower


def narrowed_axes(spec: ModelSpec, path: str, axis: str, keep: Sequence[int]) -> dict[str, Kept]:
    """The kept indices of each narrowed axis, by the path of its node (or encoding).

    Raises:
        SpecError: as `narrow_spec`.
    """
    kept = _narrowing(spec, path, axis, keep).kept
    return {f"{path}.{below}" if below else path: axes for below, axes in kept.items()}


def running_over(table: Mapping[str, tuple[str, ...]], kept: Kept) -> list[str]:
    """The names of parameters with a dimension that runs over one of these axes."""
    return [name for name, dimensions in table.items() if axes.names(dimensions) & set(kept)]


def _narrowing(spec: ModelSpec, path: str, axis: str, keep: Sequence[int]) -> Narrowing[NodeSpec | EncodingSpec]:
    nodes = {place: (node, scope) for place, node, scope in spec.nodes_with_scope()}
    encodings = {f"encodings.{name}": encoding for name, encoding in spec.encodings.items()}
    try:
        if path in encodings:
            return encodings[path].narrow(axis, keep, spec.width)
        if path in nodes:
            _check_alone(spec, path)
            node, scope = nodes[path]
            return node.narrow(axis, keep, scope)
    except SpecError as error:
        raise error.within(path) from None
    raise SpecError(f"{path}: nothing there can be narrowed{suggest(path, [*nodes, *encodings]):.300}")


def _check_alone(spec: ModelSpec, path: str) -> None:
    """Refuse a shared node if one of its uses adapts its maps: adapters have shapes of their own."""
    for place, node in spec.nodes():
        if node.uses is not None and path.split(".")[:2] == ["shared", node.uses] and node.axes():
            raise SpecError(f"cannot be narrowed, {place} adds maps of its own to it")
