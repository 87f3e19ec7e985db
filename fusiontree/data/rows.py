"""Packs tokens into rows: inputs, labels, positions and document ids, all from the same document boundaries."""

from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

IGNORED = -100
"""The label of a position that has no target (the default of torch's cross entropy)."""
PADDING = -1
"""The document id of padding."""


class Batch(TypedDict):
    """Rows of packed documents, for training a language model.

    Keys:
        tokens: the inputs.
        labels: the next token of the same document, else IGNORED.
        positions: 0, 1, ... within each document of a row; a document cut by the edge of a row restarts at 0.
        documents: 0, 1, ... within each row; PADDING at positions without a token.
    """

    tokens: Int64[Tensor, "rows length"]
    labels: Int64[Tensor, "rows length"]
    positions: Int64[Tensor, "rows length"]
    documents: Int64[Tensor, "rows length"]


def pack(tokens: Int64[np.ndarray, "rows length+1"], within: Int64[np.ndarray, "rows length+1"], *, end: int) -> Batch:
    """Make rows from consecutive tokens. Each input row has one token more than the result, for the last label.

    An end token is the target of its document's last byte and has no target itself, so no target crosses a
    document boundary. A row sees nothing of the row before, so a document that is cut starts anew at
    position 0.

    Args:
        tokens: the tokens of each row.
        within: the index of each token in its document.
        end: the token that ends a document.
    """
    inputs, column = tokens[:, :-1], np.arange(tokens.shape[1] - 1)
    # the column is smaller than `within` only if the document began before the row
    positions = np.minimum(within[:, :-1], column)
    documents = np.cumsum(positions == 0, axis=1) - 1
    labels = np.where(inputs == end, IGNORED, tokens[:, 1:])
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(inputs)),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        documents=torch.from_numpy(documents),
    )
