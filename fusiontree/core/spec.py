"""What every part of a spec is: a frozen, strict description; equal specs build equal things."""

import re
from collections.abc import Callable, ItemsView, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_core import core_schema as cs
from pydantic_core.core_schema import ErrorType
from torch import nn

from fusiontree.core import yaml
from fusiontree.errors import SpecError, suggest

LARGEST = 2**31 - 1
Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
"""How many of something there are: at least one."""
Natural = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
"""How many of something there are: none is allowed."""
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number."""
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
"""A finite number above 0."""
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
"""A finite number that is at least 0."""
Flag = Annotated[bool, Field(strict=True)]
"""Yes or no, and not 0, 1 or a word."""
_TAKEN = frozenset(dir(nn.ModuleDict()))


def _not_taken(name: str) -> str:
    if name in _TAKEN:
        raise invalid({(): f"{name!r} is the name of a part of every module; choose another"})
    return name


Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z][A-Za-z0-9_]*$"), AfterValidator(_not_taken)]
"""A name that can be a step of a path: that of a module inside a `torch.nn.ModuleDict`, too."""


Place = tuple[str | int, ...]
"""Where something is wrong: the steps of a path."""


class _SchemaGenerator(GenerateJsonSchema):
    """Writes defaults that are ordered mappings."""

    def encode_default(self, dft: Any) -> Any:
        return super().encode_default(dict(dft) if isinstance(dft, OrderedMap) else dft)


class Spec(BaseModel):
    """A frozen description of something. Unknown keys are errors, and `kind` is always written, first.

    Raises:
        SpecError: a field that is not valid; the line that `parse` answers with.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(one_line(error)) from None

    # pydantic calls no __init__ that bears this mark for what stands inside another spec, whose errors keep their path
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in known and key not in cls.model_fields]
            if unknown:
                raise invalid({(str(key),): f"unknown key{suggest(str(key), known)}" for key in unknown})
        return value

    @model_serializer(mode="wrap")
    def _write_kind_first(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kind = getattr(self, "kind", None)
        return ({"kind": kind} if kind else {}) | write(self)

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """The JSON Schema (Draft 2020-12); every kind that is registered when it is asked for is in it."""
        return super().model_json_schema(*args, **{"schema_generator": _SchemaGenerator, **options})

    def data(self, *, short: bool = False) -> dict[str, Any]:
        """Plain data: every field, or (short) those that differ from their defaults."""
        return self.model_dump(mode="json", exclude_defaults=short)

    @classmethod
    def parse(cls, data: Any) -> Self:
        """The spec that plain data describes.

        Raises:
            SpecError: one line, with the path of the first thing that is wrong.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError(one_line(error)) from None

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read a YAML or JSON file.

        Raises:
            SpecError: no such file, not YAML, or not a valid spec; one line that begins with the file's name.
        """
        data = yaml.read_file(Path(path))
        try:
            return cls.parse(data)
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from None


def invalid(problems: Mapping[Place, str]) -> ValidationError:
    """A validation error with a message at each location; raised inside validators, it keeps the path."""
    lines = [
        InitErrorDetails(type=PydanticCustomError("invalid", "{text}", {"text": text}), loc=loc, input=None)
        for loc, text in problems.items()
    ]
    return ValidationError.from_exception_data("spec", lines)


def relocated(error: ValidationError, move: Callable[[Place], Place]) -> ValidationError:
    """The same problems at other places."""
    lines = []
    for details in error.errors(include_url=False):
        known, kind = details["type"] in get_args(ErrorType), cast(Any, details["type"])
        found = kind if known else PydanticCustomError(kind, "{text}", {"text": details["msg"]})
        rest = {"ctx": details["ctx"]} if known and "ctx" in details else {}
        lines.append(InitErrorDetails(type=found, loc=move(details["loc"]), input=details["input"], **rest))
    return ValidationError.from_exception_data("spec", lines)


_WANTED = {
    "tuple_type": "a list is needed",
    "list_type": "a list is needed",
    "dict_type": "a mapping is needed",
    "model_type": "a mapping is needed",
    "string_type": "a text is needed",
    "int_type": "an integer is needed",
    "int_from_float": "an integer is needed",
    "float_type": "a number is needed",
    "bool_type": "true or false is needed",
    "missing": "is needed, found nothing",
}
"""What pydantic says in Python's words, in those of a file."""


def one_line(error: ValidationError) -> str:
    """The first problem as `path: found, allowed`, and how many more there are."""
    details = error.errors(include_url=False)
    first, more = details[0], len(details) - 1
    path = ".".join(str(step) for step in first["loc"] if step != "[key]") or "spec"
    text = _WANTED.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    found = "" if first["type"] in ("invalid", "missing", "value_error") else f", found {_brief(first['input'])}"
    return f"{path}: {text}{found}{_nearest(first)}" + (f" (and {more} more)" if more else "")


def _nearest(details: ErrorDetails) -> str:
    """For a value that is not one of a few words: the nearest of them."""
    allowed = re.findall(r"'([^']*)'", str(details.get("ctx", {}).get("expected", "")))
    near = get_close_matches(str(details["input"]), allowed, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


V = TypeVar("V")


class OrderedMap(Mapping[str, V], Generic[V]):
    """An immutable mapping whose order counts: it enters equality and the hash.

    >>> OrderedMap(a=1, b=2) == OrderedMap(b=2, a=1)
    False
    """

    key: ClassVar[Any] = str

    def __init__(self, items: Mapping[str, V] | None = None, /, **more: V) -> None:
        self._items = {**(items or {}), **more}

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> ItemsView[str, V]:
        """Names with values, in order."""
        return self._items.items()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return list(self.items()) == list(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return f"OrderedMap({self._items!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> cs.CoreSchema:
        plain = handler.generate_schema(dict[cls.key, source.__args__[0]])
        unwrap = cs.no_info_before_validator_function(_plain_mapping, plain)
        return cs.no_info_after_validator_function(
            cls,
            unwrap,
            serialization=cs.wrap_serializer_function_ser_schema(lambda value, write: write(dict(value)), schema=plain),
        )


class NamedMap(OrderedMap[V], Generic[V]):
    """An ordered mapping whose keys are steps of paths."""

    key = Name


def _plain_mapping(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
