"""Converts transformers' arguments: masks, positions and samples to documents, and labels to labels that count."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.core.model.chunked_loss import NO_LABEL
from fusiontree.errors import FusionTreeError

LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""Options of the loss."""
FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""The arguments that collators of packed samples give beside `position_ids`."""


def check_options(options: Mapping[str, Any], columns: int) -> None:
    """Refuse options that `forward` would have to ignore. None and False are accepted for every option.

    Raises:
        FusionTreeError: names the first such option.
    """
    for name, value in options.items():
        if value is None or value is False or name in (*LOSS, *FLATTENED, "seq_idx"):
            continue
        if name == "token_type_ids" and not bool(torch.as_tensor(value).any()):
            continue
        if name == "cache_position":
            if int(value[0]) != columns:
                raise FusionTreeError(f"cache_position: begins at {int(value[0])}, the cache holds {columns} columns")
        else:
            raise FusionTreeError(f"{name}: models of FusionTree have no use for it")


def documents_of(
    tokens: Tensor, mask: Tensor | None, positions: Tensor | None, samples: Tensor | None, *, cached: bool
) -> Tensor | None:
    """Our document ids [batch, time], -1 at padding; None where each row is one document.

    Args:
        tokens: [batch, time].
        mask: [batch, columns]; the last columns are the tokens. 0 is padding; 1, 2, 3, ... number packed samples.
        positions: [batch, time]; a sample begins at each 0.
        samples: [batch, time], the number of each token's sample from 0 on.
        cached: whether there is a cache, whose rows each continue one document.

    Raises:
        FusionTreeError: the mask has another shape or other values, or a row of a cache gets several samples.
    """
    one = samples is None and (positions is None or tokens.shape[1] == 1)
    given = None if mask is None else _at(tokens, mask)
    if one and (given is None or bool((given == 1).all())):
        return None
    numbers = torch.ones_like(tokens) if given is None else _numbers(given)
    numbers = numbers if samples is None else (samples + 1) * (numbers > 0)
    begins = _begins(numbers, positions)
    if cached and (int(begins.sum(1).max()) > 1 or int(numbers.max()) > 1):
        found = "attention_mask or position_ids: several samples in a row"
        raise FusionTreeError(f"{found}; each row of a cache goes on with one")
    documents = torch.where(numbers > 0, begins.cumsum(1) - 1, -1)
    return documents if bool(documents.any()) else None


def _at(tokens: Tensor, mask: Tensor) -> Tensor:
    """The columns of a mask that belong to the tokens."""
    if mask.ndim != 2 or mask.shape[0] != tokens.shape[0] or mask.shape[1] < tokens.shape[1]:
        needed = f"[{tokens.shape[0]}, at least {tokens.shape[1]}]"
        raise FusionTreeError(f"attention_mask: expected {needed}, found {list(mask.shape)}")
    return mask[:, -tokens.shape[1] :]


def _numbers(given: Tensor) -> Tensor:
    """A mask as whole numbers."""
    numbers = given.long()
    if bool((numbers < 0).any()) or bool((numbers != given).any()):
        raise FusionTreeError("attention_mask: 0 is padding, and 1, 2, 3, ... number samples; found other values")
    return numbers


def _begins(numbers: Tensor, positions: Tensor | None) -> Tensor:
    """Where samples begin: at the first token of each number, and at each position 0."""
    highest = numbers.cummax(1).values
    if bool(((numbers > 0) & (numbers < highest)).any()):
        raise FusionTreeError("attention_mask: the number of a sample comes back behind that of a later one")
    begins = numbers > F.pad(highest[:, :-1], (1, 0))
    return begins if positions is None else begins | ((numbers > 0) & (positions == 0))


def counted_labels(labels: Tensor, documents: Tensor | None, ignored: int = NO_LABEL) -> Tensor:
    """Labels [batch, time], set to `ignored` where the previous token does not predict them: at padding, and after
    padding or another document."""
    if documents is None or labels.shape != documents.shape:
        return labels
    predicted = (documents[:, 1:] >= 0) & (documents[:, 1:] == documents[:, :-1])
    return labels.masked_fill(~F.pad(predicted, (1, 0), value=True), ignored)
