"""The fields of spec classes as text, for `fusiontree kinds KIND` and for the reference in the documentation. The text
is generated from the classes, so that it cannot differ from them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic_core import PydanticUndefined

from fusiontree.core.spec.base import LARGEST, OrderedMap, Spec
from fusiontree.core.spec.registry import KindFamily

_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", dict: "mapping"}
_BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


@dataclass(frozen=True)
class FieldText:
    """One field: its name in files, the values allowed, its default (None if the field is required), and its meaning
    from the docstring of the class."""

    name: str
    allowed: str
    default: str | None
    meaning: str


def fields(spec: type[Spec]) -> list[FieldText]:
    """The fields of a spec class in their order, without `kind`.

    >>> from fusiontree.branches import Mlp
    >>> fields(Mlp)[1]
    FieldText(name='hidden', allowed='integer >= 1', default=None, meaning='')
    """
    found, meanings = [], _meanings(spec)
    for name, field in spec.model_fields.items():
        if name != "kind":
            allowed = _allowed(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
            found.append(FieldText(field.alias or name, allowed, _default(field.default), meanings.get(name, "")))
    return found


def summary(spec: type[Spec]) -> str:
    """The docstring of a class without its list of attributes."""
    return cleandoc(spec.__doc__ or "").split("\nAttributes:")[0].strip()


def _meanings(spec: type[Spec]) -> dict[str, str]:
    """The text of each entry in the `Attributes:` of a docstring, by name."""
    _, _, listed = cleandoc(spec.__doc__ or "").partition("\nAttributes:\n")
    entries = re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", listed, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _default(value: Any) -> str | None:
    if value is PydanticUndefined:
        return None
    if isinstance(value, Spec):
        return _flow(value.data(short=True))
    return _flow(dict(value) if isinstance(value, OrderedMap) else value)


def _flow(value: Any) -> str:
    """Plain data as one line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _allowed(annotation: Any) -> str:
    """The values that a field of this type allows, in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotated(inside[0], inside[1:])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_allowed(part) for part in inside))
    if origin is Literal:
        return ", ".join(map(str, inside))
    if origin is tuple:
        parts = [_allowed(part) for part in inside if part is not Ellipsis]
        return f"list of {parts[0]}" if Ellipsis in inside else f"[{', '.join(parts)}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of names to {_allowed(inside[-1])}"
    if annotation is NoneType:
        return "null"
    return _WORDS.get(annotation) or getattr(annotation, "__name__", str(annotation))


def _annotated(base: Any, marks: tuple[Any, ...]) -> str:
    for mark in marks:
        if isinstance(mark, KindFamily):
            return f"any {mark.name}"
    bounds = " and ".join(_bounds(marks))
    return f"{_allowed(base)} {bounds}".strip()


def _bounds(marks: tuple[Any, ...]) -> Iterator[str]:
    for mark in marks:
        yield from _bounds(tuple(getattr(mark, "metadata", ())))
        if type(mark) in _BOUNDS:
            sign, name = _BOUNDS[type(mark)]
            limit = getattr(mark, name)
            if abs(limit) < LARGEST:
                yield f"{sign} {limit:g}"


def below(spec: type[Spec]) -> list[type[Spec]]:
    """A spec class and the spec classes of its fields, recursively, each once; without kinds of families.

    >>> from fusiontree import LayerSpec
    >>> [part.__name__ for part in below(LayerSpec)]
    ['LayerSpec', 'Norm', 'Residual']
    """
    found, left = [], [spec]
    while left:
        found.append(left.pop(0))
        parts = (part for field in found[-1].model_fields.values() for part in _classes(field.annotation))
        left += [part for part in dict.fromkeys(parts) if part not in found + left]
    return found


def _classes(annotation: Any) -> Iterator[type[Spec]]:
    inside = get_args(annotation)
    if any(isinstance(mark, KindFamily) for mark in inside):
        return
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        yield annotation
    for part in inside:
        yield from _classes(part)


def markdown(title: str, spec: type[Spec]) -> str:
    """A section of a page: the docstring of a class, and its fields as a table."""
    columns = [[f"`{f.name}`", f.allowed, "*needed*" if f.default is None else f"`{f.default}`"] for f in fields(spec)]
    head = ["field", "holds", "default"]
    if any(f.meaning for f in fields(spec)):
        head.append("what it is")
        columns = [[*row, f.meaning] for row, f in zip(columns, fields(spec), strict=True)]
    table = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *columns]] if columns else []
    return "\n".join([f"### {title}", "", summary(spec), "", *table, ""])
