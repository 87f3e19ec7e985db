"""What the zoo knows of a public model family: its config as a spec, its tensors as ours, and both ways back."""

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
"""What stands in a config.json."""
Data = dict[str, Any]
HEAD = "lm_head.weight"
"""What all families call the head's weight."""


class Family(ABC):
    """A family of models, as transformers names it.

    Attributes:
        name: the `model_type` of its configs.
        architecture: the class in transformers that has the head.
        defaults: options of the family's class that published configs leave out.
        unused: how names begin of tensors that transformers does not read either: of parts that only help another
            way to decode. The lineage notes them.
        stored: whether its tensors are those of files (`files`), and not those of modules in transformers.
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
        """A config for a spec of this family. It may overlook what the family does not have: `config_of` compares
        what comes back."""

    @abstractmethod
    def tensors(self, spec: ModelSpec) -> Iterator[Part]:
        """Which of their tensors are which of ours, in a spec of this family."""

    def files(self, spec: ModelSpec) -> Iterator[Part]:
        """The same of the tensors in files, where transformers reads them into modules of other names."""
        yield from self.tensors(spec)

    def computed(self, options: Options) -> Mapping[str, Callable[[], Tensor]]:
        """Tensors that may be there and say what we compute from the config, with their values. (A head that is tied
        and frequencies of rotations are looked at for all families.)"""
        return {}

    def newest(self, config: Config) -> Config:
        """A config in the form of today, where transformers still reads an older one."""
        return config

    def copies(self, spec: ModelSpec) -> Mapping[str, str]:
        """Tensors of shared modules under further names, each with the name under which it is known. They may be
        there, with the same values, and are not written."""
        return {}

    def options(self, config: Config, ignore: Iterable[str] = ()) -> Options:
        """A config with the family's defaults."""
        return Options(self.name, self.newest(config), self.defaults, ignore)

    def spec_of(self, config: Config, *, ignore: Iterable[str] = ()) -> ModelSpec:
        """The spec of a config.

        Args:
            ignore: unknown keys to pass over; `rope_parameters.KEY` for those inside.

        Raises:
            FusionTreeError: it has an option that is missing, unknown, or not expressed, or a key to be ignored is
                known or not there; names the key.
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
            FusionTreeError: the family cannot express it; names the node.
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
            WeightsError: a tensor is missing, extra, has other rows than the config says, other values than one
                that is the same by another name, or others than those that we compute.
        """
        spec = self.spec_of(config, ignore=ignore)
        parts, copies = [*self._parts(spec)], self._all_copies(spec)
        computed = check_computed(theirs, self.computed(self.options(config)))
        if any(name.endswith(FREQUENCIES) for name in theirs):
            computed |= check_frequencies(theirs, spec, parts, copies)
        unused = [name for names in self.left_out(theirs).values() for name in names]
        return to_ours(parts, Deduplicated(theirs, copies), ignored=[*computed, *unused])

    def left_out(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Those of these tensors that are `unused`, by how they begin."""
        found = {part: [name for name in names if name.startswith(part)] for part in self.unused}
        return {part: inside for part, inside in found.items() if inside}

    def all_copies(self, config: Config, *, ignore: Iterable[str] = ()) -> dict[str, str]:
        """`copies`, and a head beside a config that ties it."""
        return self._all_copies(self.spec_of(config, ignore=ignore))

    def _all_copies(self, spec: ModelSpec) -> dict[str, str]:
        places = {ours: part.names()[0] for part in self._parts(spec) for ours in part.places()}
        tied = {} if HEAD in places.values() else {HEAD: places["embedding.weight"]}
        return tied | dict(self.copies(spec))

    def weights_to(self, config: Config, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The family's state dict."""
        return to_theirs(self._parts(self.spec_of(config)), ours)

    def _parts(self, spec: ModelSpec) -> Iterator[Part]:
        return self.files(spec) if self.stored else self.tensors(spec)

    def in_files(self) -> "Family":
        """The family whose tensors are those of files."""
        return type(self)(stored=True)


class Reader:
    """A spec, from which a family takes what its configs say."""

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
    """Make a family known by its name."""
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
