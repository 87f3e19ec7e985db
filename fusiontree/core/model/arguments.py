"""What callers may pass to a model, checked once, before anything runs.

Values are looked at on a CPU alone: to look at values of another device is to wait for it.
"""

from typing import TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor

from fusiontree.core.contracts.cache import Cache
from fusiontree.core.model.boundaries import check_vocabulary, readable
from fusiontree.core.model.chunked_loss import NO_LABEL
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError

Ids = Int[Tensor, "batch time"]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def checked_tokens(spec: ModelSpec, tokens: Ids, documents: Ids | None) -> Ids:
    """The tokens as int64, 0 at padding.

    Raises:
        FusionTreeError: no integers [batch, time >= 1], or a token outside the vocabulary.
    """
    _check_ids(tokens)
    tokens = tokens.long()
    if documents is not None and documents.shape == tokens.shape:
        tokens = torch.where(documents < 0, 0, tokens)
    if readable(tokens):
        check_vocabulary("tokens", tokens, spec.vocab_size)
    return tokens


def checked_labels(spec: ModelSpec, labels: Ids, tokens: Ids) -> Ids:
    """The labels as int64.

    Raises:
        FusionTreeError: another shape than the tokens have, or a label outside the vocabulary.
    """
    _check_ids(tokens)
    _check_like("labels", labels, tokens)
    labels = labels.long()
    if readable(labels):
        check_vocabulary("labels", torch.where(labels == NO_LABEL, 0, labels), spec.vocab_size)
    return labels


def check_shapes(
    spec: ModelSpec, tokens: Ids, positions: Ids | None, documents: Ids | None, cache: Cache | None
) -> None:
    """Compare everything with the tokens and the model.

    Raises:
        FusionTreeError: shapes that do not agree, or a cache of another model.
    """
    for name, ids in (("positions", positions), ("documents", documents)):
        if ids is not None:
            _check_like(name, ids, tokens)
    if cache is not None and cache.batch != tokens.shape[0]:
        raise FusionTreeError(f"cache: made for {cache.batch} rows, found {tokens.shape[0]} in tokens")
    if cache is not None and cache.made_for is not spec and cache.made_for != spec:
        other = cache.made_for
        made_for = other.digest() if isinstance(other, ModelSpec) else f"{other!r:.60}"
        raise FusionTreeError(f"cache: made for the spec {made_for}, found {spec.digest()}")


def check_positions(spec: ModelSpec, positions: Ids) -> None:
    """Compare positions in the stream, where a prefix counts, with what the encodings were made for.

    Raises:
        FusionTreeError: an encoding has no such position.
    """
    limits = {name: e.limit for name, e in spec.encodings.items() if e.limit is not None}
    if not limits or not readable(positions):
        return
    name = min(limits, key=lambda n: limits[n])
    low, high = (int(value) for value in positions.aminmax())
    if low < 0 or high >= limits[name]:
        before = spec.prefix_length  # callers count positions without the prefix
        found = f"position {(low if low < 0 else high) - before}"
        raise FusionTreeError(f"encodings.{name}: found {found}, it was made for {limits[name] - before} positions")


def check_count(name: str, value: object) -> None:
    """Refuse what is no whole number from 1 on.

    Raises:
        FusionTreeError: with the name and the value.
    """
    if not isinstance(value, int) or value < 1:
        raise FusionTreeError(f"{name}: expected a whole number from 1 on, found {value!r}")


def _check_ids(tokens: object) -> None:
    if not _are_ids(tokens) or tokens.shape[1] == 0:
        raise FusionTreeError(f"tokens: expected an integer tensor [batch, time >= 1], found {_kind(tokens)}")


def _check_like(name: str, ids: object, tokens: Ids) -> None:
    if not (_are_ids(ids) and ids.shape == tokens.shape):
        found = f"expected an integer tensor {list(tokens.shape)}, as tokens are, found {_kind(ids)}"
        raise FusionTreeError(f"{name}: {found}")


def _are_ids(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a matrix of integers."""
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype in INTEGERS


def _kind(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
