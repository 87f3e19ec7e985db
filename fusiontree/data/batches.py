"""Training batches as a pure function of (seed, step): no state, no ranks, and any step at any time."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from fusiontree.data.corpus import Corpus, Stream
from fusiontree.data.rows import Batch, pack
from fusiontree.data.source import DataError


class Epoch(NamedTuple):
    """One pass over a corpus: its documents in sequence, cut into rows, and the order of the rows."""

    number: int
    stream: Stream
    order: Int64[np.ndarray, " rows"]


class Batches:
    """An endless sequence of packed training rows.

    An epoch joins the documents in an order drawn from (seed, epoch) and cuts them into rows. The rows are drawn in
    random order too, so that nearby rows come from different documents. An epoch holds every token once, except
    that its last row is filled up from the start of the epoch. The order does not depend on the world size, as in
    MosaicML's streaming (github.com/mosaicml/streaming). Here this follows from arithmetic: ranks and gradient
    accumulation only cut a step.

    Attributes:
        corpus: the documents.
        rows: rows in a step, over all ranks.
        length: tokens in a row.
        seed: decides the order of documents and rows, and nothing else.
    """

    def __init__(self, corpus: Corpus, *, rows: int, length: int, seed: int = 0) -> None:
        """Prepare to read.

        Raises:
            DataError: rows or length below 1, or a seed that is not an unsigned 64-bit number.
        """
        if rows < 1 or length < 1 or not 0 <= seed < 2**64:
            raise DataError(f"rows and length must be 1 or more and 0 <= seed < 2**64, found {rows}, {length}, {seed}")
        self.corpus, self.rows, self.length, self.seed = corpus, rows, length, seed
        self._last = self._shuffle(0)

    def batch(self, step: int) -> Batch:
        """All rows of a step, tensors [rows, length]."""
        return self.slice(step, 0, self.rows)

    def slice(self, step: int, start: int, stop: int) -> Batch:
        """Rows start..stop-1 of a step, tensors [stop - start, length]: a rank's part."""
        assert step >= 0 and 0 <= start <= stop <= self.rows, (step, start, stop, self.rows)
        epochs, places = np.divmod(step * self.rows + np.arange(start, stop, dtype=np.int64), self.epoch_rows)
        shape = (stop - start, self.length + 1)
        tokens, within = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        for number in np.unique(epochs):
            here, epoch = epochs == number, self._epoch(int(number))
            starts = epoch.order[places[here]] * self.length
            index = starts[:, None] + np.arange(self.length + 1)
            tokens[here], within[here] = epoch.stream.read(index % len(self.corpus.tokens))
        return pack(tokens, within, end=self.corpus.tokenizer.end)

    @property
    def epoch_rows(self) -> int:
        """How many rows an epoch has."""
        return -(-len(self.corpus.tokens) // self.length)

    def _epoch(self, number: int) -> Epoch:
        if self._last.number != number:
            self._last = self._shuffle(number)
        return self._last

    def _shuffle(self, number: int) -> Epoch:
        # numpy promises never to change a bit generator's raw numbers, but not what `permutation` does
        numbers = np.random.Philox(key=np.array([self.seed, number], dtype=np.uint64))
        documents = np.argsort(numbers.random_raw(self.corpus.documents), kind="stable")
        rows = np.argsort(numbers.random_raw(self.epoch_rows), kind="stable")
        return Epoch(number, Stream(self.corpus, documents), rows)
