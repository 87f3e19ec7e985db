"""Looks up the field types of specs at a path of plain data."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from fusiontree.core.spec import paths
from fusiontree.core.spec.base import OrderedMap, Spec
from fusiontree.core.spec.paths import Steps
from fusiontree.core.spec.registry import KindFamily
from fusiontree.errors import SpecError


def is_open(spec: type[Spec], data: Any, path: Steps) -> bool:
    """Whether a path in a spec's data leads to a mapping with free names, by the types of the fields on the way.
    False inside data of an unknown kind."""
    kinds: list[Any] = [spec]
    for step in path:
        kinds = [inner for kind in kinds for outer in _plain(kind, data) for inner in _inside(outer, step)]
        data = data[int(step)] if isinstance(data, list) else data[step]
    return isinstance(data, Mapping) and any(_is_map(each) for kind in kinds for each in _plain(kind, data))


def targets(spec: type[Spec], data: Any, pattern: str, *, adding: bool) -> list[Steps]:
    """The places that a pattern matches in the data of a spec; with `adding`, also a new name in an open mapping.

    Raises:
        SpecError: nothing matches; the text has the nearest path.
    """
    *above, last = paths.split(pattern) or ("",)
    if adding and above and last != "*":
        with suppress(SpecError):
            parents = [path for path in paths.find(data, ".".join(above)) if is_open(spec, data, path)]
            if parents:
                return [(*path, last) for path in parents]
    return paths.find(data, pattern)


def _plain(kind: Any, data: Any) -> Iterator[Any]:
    """The concrete types of a field: each choice of a union, and for a family the kind that the data names."""
    if isinstance(kind, KindFamily):
        name = data.get("kind") if isinstance(data, Mapping) else None
        try:
            yield kind.get(str(name))
        except SpecError:
            return
    elif get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        families = [mark for mark in marks if isinstance(mark, KindFamily)]
        for each in families or [inner]:
            yield from _plain(each, data)
    elif get_origin(kind) in (Union, UnionType):
        for choice in get_args(kind):
            yield from _plain(choice, data)
    else:
        yield kind


def _inside(kind: Any, step: str) -> Iterator[Any]:
    """The field types one step inside a type."""
    if isinstance(kind, type) and issubclass(kind, Spec):
        for name, field in kind.model_fields.items():
            if step in (name, field.alias):
                families = [mark for mark in field.metadata if isinstance(mark, KindFamily)]
                yield from families or [field.annotation]
    elif _is_map(kind) or get_origin(kind) is tuple:
        yield get_args(kind)[0]


def _is_map(kind: Any) -> bool:
    """Whether `kind` is the type of a mapping with free names."""
    return isinstance(get_origin(kind), type) and issubclass(get_origin(kind), OrderedMap)
