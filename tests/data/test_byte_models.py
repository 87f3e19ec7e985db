"""The counting models against arithmetic on paper, a slow model, and the laws of probability."""

import math
import zlib
from collections import Counter, defaultdict
from dataclasses import astuple

import numpy as np
import pytest

from fusiontree.data import Corpus, Document
from fusiontree.evaluation.byte_models import _probabilities, byte_models


def corpus_of(texts: list[bytes]) -> Corpus:
    return Corpus.read(Document(f"{number}", text) for number, text in enumerate(texts))


class Slow:
    """Witten-Bell by dictionaries and recursion; a document is '<<' before, '$' after."""

    def __init__(self, texts: list[bytes]) -> None:
        self.seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for text in texts:
            word = "<<" + text.decode() + "$"
            for at in range(2, len(word)):
                for order in range(3):
                    self.seen[word[at - order : at]][word[at]] += 1

    def probability(self, target: str, context: str) -> float:
        lower = self.probability(target, context[1:]) if context else 1 / 257
        seen = self.seen[context]
        if not seen:
            return lower
        return (seen[target] + len(seen) * lower) / (seen.total() + len(seen))

    def bits_per_byte(self, texts: list[bytes], order: int) -> float:
        bits = 0.0
        for text in texts:
            word = "<<" + text.decode() + "$"
            for at in range(3, len(word)):
                bits -= math.log2(self.probability(word[at], word[at - order : at]))
        return bits / sum(map(len, texts))


def test_on_paper() -> None:
    """Trained on 'aab', measured on 'ab', whose targets are 'b' and the end."""
    order_0 = (1 + 3 / 257) / 7  # each once among four tokens of three kinds
    b_after_a = (1 + 2 * order_0) / 4  # after 'a' came 'a' and 'b'
    end_after_b = (1 + 1 * order_0) / 2
    b_after_start_a = (0 + 1 * b_after_a) / 2  # after the start and 'a' came 'a'
    end_after_ab = (1 + 1 * end_after_b) / 2
    found = byte_models(corpus_of([b"aab"]), corpus_of([b"ab"]))
    assert found.order_0 == pytest.approx(-math.log2(order_0 * order_0) / 2, rel=1e-12)
    assert found.order_1 == pytest.approx(-math.log2(b_after_a * end_after_b) / 2, rel=1e-12)
    assert found.order_2 == pytest.approx(-math.log2(b_after_start_a * end_after_ab) / 2, rel=1e-12)
    assert found.gzip == 8 * (18 + 4) / 2  # header and trailer, and "ab" as one block of fixed codes


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ([b"abc", b"", b"cab"], [b"acb", b"bb", b""]),
        ([b"a"], [b"zz"]),
        ([b"the cat", b"the hat"], [b"that", b"a tea"]),
    ],
)
def test_against_dictionaries(train: list[bytes], held_out: list[bytes]) -> None:
    slow, found = Slow(train), byte_models(corpus_of(train), corpus_of(held_out))
    expected = [slow.bits_per_byte(held_out, order) for order in range(3)]
    assert astuple(found)[:3] == pytest.approx(expected, rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    train = corpus_of([b"abc abd abc", b"ab", b"b"])
    everything = [b"ab" + bytes([byte]) for byte in range(256)] + [b"ab"]
    ends = np.cumsum([len(text) for text in everything])
    third = np.append(ends[:-1] - 2, ends[-1] - 1)  # where the third token's probability stands, of each document
    for probability in _probabilities(train, corpus_of(everything)):
        assert probability[third].sum() == pytest.approx(1, rel=1e-12)


def test_the_order_of_documents_does_not_matter() -> None:
    train, held_out = [b"abc", b"", b"cab", b"bca"], [b"ac", b"bb", b"cc"]
    one = byte_models(corpus_of(train), corpus_of(held_out))
    other = byte_models(corpus_of(train[::-1]), corpus_of(held_out[::-1]))
    assert astuple(one) == pytest.approx(astuple(other), rel=1e-12)


def test_gzip_compresses_each_document_by_itself() -> None:
    sums = b"".join(b"%d plus %d is %d. " % (a, b, a + b) for a in range(20) for b in range(20))
    texts = [sums, sums, b"", bytes(range(256))]
    size = 0
    for text in texts:
        stream = zlib.compressobj(9, zlib.DEFLATED, 31)
        size += len(stream.compress(text) + stream.flush())
    found = byte_models(corpus_of([b"a"]), corpus_of(texts))
    assert found.gzip == pytest.approx(8 * size / sum(map(len, texts)), rel=1e-12)


def test_context_helps_where_there_is_structure() -> None:
    text = b"".join(b"%d plus %d is %d. " % (a, b, a + b) for a in range(30) for b in range(30))
    found = byte_models(corpus_of([text]), corpus_of([text[:2000]]))
    assert math.log2(257) > found.order_0 > found.order_1 > found.order_2 > 0
