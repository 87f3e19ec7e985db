"""The spec of a whole model, and the ways to look at and edit it as data."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ModelWrapValidatorHandler, StrictInt, ValidationError, model_validator

from fusiontree.core.contracts.encoding import AnyEncoding
from fusiontree.core.contracts.fusion import AnyNode, FusionSpec, branch_path
from fusiontree.core.contracts.modules import Norm
from fusiontree.core.contracts.node import BranchSpec, NodeSpec, Scope
from fusiontree.core.model.layers import MAX_LAYERS, Entry, LayerSpec, Repeat, expand, fold, refold
from fusiontree.core.spec import leftovers, paths, yaml
from fusiontree.core.spec.base import (
    Count,
    Flag,
    NamedMap,
    OrderedMap,
    Place,
    Positive,
    Real,
    Spec,
    invalid,
    parts,
    relocated,
)
from fusiontree.core.spec.fields import is_open, targets
from fusiontree.errors import SpecError, suggest


class EmbeddingSpec(Spec):
    """Token embeddings, times a constant (sqrt(width) in Gemma)."""

    multiplier: Real = 1.0


class PrefixSpec(Spec):
    """`tokens` learned vectors before each document."""

    tokens: Count


class HeadSpec(Spec):
    """From features to logits: softcap * tanh(multiplier * (W x + b) / softcap). Tied: W is the embedding's."""

    tied: Flag = True
    multiplier: Real = 1.0
    softcap: Positive | None = None
    bias: Flag = False


class Lineage(Spec):
    """Where a spec came from: its parent's digest and the edit. It does not enter equality.

    `config`: fields of an imported config that do not change the function (maximum length, end tokens).
    """

    parent: str
    edit: str
    config: OrderedMap[Flag | StrictInt | Real | tuple[StrictInt, ...]] = OrderedMap()


