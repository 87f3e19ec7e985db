"""FusionTree's batches as a torchtitan loader, and a tokenizer, which torchtitan requires but never uses."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from fusiontree.data import Batches, ByteTokenizer, DataSpec
from fusiontree.data.contents import Contents
from fusiontree.training.errors import RunError

logger = logging.getLogger(__name__)
Example = tuple[dict[str, Tensor], Tensor]


class TitanLoader(BaseDataLoader):
    """This process's micro-batches of every step. Their number and the world size do not change a step's rows."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """The data, the number of rows in a step, and the seed of their order."""

        text: DataSpec
        rows: int
        seed: int

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **unused: Any
    ) -> None:
        self.batches: Batches = config.text.batches(rows=config.rows, seed=config.seed)
        self.processes, self.rank, self.part = dp_world_size, dp_rank, local_batch_size
        self.step = 0

    def __iter__(self) -> Iterator[Example]:
        starts = range(self.rank * self.part, self.batches.rows, self.part * self.processes)
        while True:
            step, self.step = self.step, self.step + 1
            for start in starts:
                batch = self.batches.slice(step, start, start + self.part)
                places = {"positions": batch["positions"], "documents": batch["documents"]}
                yield {"input": batch["tokens"], **places}, batch["labels"]

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from: the next step (rows depend only on seed and step) and the data's contents."""
        return {"step": self.step, "contents": self.batches.corpus.contents.data()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of a checkpoint.

        Raises:
            RunError: the data has changed.
        """
        refuse_changed(self.batches.corpus.contents, state_dict.get("contents"))
        self.step = state_dict["step"]


def refuse_changed(contents: Contents, before: Sequence[Mapping[str, Any]] | None) -> None:
    """Refuse data that differ from the checkpoint's record. Checkpoints of older versions have no record.

    Raises:
        RunError: the data has changed; the message names the file.
    """
    if before is None:
        logger.warning("the checkpoint does not say what the data was; from the next one on it is kept")
    elif difference := contents.difference(before):
        raise RunError(f"{difference}: the data has changed since the checkpoint; restore it or choose another output")


class TitanTokenizer(BaseTokenizer):
    """The byte tokenizer behind torchtitan's interface."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """No options for the user; `bytes` is the tokenizer to wrap."""

        bytes: ByteTokenizer = field(default_factory=ByteTokenizer)

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()
        self.bytes = config.bytes
        self.eos_id = self.bytes.end

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, one per byte, without an end token."""
        return self.bytes.encode(text).tolist()

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without end tokens."""
        return bytes(token for token in tokens if token != self.bytes.end).decode(errors="replace")

    def get_vocab_size(self) -> int:
        """The size of the vocabulary."""
        return self.bytes.vocab_size
