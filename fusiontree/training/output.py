"""The directory of a run's results, which belongs to one run.

run.yaml         the resolved run; running it here continues the run, or reports that it is finished
metrics.jsonl    see `fusiontree.training.metrics`
gates.json       see `fusiontree.training.gate_monitor`
checkpoints/     see `fusiontree.training.checkpoint`
tensorboard/     if asked for
train.log        messages of libraries
model/           spec.yaml and model.safetensors, once the run is finished
"""

import fcntl
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from fusiontree.core.model.weights import SPEC_FILE, WEIGHTS_FILE, may_be_replaced
from fusiontree.core.spec import yaml
from fusiontree.errors import SpecError
from fusiontree.files import write_text
from fusiontree.training.errors import RunError
from fusiontree.training.run import RunSpec
from fusiontree.training.sections import ResolvedSpec

RESULTS = ("metrics.jsonl", "gates.json", "checkpoints", "model")


class Output:
    """The files and folders in the directory of a run."""

    def __init__(self, run: RunSpec) -> None:
        """Compute the paths; nothing is written yet."""
        self.root = run.directory
        self.spec = run.relative_to(Path.cwd())
        self.run = self.root / "run.yaml"
        self.gates = self.root / "gates.json"
        self.checkpoints = self.root / "checkpoints"
        self.log = self.root / "train.log"
        self.model = self.root / "model"

    @property
    def finished(self) -> bool:
        """Whether the run that owns the directory has ended: its model is the last thing written."""
        parts = [self.model / name for name in (SPEC_FILE, WEIGHTS_FILE)]
        return self.run.exists() and all(part.is_file() and part.stat().st_size for part in parts)

    def check(self) -> None:
        """Refuse a directory that belongs to another run.

        Raises:
            RunError: the directory holds results of another run, or of an unknown one.
        """
        if self.run.exists():
            self._check_owner()
        elif any((self.root / name).exists() for name in RESULTS):
            raise RunError(f"{self.root}: has results but no run.yaml; choose another output")
        elif self.root.exists() and not self.root.is_dir():
            raise RunError(f"{self.root}: is not a directory; choose another output")
        if not may_be_replaced(self.model):
            raise RunError(f"{self.model}: exists and is not a model of ours; choose another output")

    def _check_owner(self) -> None:
        try:
            owner = RunSpec.from_file(self.run)
        except SpecError as error:
            raise RunError(f"{self.root}: belongs to a run that cannot be read ({error})") from None
        difference = self.spec.difference(owner)
        if difference:
            raise RunError(f"{self.root}: belongs to another run ({difference}); choose another output")
        self._check_precision(owner.resolved)

    def _check_precision(self, began: ResolvedSpec | None) -> None:
        asked = self.spec.resolved
        if began is not None and asked is not None and asked != began:
            here, there = asked.precision, began.precision
            raise RunError(f"{self.root}: resolved.precision is {here} here, and the run there began in {there}")
        unknown = self.spec.training.precision == "auto" and began is None and asked is None
        if unknown and self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            found = f"{self.run}: training.precision is auto, and nothing says what the checkpoints were trained in"
            raise RunError(f"{found}; add resolved: {{precision: float32}} or {{precision: bfloat16}}")

    def began(self) -> ResolvedSpec | None:
        """The values chosen for `auto` when the directory's run began; None if no run began there."""
        return RunSpec.from_file(self.run).resolved if self.run.exists() else None

    @contextmanager
    def claimed(self) -> Generator[None]:
        """Lock the directory while a block runs, in one process of the run. If the run never began (see `begin`),
        everything it wrote is removed.

        Raises:
            RunError: another process trains there, or the directory cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("w")
        except OSError as error:
            raise RunError(f"{self.root}: cannot be written: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.root}: another process is training there") from None
            try:
                yield
            finally:
                if not self.run.exists():
                    self._leave()

    def begin(self) -> None:
        """Mark the directory as this run's, once the run is known to start. A run file of the user in it is kept;
        resolved values of `auto` are added to it."""
        if not self.run.exists():
            write_text(self.run, self.spec.to_yaml())
        elif self.spec.training.precision == "auto" and self.began() is None:
            write_text(self.run, self._with_resolved(self.run.read_text(encoding="utf-8-sig")))

    def _with_resolved(self, text: str) -> str:
        """A run file with its section `resolved` appended; if appending fails, the whole file is written anew."""
        section = {"resolved": self.spec.resolved and self.spec.resolved.data()}
        longer = f"{text.rstrip()}\n{yaml.write(section)}"
        with suppress(SpecError):
            if yaml.read(longer) == yaml.read(text) | section:
                return longer
        return self.spec.to_yaml()

    def _leave(self) -> None:
        for path in (self.log, self.root / ".lock"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.root.rmdir()
