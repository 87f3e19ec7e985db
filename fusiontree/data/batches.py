"""Training batches as a pure function of (seed, step): no state to save, no rank to know, any step now."""

import numpy as np
from jaxtyping import Int64

from fusiontree.data.corpus import Corpus, Stream
from fusiontree.data.rows import Batch, pack
from fusiontree.data.source import DataError


class Batches:
    """An endless stream of packed training rows.

    Each epoch is a permutation of the documents drawn from (seed, epoch). Epochs follow one another with no
    gap, and row `r` of step `s` is the tokens from `(s * rows + r) * length` on. So an epoch holds every
    token exactly once, the order of tokens is the same for every `rows` and `length`, and ranks and gradient
    accumulation are but ways to cut a step. An order that no world size changes is the promise of MosaicML's
    streaming (github.com/mosaicml/streaming); here it is kept by arithmetic.

    Attributes:
        corpus: the documents.
        rows: rows in a step, over all ranks.
        length: tokens in a row.
        seed: decides the order of the documents, and nothing else.
    """

    def __init__(self, corpus: Corpus, *, rows: int, length: int, seed: int = 0) -> None:
        """Prepare to read.

        Raises:
            DataError: rows or length below 1, or a seed that is not an unsigned 64-bit number.
        """
        if rows < 1 or length < 1 or not 0 <= seed < 2**64:
            raise DataError(f"rows and length must be 1 or more and 0 <= seed < 2**64, found {rows}, {length}, {seed}")
        self.corpus, self.rows, self.length, self.seed = corpus, rows, length, seed
        self._last = (0, self._shuffle(0))

    def batch(self, step: int) -> Batch:
        """The whole of a step, tensors [rows, length]."""
        return self.slice(step, 0, self.rows)

    def slice(self, step: int, start: int, stop: int) -> Batch:
        """Rows start..stop-1 of a step, tensors [stop - start, length]: a rank's part."""
        assert step >= 0 and 0 <= start <= stop <= self.rows, (step, start, stop, self.rows)
        row = step * self.rows + np.arange(start, stop, dtype=np.int64)
        index = row[:, None] * self.length + np.arange(self.length + 1)
        tokens, within = self._read(index)
        return pack(tokens, within, end=self.corpus.tokenizer.end)

    def epoch(self, step: int) -> float:
        """How many times the corpus has been read before a step."""
        return step * self.rows * self.length / len(self.corpus.tokens)

    def _read(
        self, index: Int64[np.ndarray, "rows time"]
    ) -> tuple[Int64[np.ndarray, "rows time"], Int64[np.ndarray, "rows time"]]:
        epochs, offset = np.divmod(index, len(self.corpus.tokens))
        tokens, within = np.empty_like(index), np.empty_like(index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            tokens[here], within[here] = self._stream(int(epoch)).read(offset[here])
        return tokens, within

    def _stream(self, epoch: int) -> Stream:
        known, stream = self._last
        if known != epoch:
            stream = self._shuffle(epoch)
            self._last = (epoch, stream)
        return stream

    def _shuffle(self, epoch: int) -> Stream:
        # numpy promises never to change a bit generator's raw numbers, but not what `permutation` does
        key = np.array([self.seed, epoch], dtype=np.uint64)
        numbers = np.random.Philox(key=key).random_raw(self.corpus.documents)
        return Stream(self.corpus, np.argsort(numbers, kind="stable"))
