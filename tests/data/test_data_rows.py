"""Packing: what a row holds, and that a step is a function of nothing but (seed, step)."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusiontree.data import IGNORED, PADDING, Batch, Batches, Corpus, DataError, Document, HeldOut

END = 256
texts = st.lists(st.binary(max_size=12), min_size=1, max_size=8).filter(any)
small = st.integers(1, 9)


def corpus_of(texts: list[bytes]) -> Corpus:
    return Corpus.read(Document(f"{number}", text) for number, text in enumerate(texts))


def equal(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def rows_of(batches: Batches, count: int) -> list[tuple[list[int], ...]]:
    """The first rows, a step at a time: each row's tokens, labels, positions and documents."""
    found: list[tuple[list[int], ...]] = []
    step = 0
    while len(found) < count:
        batch = batches.batch(step)
        columns = (batch[key].tolist() for key in ("tokens", "labels", "positions", "documents"))
        found += zip(*columns, strict=True)
        step += 1
    return found[:count]


def documents_in(stream: list[int]) -> list[bytes]:
    found, text = [], bytearray()
    for token in stream:
        if token == END:
            found.append(bytes(text))
            text.clear()
        else:
            text.append(token)
    assert not text, "the stream stops inside a document"
    return found


def positions_and_documents(row: list[int]) -> tuple[list[int], list[int]]:
    """By walking along the row: both start at 0, and an end token is the last of its document."""
    positions, documents, position, document = [], [], 0, 0
    for token in row:
        positions.append(position)
        documents.append(document)
        position += 1
        if token == END:
            position, document = 0, document + 1
    return positions, documents


@given(texts, small, small, st.integers(0, 2**64 - 1), st.integers(0, 50), st.data())
def test_ranks_together_hold_the_whole_step(
    texts: list[bytes], rows: int, length: int, seed: int, step: int, data: st.DataObject
) -> None:
    batches = Batches(corpus_of(texts), rows=rows, length=length, seed=seed)
    cut = data.draw(st.integers(0, rows))
    parts = [batches.slice(step, 0, cut), batches.slice(step, cut, rows)]
    whole = batches.batch(step)
    for key in whole:
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))
        assert whole[key].shape == (rows, length) and whole[key].dtype == torch.int64


@given(texts, small, small, st.integers(0, 9))
def test_any_step_can_be_read_first(texts: list[bytes], rows: int, length: int, seed: int) -> None:
    corpus = corpus_of(texts)
    one = Batches(corpus, rows=rows, length=length, seed=seed)
    in_order = [one.batch(step) for step in range(8)]
    for step in reversed(range(8)):
        fresh = Batches(corpus, rows=rows, length=length, seed=seed).batch(step)
        assert equal(in_order[step], fresh) and equal(in_order[step], one.batch(step))


@given(texts, small, small, st.integers(0, 9))
def test_the_order_of_rows_does_not_depend_on_how_many_make_a_step(
    texts: list[bytes], rows: int, length: int, seed: int
) -> None:
    corpus = corpus_of(texts)
    one = Batches(corpus, rows=1, length=length, seed=seed)
    count = 3 * one.epoch_rows
    assert rows_of(Batches(corpus, rows=rows, length=length, seed=seed), count) == rows_of(one, count)


@given(texts, small, small, st.integers(0, 9))
def test_every_epoch_holds_every_token_once_and_the_rest_of_its_last_row(
    texts: list[bytes], rows: int, length: int, seed: int
) -> None:
    corpus = corpus_of(texts)
    batches = Batches(corpus, rows=rows, length=length, seed=seed)
    found = rows_of(batches, 3 * batches.epoch_rows)
    for epoch in range(3):
        part = found[epoch * batches.epoch_rows :][: batches.epoch_rows]
        tokens = Counter(token for row, *_ in part for token in row)
        assert tokens >= Counter(corpus.tokens.tolist())
        assert tokens.total() - len(corpus.tokens) < length


@given(texts, small, small, st.integers(0, 9))
def test_a_row_is_a_piece_of_documents_one_after_another(texts: list[bytes], rows: int, length: int, seed: int) -> None:
    closed = [[*text, END] for text in texts]
    for tokens, labels, positions, documents in rows_of(
        Batches(corpus_of(texts), rows=rows, length=length, seed=seed), 20
    ):
        assert (positions, documents) == positions_and_documents(tokens)
        following = [*tokens[1:], labels[-1]]
        assert labels == [IGNORED if t == END else after for t, after in zip(tokens, following, strict=True)]
        first, *others = pieces([*tokens, *labels[-1:]] if labels[-1] != IGNORED else tokens)
        assert any(first == text[start : start + len(first)] for text in closed for start in range(len(text)))
        assert not others or first[-1] == END
        assert all(other in closed for other in others[:-1])
        assert not others or any(others[-1] == text[: len(others[-1])] for text in closed)


def pieces(tokens: list[int]) -> list[list[int]]:
    """Cut after every end token."""
    found: list[list[int]] = [[]]
    for token in tokens:
        found[-1].append(token)
        if token == END:
            found.append([])
    return found if found[-1] else found[:-1]


