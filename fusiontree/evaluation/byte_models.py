"""Baselines that a language model must beat: byte models that only count, and gzip, in bits per held-out byte."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from fusiontree.data.corpus import Corpus


@dataclass(frozen=True, slots=True)
class ByteModels:
    """Bits per byte of held-out text, lower is better.

    Attributes:
        order_0: a model that knows how often each byte occurs.
        order_1: a model that also sees the previous byte.
        order_2: a model that also sees the two previous bytes.
        gzip: `gzip -9` of each document alone, without any training text.
    """

    order_0: float
    order_1: float
    order_2: float
    gzip: float


def byte_models(train: Corpus, held_out: Corpus) -> ByteModels:
    """Count on the training documents and measure on the held-out ones.

    The three models are measured on the targets of `fusiontree.data.HeldOut`: every token of a document except
    its first, with the end token. Contexts stop at the start of a document. Unlike those of a language model,
    they cross the edges of rows. gzip pays for every byte, and for 18 bytes of header and trailer per
    document. The counts take 136 MB (257**3 of them). Counting needs about 30 bytes more per training
    token.

    Sources: the orders are blended by Witten and Bell's method C (doi:10.1109/18.87000); gzip is RFC 1952.
    """
    order_0, order_1, order_2 = (_bits(p) / held_out.bytes for p in _probabilities(train, held_out))
    return ByteModels(order_0, order_1, order_2, 8 * _gzip_bytes(held_out) / held_out.bytes)


def _probabilities(train: Corpus, held_out: Corpus) -> Iterator[Float64[np.ndarray, " targets"]]:
    """The probability of each held-out target, by the models of order 0, 1 and 2.

    If n(c) tokens of t(c) kinds follow a context c, then p(x | c) = (n(c, x) + t(c) p'(x)) / (n(c) + t(c)).
    p' is the model one order lower; below order 0 all tokens are equally likely. After a context never seen,
    p = p'.
    """
    vocab = train.tokenizer.vocab_size
    probability = np.full(held_out.bytes, 1 / vocab)
    for order in range(3):
        seen = np.bincount(_grams(train, order), minlength=vocab ** (order + 1)).reshape(-1, vocab)
        context, target = np.divmod(_grams(held_out, order)[_within(held_out) > 0], vocab)
        total, kinds = seen.sum(axis=1)[context], np.count_nonzero(seen, axis=1)[context]
        blended = (seen[context, target] + kinds * probability) / np.maximum(total + kinds, 1)
        probability = np.where(total > 0, blended, probability)
        yield probability


def _grams(corpus: Corpus, order: int) -> Int64[np.ndarray, " tokens"]:
    """Each token and the `order` tokens before it as one number; end tokens fill up before a document's start."""
    vocab, end = corpus.tokenizer.vocab_size, corpus.tokenizer.end
    grams = corpus.tokens.astype(np.int64)
    within = _within(corpus)
    for back in range(1, order + 1):
        before = np.roll(corpus.tokens, back).astype(np.int64)
        before[within < back] = end
        grams += before * vocab**back
    return grams


def _within(corpus: Corpus) -> Int64[np.ndarray, " tokens"]:
    return np.arange(len(corpus.tokens)) - np.repeat(corpus.starts[:-1], np.diff(corpus.starts))


def _bits(probability: Float64[np.ndarray, " targets"]) -> float:
    return float(-np.log2(probability).sum())


def _gzip_bytes(corpus: Corpus) -> int:
    return sum(len(gzip.compress(corpus.text(document), 9, mtime=0)) for document in range(corpus.documents))
