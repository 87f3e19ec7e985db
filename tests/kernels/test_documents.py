"""Documents one after another, as GPU kernels take them."""

import pytest
import torch
from kernel_cases import Draw

from fusiontree.kernels.common.documents import Packed, packed

SEGMENTS = torch.tensor([[0, 0, 1, -1, -1], [-1, -1, -1, -1, -1], [2, 2, 2, 3, 3], [0, 0, 0, 0, -1]])
VALUES = torch.arange(20.0).reshape(4, 5)


def test_bounds_rows_and_places() -> None:
    found = packed(SEGMENTS, VALUES)
    assert found.bounds.tolist() == found.host.tolist() == [0, 2, 3, 6, 8, 12]
    assert found.bounds.dtype == torch.int32
    assert found.rows.tolist() == [0, 0, 2, 2, 3]
    assert found.continues.tolist() == [True, False, False, False, True]
    assert found.last.tolist() == [1, -1, 3, 4]
    assert found.longest == 4
    assert found.pack(VALUES).tolist() == [0, 1, 2, 10, 11, 12, 13, 14, 15, 16, 17, 18]


def test_states_are_those_of_rows_that_continue_and_of_last_documents() -> None:
    found, state = packed(SEGMENTS, VALUES), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert found.entering(state).flatten().tolist() == [1, 0, 0, 0, 4]
    after = torch.tensor([[10.0], [11.0], [12.0], [13.0], [14.0]])
    assert found.leaving(after, state).flatten().tolist() == [11, 2, 13, 14]


def test_unpacking_is_the_reverse_and_gives_padding_nothing() -> None:
    values = VALUES.clone().requires_grad_()
    found = packed(SEGMENTS, values)
    back = found.unpack(found.pack(values))
    assert torch.equal(back, torch.where(SEGMENTS >= 0, VALUES, 0.0))
    (grad,) = torch.autograd.grad(back.sum(), values)
    assert torch.equal(grad, (SEGMENTS >= 0).float())


@pytest.mark.parametrize("time", [1, 2, 7, 64])
def test_round_trip_of_random_documents(time: int) -> None:
    segments, values = Draw(time).segments(time), Draw(1).normal(6, time, 3)
    found = packed(segments, values)
    lengths = found.host.diff()
    assert (lengths > 0).all()
    assert int(lengths.sum()) == int((segments >= 0).sum())
    pieces = found.pack(segments).split(lengths.tolist())
    assert all(len(piece.unique()) == 1 for piece in pieces)
    assert torch.equal(found.unpack(found.pack(values)), torch.where((segments >= 0)[..., None], values, 0.0))


def test_one_document_a_row() -> None:
    for segments in (None, torch.zeros(4, 5, dtype=torch.long)):
        found = packed(segments, VALUES)
        assert found.host.tolist() == [0, 5, 10, 15, 20]
        assert found.tokens is None
        assert found.continues.all()
        assert found.last.tolist() == [0, 1, 2, 3]
        assert found.pack(VALUES).data_ptr() == VALUES.data_ptr()


def test_padding_alone_is_kept() -> None:
    found = packed(torch.full((4, 5), -1), VALUES)
    assert found.host.tolist() == [0, 5, 10, 15, 20]
    assert torch.equal(found.unpack(found.pack(VALUES)), VALUES)


def test_layers_share_what_was_found_as_long_as_nothing_changes() -> None:
    segments = SEGMENTS.clone()
    first = packed(segments, VALUES)
    assert packed(segments, VALUES) is first
    assert packed(segments.clone(), VALUES) is not first
    segments[0, 2] = 0
    assert packed(segments, VALUES).host.tolist() == [0, 3, 6, 8, 12]


def test_inference_tensors_are_taken() -> None:
    with torch.inference_mode():
        assert isinstance(packed(SEGMENTS.clone(), VALUES), Packed)
