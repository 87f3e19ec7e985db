"""The spec of a run: the fields of a run file, and how to read, edit and write it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from fusiontree.core.model.spec import ModelSpec
from fusiontree.core.model.weights import SPEC_FILE
from fusiontree.core.spec import paths, yaml
from fusiontree.core.spec.base import Flag, NamedMap, Spec, invalid
from fusiontree.core.spec.fields import targets
from fusiontree.data import ByteTokenizer, DataSpec
from fusiontree.errors import SpecError
from fusiontree.training.errors import RunError
from fusiontree.training.objectives import AnyObjective, CrossEntropy, ObjectiveSpec, objectives
from fusiontree.training.sections import (
    CheckpointSpec,
    EverySpec,
    OptimizerSpec,
    ParallelismSpec,
    ResolvedSpec,
    TrainingSpec,
    ValidationSpec,
)
from fusiontree.zoo.presets import load_spec

_ASIDE = frozenset({"output", "log", "checkpoint", "tensorboard", "validation", "resolved"})

Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class RunSpec(Spec):
    """One training run, complete: the same file gives the same run.

    Attributes:
        model: a preset's name, the path of a spec (in a run file: from the file's folder), or the spec itself. Once
            read, it is always the spec. A saved model is refused, because a run starts from new weights.
        text: called `data` in files; relative paths there are taken from the file's folder.
        training, optimizer, parallelism, checkpoint: see the sections.
        objectives: the terms of the loss, by name. The name is the kind unless `kind` is given, a number is the weight;
            cross entropy is always included, with the weight 1 by default.
        validation: null: never measure.
        monitor: how often to take gate statistics.
        log: how often to write metrics.
        tensorboard: whether to write metrics for TensorBoard too.
        seed: decides the starting weights, the order of the data and the noise of gates.
        output: the directory for all results, relative to the working directory; null: the folder of the run file.
        resolved: the values chosen for `auto`, written when a run begins; null before that.
    """

    elsewhere: ClassVar[Mapping[str, str]] = {"losses": "; it is called objectives"} | dict.fromkeys(
        ("vocab_size", "width", "layers"), " of a run file; specs have it, and a run file names its spec (model: PATH)"
    )
    format: Literal[1] = 1
    model: ModelSpec
    text: DataSpec = Field(alias="data")
    training: TrainingSpec
    optimizer: OptimizerSpec
    objectives: NamedMap[AnyObjective] = NamedMap(cross_entropy=CrossEntropy())
    validation: ValidationSpec | None = None
    monitor: EverySpec = EverySpec()
    log: EverySpec = EverySpec()
    parallelism: ParallelismSpec = ParallelismSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tensorboard: Flag = False
    seed: Seed = 0
    output: Annotated[str, Field(min_length=1)] | None = None
    resolved: ResolvedSpec | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if os.path.isfile(Path(value) / SPEC_FILE):
            raise invalid({(): _trained(Path(value))})
        return load_spec(value)

    @field_validator("objectives", mode="before")
    @classmethod
    def _in_short(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        given = {"cross_entropy": {}, **value}
        return {name: _whole_objective(str(name), each) for name, each in given.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        needed = ByteTokenizer.vocab_size
        if self.model.vocab_size < needed:
            raise invalid({("model", "vocab_size"): f"the data's tokens need {needed}, found {self.model.vocab_size}"})
        gated = any(True for _ in self.model.gates())
        for name, objective in self.objectives.items():
            if objective.reads_gates and not gated:
                raise invalid({("objectives", name): "it is of gates, and the model has none"})
        if not any(objective.weight for objective in self.objectives.values()):
            raise invalid({("objectives",): "one at least needs a weight above 0, found 0 for all"})
        asked = self.training.precision
        if self.resolved is not None and asked not in ("auto", self.resolved.precision):
            found = f"training.precision is {asked}, found {self.resolved.precision}; resolved=null takes it away"
            raise invalid({("resolved", "precision"): found})
        return self

    @classmethod
    def from_file(cls, path: Path | str, overrides: Iterable[str] | str = ()) -> Self:
        """Read a run file and edit it by `path=value` texts.

        Raises:
            SpecError: not YAML, not a run, or an edit that matches nothing; one line.
        """
        path = Path(path)
        folder = path.resolve().parent
        data = yaml.read_file(path)
        if isinstance(data, Mapping):
            data = {key: _located(value, folder) if key == "model" else value for key, value in data.items()}
        try:
            run = cls.parse(data).relative_to(folder)
        except SpecError as error:
            raise error.within(path) from None
        return run.override(overrides).relative_to(folder)

    def relative_to(self, folder: Path) -> Self:
        """The same run with relative data paths resolved against a folder; a null output becomes the folder."""
        output = str(folder) if self.output is None else self.output
        return self.model_copy(update={"text": self.text.relative_to(folder), "output": output})

    def override(self, overrides: Iterable[str] | str) -> Self:
        """The run with edits applied: `training.steps=20`, `model.layers.*.mixer.gate.granularity=token`.

        Values are YAML. Paths below `model` address the expanded spec (see `ModelSpec.replace`), all others the
        run file; relative paths of data are taken from the working directory.

        Raises:
            SpecError: not `path=value`, a path that matches nothing, or a run that is not valid.
        """
        edits = yaml.assignments(overrides)
        inside = {path.removeprefix("model."): value for path, value in edits.items() if path.startswith("model.")}
        data = self.data()
        for path, value in edits.items():
            if not path.startswith("model."):
                for target in self._targets(data, path, adding=value is not None):
                    paths.put(data, target, value)
        run = self.parse(data)
        run = run.model_copy(update={"text": run.text.relative_to(Path.cwd())})
        return self.parse(run.data() | {"model": _replaced(run.model, inside)}) if inside else run

    def _targets(self, data: Any, path: str, *, adding: bool) -> list[paths.Steps]:
        if not paths.matches(data, path) and paths.matches(self.model.expand().data(), path):
            raise SpecError(f"{path}: a run has none; its model has: model.{path}")
        if (section := path.split(".")[0]) in self.elsewhere:
            raise SpecError(f"{section}: unknown key{self.elsewhere[section]}")
        return targets(RunSpec, data, path, adding=adding)

    @property
    def directory(self) -> Path:
        """The directory of the results.

        Raises:
            RunError: `output` is null, which happens only if the run was not read from a file.
        """
        if self.output is None:
            raise RunError("output: expected a directory for the results, found null")
        return Path(self.output)

    def identity(self) -> dict[str, Any]:
        """Plain data of the fields that decide the results. `resolved` and the fields about output, logging,
        checkpoints and validation are left out."""
        data = {key: value for key, value in self.data().items() if key not in _ASIDE}
        return data | {"model": self.model.canonical()}

    def digest(self) -> str:
        """The first 12 hex digits of the SHA-256 of the identity's JSON."""
        text = json.dumps(self.identity(), separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def difference(self, other: "RunSpec") -> str | None:
        """The first field where two identities differ, as `path is A here and B there`; None if there is none."""
        here, there = paths.leaves(self.identity()), paths.leaves(other.identity())
        for path in dict.fromkeys([*here, *there]):
            if here.get(path) != there.get(path):
                return f"{path} is {_said(here.get(path))} here and {_said(there.get(path))} there"
        return None

    def to_yaml(self) -> str:
        """The resolved run file: the model inline, every other field written out, the output beside the file."""
        data = {key: value for key, value in self.data().items() if key != "output"}
        model = {"format": self.model.format} | self.model.data(short=True)
        return yaml.write(data | {"model": model})


def _trained(directory: Path) -> str:
    """The message for a saved model's directory given as `model`, with the alternatives."""
    found = f"{directory} is a saved model, and a run starts from new weights, never from those there"
    again = directory.parent / "run.yaml"
    resume = f"; to go on with the run that made it, train {again}" if again.is_file() else ""
    return f"{found}; for its spec alone give {directory / SPEC_FILE}{resume}; to train its weights, load it in Python"


def _said(value: Any) -> str:
    """A value as JSON, cut to 60 characters, for messages."""
    return f"{json.dumps(value, ensure_ascii=False):.60}"


def _located(model: Any, folder: Path) -> Any:
    """The name or path of a model with a path that exists in the folder made absolute."""
    return str(folder / model) if isinstance(model, str) and (folder / model).exists() else model


def _replaced(model: ModelSpec, edits: Mapping[str, Any]) -> ModelSpec:
    try:
        return model.replace(edits)
    except SpecError as error:
        raise error.within("model") from None


def _whole_objective(name: str, given: Any) -> Any:
    """An objective as a mapping with its kind. The kind is the name if `kind` is not given."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        given = {"weight": given}
    given = given.data() if isinstance(given, ObjectiveSpec) else given
    if not isinstance(given, Mapping):
        raise invalid({(name,): f"expected a weight (a number) or a mapping, found {given!r:.60}"})
    kind = given.get("kind", name)
    if name in objectives.names() and kind != name:
        raise invalid({(name, "kind"): f"the name of a kind stands for that kind alone, found {kind!r:.60}"})
    return {**given, "kind": kind}