class ModelSpec(Spec):
    """A language model as data. Equality, hash and digest are those of the expanded form."""

    elsewhere: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("model", "data", "training", "optimizer"), " of a spec; run files have it (fusiontree validate --run FILE)"
    )
    format: Literal[1] = 1
    vocab_size: Count
    width: Count
    embedding: EmbeddingSpec = EmbeddingSpec()
    prefix: PrefixSpec | None = None
    encodings: NamedMap[AnyEncoding] = NamedMap()
    shared: NamedMap[AnyNode] = NamedMap()
    layers: Annotated[tuple[Entry, ...], Field()]
    norm: Norm = Norm()
    head: HeadSpec = HeadSpec()
    lineage: tuple[Lineage, ...] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _expand_paths(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise relocated(error, lambda place: _expanded_place(place, data)) from None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        count = sum(entry.size if isinstance(entry, Repeat) else 1 for entry in self.layers)
        if count > MAX_LAYERS:
            raise invalid({("layers",): f"{count} layers, at most {MAX_LAYERS} are allowed"})
        problems: dict[Place, str] = {}
        for path, text in self._problems():
            problems.setdefault(paths.split(path), text)
        if problems:
            raise invalid(problems)
        return self

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Yields (path, message) for every node that does not fit where it is; a sub-layer must return the stream's
        width. Fusions check their own branches."""
        for path, node, scope in self.nodes_with_scope():
            yield from ((f"{path}.{where}", text) for where, text in node.problems(scope))
            width = node.output_width(scope)
            if _is_sublayer(path) and width != scope.width:
                yield path, f"expected the width {scope.width} of what it returns, found {width}"
        yield from _sharing_problems(dict(self.nodes()))
        if self.longest is not None and self.longest < 1:
            made = self.longest + self.prefix_length
            yield "prefix.tokens", f"leaves none of the {made} positions of an encoding, found {self.prefix_length}"

    @property
    def prefix_length(self) -> int:
        """How many learned vectors stand before each document."""
        return self.prefix.tokens if self.prefix else 0

    @property
    def scope(self) -> Scope:
        """What every node of the stack is surrounded by."""
        return Scope(self.width, self.encodings, self.shared, self.prefix_length, self.width)

    def expanded_layers(self) -> tuple[LayerSpec, ...]:
        """The layers, one by one."""
        return expand(self.layers)

    def nodes_with_scope(self) -> Iterator[tuple[str, NodeSpec, Scope]]:
        """Yields every branch and fusion with its path and scope: shared nodes first, parents before children."""
        scope = self.scope
        for name, node in self.shared.items():
            yield from node.walk(scope.for_shared, f"shared.{name}")
        for index, layer in enumerate(self.expanded_layers()):
            for slot in ("mixer", "ffn"):
                node = getattr(layer, slot)
                if node is not None:
                    yield from node.walk(scope, f"layers.{index}.{slot}")

    def layer_nodes(self) -> Iterator[tuple[str, NodeSpec, Scope]]:
        """Yields the nodes inside layers, in the order of a forward pass; shared nodes appear where they are used."""
        yield from (found for found in self.nodes_with_scope() if found[0].startswith("layers."))

    def nodes(self) -> Iterator[tuple[str, NodeSpec]]:
        """Every branch and fusion with its path."""
        yield from ((path, node) for path, node, _ in self.nodes_with_scope())

    def fusions(self) -> Iterator[tuple[str, FusionSpec]]:
        """Every fusion with its path."""
        yield from ((path, node) for path, node in self.nodes() if isinstance(node, FusionSpec))

    def gates(self) -> Iterator[tuple[str, FusionSpec]]:
        """Every gate's path with the fusion that it is of."""
        yield from ((f"{path}.gate", fusion) for path, fusion in self.fusions() if fusion.gate_spec is not None)

    def branches(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Every branch's path, with the path of its fusion and its name there."""
        for path, fusion in self.fusions():
            yield from ((branch_path(path, name), (path, name)) for name in fusion.branches)

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Bytes that one sequence's cache of `length` tokens takes, keys stored in `dtype`."""
        length += self.prefix_length
        return sum(node.cache_bytes(scope, length, dtype) for _, node, scope in self.layer_nodes())

    def rotated_channels(self, encoding: str) -> tuple[int, ...]:
        """How many channels branches let this encoding rotate, each number once."""
        branches = (node for _, node in self.nodes() if isinstance(node, BranchSpec) and encoding in node.encodings)
        return tuple(sorted({count for branch in branches for count in branch.channels()}))

    def node(self, path: str) -> Any:
        """The part at a path of the expanded form: a layer, a branch, a fusion, a gate, a norm, an encoding, ...

        Raises:
            SpecError: there is none; names the nearest.
        """
        found: Any = self.expand()
        for step in paths.split(path):
            found = dict(parts(found)).get(step)
        if not path or not isinstance(found, Spec):
            paths.find(self.expand().data(), path)  # which names the nearest
            there = "several" if "*" in path else f"{plain(found)!r:.60}"
            raise SpecError(f"{path}: expected one part with fields of its own, found {there}")
        return found

    def expand(self) -> Self:
        """The spec with one entry a layer."""
        return self.model_copy(update={"layers": self.expanded_layers()})

    def fold(self, *, like: "ModelSpec | None" = None) -> Self:
        """The spec with runs and periods of equal layers written as repeats.

        Args:
            like: a spec with as many layers; its repeats and their `vary` are kept where the layers allow it.
        """
        layers = self.expanded_layers()
        if like is None or len(layers) != len(like.expanded_layers()):
            return self.model_copy(update={"layers": fold(layers)})
        return self.model_copy(update={"layers": refold(layers, like.layers)})

    def canonical(self) -> dict[str, Any]:
        """Plain data of the expanded form without lineage: what equality means."""
        return {key: value for key, value in self.expand().data().items() if key != "lineage"}

    def digest(self) -> str:
        """The first 12 hex digits of the SHA-256 of the canonical JSON."""
        text = json.dumps(self.canonical(), separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ModelSpec):
            return NotImplemented
        return json.dumps(self.canonical()) == json.dumps(other.canonical())

    def __hash__(self) -> int:
        return hash(self.digest())

    def replace(self, edits: Mapping[str, Any]) -> Self:
        """The spec with other values at paths of the expanded form; `*` matches any one step.

        The last step may be a new name in a mapping with free names (branches, encodings, links, ...); None removes a
        name there. If only a `kind` is edited, the other fields are kept; None for one of them, in the same call,
        removes it. Repeats and their `vary` are kept where the layers still allow it.

        Raises:
            SpecError: a path matches nothing, the result is not valid, or the edits are no mapping.
        """
        if not isinstance(edits, Mapping):
            raise SpecError(f"replace: expected a mapping from paths to values, found {edits!r:.80}")
        data = self.expand().data()
        for pattern, value in edits.items():
            for path in targets(ModelSpec, data, pattern, adding=value is not None):
                _edit(data, path, plain(value))
                if leftovers.removes(pattern, edits):
                    paths.get(data, path[:-1]).pop(path[-1], None)
        try:
            edited = type(self).model_validate(data)
        except ValidationError as error:
            raise SpecError(*leftovers.explain(error, edits, data)) from None
        given = any(isinstance(entry, Repeat) for entry in edited.layers)
        return edited if given else edited.fold(like=self)

    @property
    def longest(self) -> int | None:
        """The most positions that every encoding has; None: any number."""
        limits = [e.limit - self.prefix_length for e in self.encodings.values() if e.limit is not None]
        return min(limits, default=None)

    def diff(self, other: "ModelSpec") -> dict[str, tuple[Any, Any]]:
        """Differences of the expanded forms, by path: (here, there), None for a part that one side lacks. A part of
        another kind is one entry. Where only the order of names differs, the entry holds both lists."""
        return dict(_differences(self.canonical(), other.canonical()))

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Read a spec.

        Raises:
            SpecError: the text is not YAML 1.2 or not a valid spec.
        """
        return cls.parse(yaml.read(text))

    def to_yaml(self) -> str:
        """Write the spec as it stands, defaults left out; `from_yaml` gives it back."""
        return yaml.write({"format": self.format} | self.data(short=True))


def _expanded_place(place: Place, data: Any) -> Place:
    """A place in a spec as written, as a place in its expanded form (where a repeat first says it)."""
    match place:
        case ("layers", int(index), "layers", int(inner), *rest):
            return ("layers", _layers_before(data, index) + inner, *rest)
        case ("layers", int(index), *rest):
            return ("layers", _layers_before(data, index), *rest)
        case _:
            return place


def _layers_before(data: Any, index: int) -> int:
    """The number of layers before an entry; an invalid entry counts as one."""
    return sum(_length(entry) for entry in paths.get(data, ("layers",))[:index])


def _length(entry: Any) -> int:
    with suppress(ValueError):
        return len(expand([Repeat.model_validate(entry)]))
    return 1


def plain(value: Any) -> Any:
    """Specs inside a value as plain data."""
    if isinstance(value, Spec):
        return value.data()
    if isinstance(value, OrderedMap | Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _is_sublayer(path: str) -> bool:
    return path.startswith("layers.") and path.count(".") == 2


def _sharing_problems(nodes: Mapping[str, NodeSpec]) -> Iterator[tuple[str, str]]:
    """Sources of shared keys that do not exist, come too late, or do not fit, by the path of the node that reads."""
    sources = {path: node for path, node in nodes.items() if path.startswith("layers.")}
    for path, node in nodes.items():
        if node.kv_source is None:
            continue
        source = sources.get(node.kv_source)
        if path not in sources:
            found = "a shared node cannot read those of another"
        elif source is None:
            found = f"no node is at {node.kv_source!r}{suggest(node.kv_source, sources)}"
        elif _layer(node.kv_source) >= _layer(path):
            found = f"expected an earlier layer, found {node.kv_source}"
        else:
            found = node.sharing_problem(source)
        if found is not None:
            yield path, found


def _layer(path: str) -> int:
    return int(path.split(".")[1])


def _differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Outermost paths first: a part that exists on one side only, or has another kind, is one difference."""
    maps, lists = ([isinstance(value, kind) for value in (one, other)] for kind in (Mapping, list))
    if (all(maps) and one.get("kind") == other.get("kind")) or (all(lists) and _holds_maps(one) and _holds_maps(other)):
        here, there = dict(paths.steps(one)), dict(paths.steps(other))
        for step in dict.fromkeys([*here, *there]):
            yield from _differences(here.get(step), there.get(step), f"{path}.{step}" if path else step)
        names = [[name for name in side if name in here and name in there] for side in (here, there)]
        if names[0] != names[1] and "kind" not in here:
            yield path, (list(here), list(there))
    elif one != other:
        yield path, (one, other)


def _holds_maps(values: list[Any]) -> bool:
    return any(isinstance(value, Mapping) for value in values)


def _edit(data: Any, path: paths.Steps, value: Any) -> None:
    if value is None and len(path) > 1 and is_open(ModelSpec, data, path[:-1]):
        del paths.get(data, path[:-1])[path[-1]]
    else:
        paths.put(data, path, value)