def test_neighbours_in_training_are_of_different_documents() -> None:
    """Rows of one long file, one after another, teach little and forget the rest: rows are shuffled too."""
    batches = Batches(corpus_of([bytes([number]) * 1000 for number in range(50)]), rows=1, length=10)
    seen = [batches.batch(step)["tokens"][0, 0].item() for step in range(1000)]
    repeats = sum(one == other for one, other in itertools.pairwise(seen))
    assert repeats < 60, "one in 50 by chance"


def test_a_row_written_out() -> None:
    held_out = HeldOut(corpus_of([b"abc", b"", b"de"]), length=5)
    a, b, c, d, e = b"abcde"
    batch = held_out.slice(0, 2)
    assert batch["tokens"].tolist() == [[a, b, c, END, END], [d, e, END, END, END]]
    assert batch["labels"].tolist() == [[b, c, END, IGNORED, IGNORED], [e, END, IGNORED, IGNORED, IGNORED]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]]
    assert batch["documents"].tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, PADDING, PADDING]]
    assert batch["bytes"].tolist() == [3, 2]


def test_the_order_is_pinned() -> None:
    """A resumed run needs the same order from every version of numpy and of this package."""
    corpus = corpus_of([bytes([number]) for number in range(8)])
    orders = {
        (seed, epoch): Batches(corpus, rows=1, length=16, seed=seed).batch(epoch)["tokens"][0, ::2].tolist()
        for seed in (0, 7)
        for epoch in (0, 1)
    }
    assert orders == {
        (0, 0): [0, 2, 1, 5, 4, 3, 6, 7],
        (0, 1): [5, 3, 7, 2, 4, 1, 0, 6],
        (7, 0): [4, 1, 6, 3, 2, 7, 5, 0],
        (7, 1): [3, 1, 6, 2, 5, 4, 0, 7],
    }
    one_document_a_row = Batches(corpus, rows=8, length=2)
    assert [one_document_a_row.batch(epoch)["tokens"][:, 0].tolist() for epoch in (0, 1)] == [
        [5, 2, 0, 3, 4, 1, 7, 6],
        [0, 6, 4, 1, 5, 2, 7, 3],
    ]


def test_shuffles_differ_by_seed_and_epoch() -> None:
    corpus = corpus_of([bytes([number]) for number in range(50)])
    epochs = [Batches(corpus, rows=1, length=100, seed=seed).batch(step) for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(batch["tokens"].flatten().tolist()) for batch in epochs}) == 4


@given(texts, small, small)
def test_held_out_rows_hold_every_byte_once_in_order(texts: list[bytes], length: int, rows: int) -> None:
    held_out = HeldOut(corpus_of(texts), length)
    batches = list(held_out.batches(rows))
    tokens, documents = (torch.cat([batch[key] for batch in batches]) for key in ("tokens", "documents"))
    assert len(tokens) == len(held_out)
    assert documents_in(tokens[documents != PADDING].tolist()) == texts
    real = documents.flatten() != PADDING
    assert real[: int(real.sum())].all() and int((~real).sum()) < length
    assert sum(int(batch["bytes"].sum()) for batch in batches) == sum(map(len, texts))


@given(texts, small, small)
def test_guessing_costs_the_same_bits_per_byte_at_any_length(texts: list[bytes], length: int, rows: int) -> None:
    nats, size = 0.0, 0
    for batch in HeldOut(corpus_of(texts), length).batches(rows):
        labels: Tensor = batch["labels"]
        logits = torch.zeros(labels.numel(), 257, dtype=torch.float64)
        nats += torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").item()
        size += int(batch["bytes"].sum())
        assert (labels[batch["documents"] == PADDING] == IGNORED).all()
    assert nats / math.log(2) / size == pytest.approx(math.log2(257), rel=1e-12)


def test_targets_are_every_token_of_a_document_but_its_first() -> None:
    texts = [b"first", b"", b"x", b"second one"]
    for length in (1, 3, 7, 100):
        batches = HeldOut(corpus_of(texts), length).batches(2)
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        expected = b"".join(text[1:] for text in texts)
        found = labels[labels != IGNORED]
        assert bytes(found[found != END].tolist()) == expected
        assert int((found == END).sum()) == 3


def test_a_far_step_of_a_tiny_corpus() -> None:
    batch = Batches(corpus_of([b"a"]), rows=2, length=7).batch(10**12)
    assert set(batch["tokens"].flatten().tolist()) == {ord("a"), END}
    assert batch["positions"].max() == 1


@pytest.mark.parametrize(("rows", "length", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1), (1, 1, 2**64)])
def test_impossible_shapes_are_refused(rows: int, length: int, seed: int) -> None:
    with pytest.raises(DataError, match=f"found {rows}, {length}, {seed}"):
        Batches(corpus_of([b"a"]), rows=rows, length=length, seed=seed)


def test_the_corpus_counts_bytes_and_documents() -> None:
    corpus = corpus_of([b"abc", b"", b"\xff\x00"])
    assert (corpus.documents, corpus.bytes) == (3, 5)
    assert [corpus.text(document) for document in range(3)] == [b"abc", b"", b"\xff\x00"]
    assert corpus.tokens.dtype == np.uint16 and len(corpus.tokens) == 8
