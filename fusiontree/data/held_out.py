"""Held-out text as a finite sequence of rows, with every byte exactly once."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from fusiontree.data.corpus import Corpus, Stream
from fusiontree.data.rows import PADDING, Batch, pack
from fusiontree.data.source import DataError


class EvaluationBatch(Batch):
    """Rows to measure on.

    Keys:
        bytes: bytes of text among each row's inputs.
    """

    bytes: Int64[Tensor, " rows"]


class HeldOut:
    """The documents in source order, cut into rows, the last one padded.

    Bits per byte is `nats / ln 2 / bytes`, both summed over all rows. Targets are all tokens of a document except
    the first, with the end token. The first byte is no target, because nothing precedes it. The end token is one,
    so a document of n bytes has n targets. Summed over all rows, `bytes` therefore equals the number of targets.
    Within a row the two may differ, where documents start or end. The first positions of a row have little
    context, so a longer `length` is an easier task: compare at equal lengths.

    Attributes:
        corpus: the documents.
        length: tokens in a row.
    """

    def __init__(self, corpus: Corpus, length: int) -> None:
        """Prepare to read.

        Raises:
            DataError: length below 1.
        """
        if length < 1:
            raise DataError(f"length must be 1 or more, found {length}")
        self.corpus, self.length = corpus, length
        self._stream = Stream(corpus, np.arange(corpus.documents))

    def __len__(self) -> int:
        """How many rows there are."""
        return -(-len(self.corpus.tokens) // self.length)

    def slice(self, start: int, stop: int) -> EvaluationBatch:
        """Rows start..stop-1, tensors [stop - start, length] and bytes [stop - start]."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        row = np.arange(start, stop, dtype=np.int64)
        index = row[:, None] * self.length + np.arange(self.length + 1)
        beyond, end = index >= len(self.corpus.tokens), self.corpus.tokenizer.end
        tokens, within = self._stream.read(np.where(beyond, 0, index))
        batch = pack(np.where(beyond, end, tokens), np.where(beyond, 0, within), end=end)
        batch["documents"].masked_fill_(torch.from_numpy(beyond[:, :-1]), PADDING)
        return EvaluationBatch(**batch, bytes=(batch["tokens"] != end).sum(dim=1))

    def batches(self, rows: int) -> Iterator[EvaluationBatch]:
        """Every row once, in order, in batches of `rows` (the last batch may have fewer)."""
        for start in range(0, len(self), rows):
            yield self.slice(start, min(start + rows, len(self)))
