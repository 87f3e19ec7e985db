"""The base class of every part of a spec: a frozen, strict description. Equal specs build equal modules."""

import re
from collections.abc import Callable, ItemsView, Iterator, Mapping
from difflib import get_close_matches
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar, cast, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
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

from fusiontree.core.spec import yaml
from fusiontree.errors import SpecError, suggest

LARGEST = 2**31 - 1
Count = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
"""A number of parts, at least one."""
Natural = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
"""A number of parts, 0 included."""
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number."""
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
"""A finite number above 0."""
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
"""A finite number that is at least 0."""
Flag = Annotated[bool, Field(strict=True)]
"""True or false; 0, 1 and text are refused."""
_TAKEN = frozenset(dir(nn.ModuleDict()))


def _not_taken(name: str) -> str:
    if name in _TAKEN:
        raise invalid({(): f"{name!r} is the name of a part of every module; choose another"})
    if iskeyword(name):
        raise invalid({(): f"{name!r} is a word of Python, which torch.export cannot write as a name; choose another"})
    return name


Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z][A-Za-z0-9_]*$"), AfterValidator(_not_taken)]
"""A name that can be a step of a path, and the name of a module in a `torch.nn.ModuleDict`."""


Place = tuple[str | int, ...]
"""The place of a problem: the steps of a path."""


class _SchemaGenerator(GenerateJsonSchema):
    """Also encodes defaults that are an `OrderedMap`."""

    def encode_default(self, dft: Any) -> Any:
        return super().encode_default(dict(dft) if isinstance(dft, OrderedMap) else dft)


Problems = Iterator[tuple[str, str]]
"""Pairs (path inside a part, message)."""


class Spec(BaseModel):
    """A frozen description of a part. Unknown keys are errors. `kind` is always written, as the first key.

    Attributes:
        elsewhere: keys that belong to another kind of file, each with the hint for its message.

    Raises:
        SpecError: a field is not valid; the message is the same as from `parse`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )
    elsewhere: ClassVar[Mapping[str, str]] = {}

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(*said(error)) from None

    # for a spec inside another spec, pydantic does not call an __init__ with this mark, so its errors keep their path
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Report unknown keys together with all other problems."""
        plainer = isinstance(value, Spec) and type(value) is not cls and issubclass(cls, type(value))
        value = value.data() if plainer else value  # such as a Norm where a subclass with more fields is expected
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = (
            [k for k in value if k not in known and k not in cls.model_fields] if isinstance(value, Mapping) else []
        )
        if not unknown:
            return cls._with_meanings(handler, value)
        hints = {str(key): cls.elsewhere.get(str(key)) or suggest(str(key), known) for key in unknown}
        problems = invalid({(key,): f"unknown key{hint}" for key, hint in hints.items()})
        try:
            cls._with_meanings(handler, {key: inside for key, inside in value.items() if key not in unknown})
        except ValidationError as error:
            problems = together(problems, error)
        raise problems

    @classmethod
    def _with_meanings(cls, handler: ModelWrapValidatorHandler[Self], value: Any) -> Self:
        """A missing field's message uses the field's description, if it has one."""
        try:
            return handler(value)
        except ValidationError as error:
            texts: dict[Place, str | None] = {(f.alias or n,): f.description for n, f in cls.model_fields.items()}
            found = [_described(details, texts) for details in error.errors(include_url=False)]
            raise ValidationError.from_exception_data("spec", found) from None

    @model_serializer(mode="wrap")
    def _write_kind_first(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kind = getattr(self, "kind", None)
        return ({"kind": kind} if kind else {}) | write(self)

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        """The JSON Schema (Draft 2020-12), with every kind that is registered at the time of the call."""
        return super().model_json_schema(*args, **{"schema_generator": _SchemaGenerator, **options})

    def data(self, *, short: bool = False) -> dict[str, Any]:
        """Plain data: every field, or (short) only the fields that differ from their defaults."""
        return self.model_dump(mode="json", exclude_defaults=short)

    @classmethod
    def parse(cls, data: Any) -> Self:
        """The spec that plain data describes.

        Raises:
            SpecError: one line with the path of the first problem; `problems` has all of them.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError(*said(error)) from None

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
            raise error.within(path) from None


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts directly inside a spec, a mapping or a tuple, each with its step of a path."""
    if isinstance(value, Spec):
        yield from ((field.alias or name, getattr(value, name)) for name, field in type(value).model_fields.items())
    elif isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple):
        yield from ((str(index), item) for index, item in enumerate(value))


def invalid(problems: Mapping[Place, str]) -> ValidationError:
    """A validation error with a message at each place. Raised inside a validator, it keeps the path to the place."""
    lines = [
        InitErrorDetails(type=PydanticCustomError("invalid", "{text}", {"text": text}), loc=loc, input=None)
        for loc, text in problems.items()
    ]
    return ValidationError.from_exception_data("spec", lines)


def relocated(error: ValidationError, move: Callable[[Place], Place]) -> ValidationError:
    """The same problems at other places."""
    lines = [_line(details, move(details["loc"])) for details in error.errors(include_url=False)]
    return ValidationError.from_exception_data("spec", lines)


def together(*errors: ValidationError) -> ValidationError:
    """One error with the problems of several, in their order."""
    found = [details for error in errors for details in error.errors(include_url=False)]
    return ValidationError.from_exception_data("spec", [_line(details, details["loc"]) for details in found])


def _line(details: ErrorDetails, place: Place) -> InitErrorDetails:
    known, kind = details["type"] in get_args(ErrorType), cast(Any, details["type"])
    found = kind if known else PydanticCustomError(kind, "{text}", {"text": details["msg"]})
    rest = {"ctx": details["ctx"]} if known and "ctx" in details else {}
    return InitErrorDetails(type=found, loc=place, input=details["input"], **rest)


def _described(details: ErrorDetails, texts: Mapping[Place, str | None]) -> InitErrorDetails:
    text = texts.get(details["loc"]) if details["type"] == "missing" else None
    if text is None:
        return _line(details, details["loc"])
    said = PydanticCustomError("invalid", "{text}", {"text": f"expected {text}, found nothing"})
    return InitErrorDetails(type=said, loc=details["loc"], input=None)


_WANTED = {
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping",
    "string_type": "expected a text",
    "int_type": "expected an integer",
    "int_from_float": "expected an integer",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "missing": "is needed, found nothing",
}
"""Messages for pydantic's error types, in the terms of YAML instead of Python."""


