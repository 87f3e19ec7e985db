"""Families of components: registries that validate fields and that plugins can extend at any time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema as cs

from fusiontree.core.spec.base import Spec, invalid
from fusiontree.errors import SpecError, suggest

S = TypeVar("S", bound=Spec)
K = TypeVar("K", bound=Spec)


class KindFamily(ABC, Generic[S]):
    """The kinds of one family. As the `Annotated` marker of a field, it lets the field hold any of these kinds.

    The kind is looked up when a value is validated. Kinds registered later are therefore found, families may
    contain themselves, and the JSON Schema lists the kinds known at the time of the call.
    """

    def __init__(self, name: str, base: type[S]) -> None:
        self.name, self.base = name, base
        self._writing = False

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all kinds, sorted."""

    @abstractmethod
    def get(self, kind: str) -> type[S]:
        """The spec class of a kind.

        Raises:
            SpecError: no such kind; the text has the nearest name and the known names.
        """

    def parse(self, value: Any) -> S:
        """The spec that a mapping with a `kind` describes; a spec of this family is returned as it is."""
        if isinstance(value, self.base):
            return value
        if not isinstance(value, Mapping) or "kind" not in value:
            known = ", ".join(self.names())
            wanted = f"expected a mapping with the 'kind' of the {self.name} (known: {known})"
            raise invalid({(): f"{wanted}, found {value!r:.60}"})
        try:
            spec = self.get(str(value["kind"]))
        except SpecError as error:
            raise invalid({("kind",): str(error)}) from None
        return spec.model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> cs.CoreSchema:
        write = cs.wrap_serializer_function_ser_schema(lambda value, write: write(value), schema=cs.any_schema())
        return cs.no_info_plain_validator_function(self.parse, serialization=write)

    def __get_pydantic_json_schema__(self, schema: cs.CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = cs.definition_reference_schema(f"{self.name}:family")
        if self._writing:  # a family that contains itself
            return handler(reference)
        self._writing = True
        try:
            kinds = {kind: spec.__pydantic_core_schema__ for kind, spec in self.usable()}
            union = cs.tagged_union_schema(dict(kinds), discriminator="kind", ref=f"{self.name}:family")
            return _with_kinds(handler(cs.definitions_schema(reference, [union])), handler)
        finally:
            self._writing = False

    def usable(self) -> Iterator[tuple[str, type[S]]]:
        """The kinds and classes that can be loaded; a broken plugin fails only where its kind is named."""
        for kind in self.names():
            with suppress(SpecError):
                yield kind, self.get(kind)


def _with_kinds(schema: JsonSchemaValue, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    """The schema of a family in which every kind requires the key `kind`, as `KindFamily.parse` does."""
    for choice in handler.resolve_ref_schema(schema).get("oneOf", []):
        model = handler.resolve_ref_schema(choice)
        model["required"] = ["kind", *(key for key in model.get("required", []) if key != "kind")]
    return schema


class Registry(KindFamily[S]):
    """The kinds of one family: built in, registered by a decorator, or offered by an installed package.

    A package offers a kind by an entry point in the group `fusiontree.<family>` whose name is the kind.
    It is imported when the kind is used, so a broken plugin fails only then.
    """

    def __init__(self, name: str, base: type[S], *, home: str | None = None) -> None:
        """`home` is the module that registers the library's own kinds; it is imported at the first lookup."""
        super().__init__(name, base)
        self.home = home
        self._kinds: dict[str, type[Any]] = {}
        self.siblings: tuple[Registry[Any], ...] = (self,)

    @property
    def registered(self) -> dict[str, type[Any]]:
        """The registered kinds, always including the library's own."""
        if self.home:
            import_module(self.home)
        return self._kinds

    def register(self, spec: type[K]) -> type[K]:
        """Add a spec class under the default of its `kind` field.

        Raises:
            TypeError: the class does not derive from the family's base, or has no `kind` with a default.
            ValueError: another class has this kind already, here or in a family that may appear in the same field.
        """
        base: type[Any] = self.base
        if not issubclass(spec, base):
            raise TypeError(f"{spec.__qualname__} is no {self.name}: it does not derive from {base.__qualname__}")
        field = spec.model_fields.get("kind")
        if field is None or not isinstance(field.default, str):
            raise TypeError(f"{spec.__qualname__} needs a field kind: Literal['name'] = 'name'")
        known = next((f.registered[field.default] for f in self.siblings if field.default in f.registered), None)
        if known and (known.__module__, known.__qualname__) != (spec.__module__, spec.__qualname__):
            both = " and ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in (known, spec))
            raise ValueError(f"two {self.name} kinds are called {field.default!r}: {both}")
        self._kinds[field.default] = spec
        return spec

    @cached_property
    def plugins(self) -> dict[str, EntryPoint]:
        """The entry points of installed packages, by kind; no plugin is imported."""
        return {point.name: point for point in entry_points(group=f"fusiontree.{self.name}")}

    def names(self) -> list[str]:
        return sorted({*self.registered, *self.plugins})

    def get(self, kind: str) -> type[S]:
        """The spec class of a kind; the plugin that offers it is imported when needed."""
        point = self.plugins.get(kind)
        if point and kind not in self.registered:
            self._load(point)
        if kind not in self.registered:
            raise SpecError(f"no {self.name} is called {kind!r}{suggest(kind, self.names())}")
        spec = self.registered[kind]
        if point and point.module.split(".")[0] != spec.__module__.split(".")[0]:
            both = f"{spec.__module__}.{spec.__qualname__} and {point.value}"
            raise SpecError(f"two {self.name} kinds are called {kind!r}: {both}")
        return spec

    def _load(self, point: EntryPoint) -> None:
        rivals = entry_points(group=point.group, name=point.name)
        if len(rivals) > 1:
            offers = sorted(f"{p.value} of {p.dist.name if p.dist else 'no package'}" for p in rivals)
            raise SpecError(f"several packages offer the {self.name} {point.name!r}: {' and '.join(offers)}")
        try:
            point.load()
        except Exception as error:
            text = f"the plugin of {self.name} {point.name!r} ({point.value}) failed: {type(error).__name__}: {error}"
            raise SpecError(text) from error
        if point.name not in self.registered:
            raise SpecError(f"the plugin {point.value} was imported but registered no {self.name} {point.name!r}")


class OneOf(KindFamily[S]):
    """Several families as one, for a field that holds a kind of any of them."""

    def __init__(self, name: str, base: type[S], families: tuple[Registry[Any], ...]) -> None:
        super().__init__(name, base)
        self.families = families
        for family in families:
            family.siblings = families

    def names(self) -> list[str]:
        return sorted({kind for family in self.families for kind in family.names()})

    def get(self, kind: str) -> type[S]:
        for family in self.families:
            if kind in family.names():
                return family.get(kind)
        raise SpecError(f"no {self.name} is called {kind!r}{suggest(kind, self.names())}")
