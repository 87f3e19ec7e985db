"""Public model families: from a config to a spec, from their tensors to ours, and back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError
from fusiontree.zoo.computed import FREQUENCIES, check_computed, check_frequencies
from fusiontree.zoo.options import Options
from fusiontree.zoo.tensors import Deduplicated, Part, to_ours, to_theirs

Config = Mapping[str, Any]
"""The contents of a config.json."""
Data = dict[str, Any]
HEAD = "lm_head.weight"
"""The name of the head's weight in all families."""


class Family(ABC):
    """A family of models, as transformers names it.

    Attributes:
        name: the `model_type` of its configs.
        architecture: the class in transformers that has the head.
        defaults: values of the family's class for options that published configs leave out.
        unused: how the names of skipped tensors begin. transformers skips them too: their modules only serve other
            ways to decode. The lineage notes them.
        stored: whether tensors have their names in files (`files`) or in modules of transformers (`tensors`).
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    defaults: ClassVar[Config] = {}
    unused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, stored: bool = False) -> None:
        self.stored = stored

    @abstractmethod
    def spec(self, options: Options) -> Data:
        """Plain data of the spec that a config describes; reads every option that matters."""

    @abstractmethod
    def config(self, reader: "Reader") -> Data:
        """A config for a spec of this family. It may ignore fields that the family does not have: `config_of` reads
        the config back and compares the specs."""

    @abstractmethod
    def tensors(self, spec: ModelSpec) -> Iterator[Part]:
        """The correspondences for a spec of this family, with the names of modules in transformers."""

    def files(self, spec: ModelSpec) -> Iterator[Part]:
        """The correspondences with the names in files, if transformers reads them into modules of other names."""
        yield from self.tensors(spec)

    def computed(self, options: Options) -> Mapping[str, Callable[[], Tensor]]:
        """Tensors that files may hold although they follow from the config: by name, a function that computes each.
        (Tied heads and frequencies of rotations are checked for all families.)"""
        return {}

    def newest(self, config: Config) -> Config:
        """The config in its newest form, for families of which transformers still reads an older form."""
        return config

    def copies(self, spec: ModelSpec) -> Mapping[str, str]:
        """Further names of tensors in shared modules, each with the first name of the tensor. Files may hold them,
        with the same values; they are not written."""
        return {}

    def options(self, config: Config, ignore: Iterable[str] = ()) -> Options:
        """The options of a config, with the family's defaults."""
        return Options(self.name, self.newest(config), self.defaults, ignore)

    def spec_of(self, config: Config, *, ignore: Iterable[str] = ()) -> ModelSpec:
        """The spec of a config.

        Args:
            ignore: unknown keys to pass over; `rope_parameters.KEY` for those inside.

        Raises:
            FusionTreeError: an option is missing, unknown, or not expressed, or a key to ignore is known or absent;
                names the key.
        """
        options = self.options(config, ignore)
        try:
            data = self.spec(options)
        except FusionTreeError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            found = f"{options.last}: {self.name} cannot read {options.get(options.last, None)!r:.60}"
            raise FusionTreeError(f"config.json: {found} ({error})") from None
        options.finish()
        return ModelSpec.parse({"format": 1, **data}).fold()

    def config_of(self, spec: ModelSpec) -> Data:
        """The config of a spec.

        Raises:
            FusionTreeError: the family cannot express the spec; names the node.
        """
        found = {"architectures": [self.architecture], "model_type": self.name, **self.config(Reader(self, spec))}
        differences = spec.diff(self.spec_of(found))
        if differences:
            path = min(differences, key=lambda path: not path.startswith("layers."))  # what is built comes first
            wanted, possible = differences[path]
            raise FusionTreeError(f"{path}: {self.name} has {_brief(possible)} there, found {_brief(wanted)}")
        return found

    def weights_of(
        self, config: Config, theirs: Mapping[str, Tensor], *, ignore: Iterable[str] = ()
    ) -> dict[str, Tensor]:
        """The state dict of the spec's model; `ignore` as in `spec_of`.

        Raises:
            WeightsError: a tensor is missing or extra, has other rows than the config says, or has other values
                than under its other name or than computed from the config.
        """
        spec = self.spec_of(config, ignore=ignore)
        parts, copies = [*self._parts(spec)], self._all_copies(spec)
        computed = check_computed(theirs, self.computed(self.options(config)))
        if any(name.endswith(FREQUENCIES) for name in theirs):
            computed |= check_frequencies(theirs, spec, parts, copies)
        unused = [name for names in self.left_out(theirs).values() for name in names]
        return to_ours(parts, Deduplicated(theirs, copies), ignored=[*computed, *unused])

    def left_out(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The names that begin as `unused` says, grouped by that beginning."""
        found = {part: [name for name in names if name.startswith(part)] for part in self.unused}
        return {part: inside for part, inside in found.items() if inside}

    def all_copies(self, config: Config, *, ignore: Iterable[str] = ()) -> dict[str, str]:
        """`copies` for the spec of a config, and the head if it is tied."""
        return self._all_copies(self.spec_of(config, ignore=ignore))

    def _all_copies(self, spec: ModelSpec) -> dict[str, str]:
        places = {ours: part.names()[0] for part in self._parts(spec) for ours in part.places()}
        tied = {} if HEAD in places.values() else {HEAD: places["embedding.weight"]}
        return tied | dict(self.copies(spec))

    def weights_to(self, config: Config, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The family's state dict, from ours."""
        return to_theirs(self._parts(self.spec_of(config)), ours)

    def _parts(self, spec: ModelSpec) -> Iterator[Part]:
        return self.files(spec) if self.stored else self.tensors(spec)

    def in_files(self) -> "Family":
        """This family with the tensor names of files."""
        return type(self)(stored=True)


class Reader:
    """A spec, from which a family writes its config."""

    def __init__(self, family: Family, spec: ModelSpec) -> None:
        self.family, self.spec = family, spec
        self.layers = spec.expanded_layers()

    def first(self, kind: str) -> Any:
        """The first node of a kind.

        Raises:
            FusionTreeError: there is none.
        """
        node = self.find(kind)
        if node is None:
            have = ", ".join(dict.fromkeys(node.kind for node in self._nodes())) or "none"
            raise FusionTreeError(f"layers: {self.family.name} has {kind}, found only {have}")
        return node

    def find(self, kind: str) -> Any:
        """The first node of a kind, or None."""
        return next((node for node in self._nodes() if node.kind == kind), None)

    def _nodes(self) -> Iterator[Any]:
        yield from (node for _, node in self.spec.nodes())

    def encoding(self, kind: str) -> Any:
        """The first encoding of a kind, or None."""
        return next((each for each in self.spec.encodings.values() if getattr(each, "kind", None) == kind), None)


FAMILIES: dict[str, Family] = {}
FamilyT = TypeVar("FamilyT", bound=Family)


def register(family: type[FamilyT]) -> type[FamilyT]:
    """Adds a family to `FAMILIES` under its name."""
    assert family.name not in FAMILIES, f"two families are named {family.name!r}"
    FAMILIES[family.name] = family()
    return family


def _brief(value: Any) -> str:
    """A part of a spec in a few words."""
    if isinstance(value, NodeSpec):
        value = value.data()
    if isinstance(value, Mapping):
        return str(value.get("kind", "something else"))
    return "nothing" if value is None else repr(value)