def said(error: ValidationError) -> list[str]:
    """Every problem as `path: found, allowed`."""
    return [f"{'.'.join(place)}: {text}" for place, text in located(error)]


def located(error: ValidationError) -> list[tuple[tuple[str, ...], str]]:
    """Every problem as (steps of its path, message)."""
    every = [details for details in error.errors(include_url=False) if not _is_echo(details)]
    return [(tuple(str(s) for s in details["loc"] if s != "[key]") or ("spec",), _said(details)) for details in every]


def _is_echo(details: ErrorDetails) -> bool:
    """Whether pydantic reports a list as too short only because its items are invalid."""
    least = details.get("ctx", {}).get("min_length", 0)
    return details["type"] == "too_short" and len(details["input"]) >= least


def _said(details: ErrorDetails) -> str:
    text = _WANTED.get(details["type"]) or _expected(details["msg"].removeprefix("Value error, "))
    found = "" if details["type"] in ("invalid", "missing", "value_error") else f", found {_brief(details['input'])}"
    return f"{text}{found}{_nearest(details)}"


def _expected(message: str) -> str:
    """A message of pydantic in the words of ours."""
    return re.sub(
        "^Input should be (greater|less)?", lambda m: f"expected a number {m[1]}" if m[1] else "expected ", message
    )


def _nearest(details: ErrorDetails) -> str:
    """For a value that is none of the allowed words: the nearest word."""
    allowed = re.findall(r"'([^']*)'", str(details.get("ctx", {}).get("expected", "")))
    near = get_close_matches(str(details["input"]), allowed, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


V = TypeVar("V")


class OrderedMap(Mapping[str, V], Generic[V]):
    """An immutable mapping; equality and the hash depend on its order.

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
