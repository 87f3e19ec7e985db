"""Arguments that do not fit each other are one line, before any backend reads memory that is not theirs."""

import pytest
import torch

from fusiontree.errors import FusionTreeError
from fusiontree.kernels.attention import AlibiBias, Past, attention, attention_step
from fusiontree.kernels.causal_conv1d import causal_conv1d
from fusiontree.kernels.gated_delta import gated_delta
from fusiontree.kernels.linear_recurrence import linear_recurrence
from fusiontree.kernels.selective_scan import selective_scan
from fusiontree.kernels.ssd import ssd

R = torch.randn
Q, K = R(2, 6, 4, 8), R(2, 6, 2, 8)
LONG = torch.zeros(2, 6, dtype=torch.long)
MISFITS = {
    "attention: k: expected floating-point numbers [2, 6, kv_heads, 8], found [2, 4, 2, 8]": lambda: attention(
        Q, K[:, :4], K[:, :4], scale=1.0
    ),
    "attention: v: expected floating-point numbers [2, 6, 2, value_dim], found [2, 4, 2, 8]": lambda: attention(
        Q, K, K[:, :4], scale=1.0
    ),
    "attention: v: expected floating-point numbers [2, 6, 2, value_dim], found [2, 6, 1, 8]": lambda: attention(
        Q, K, K[:, :, :1], scale=1.0
    ),
    "attention: 4 heads are not a multiple of 3 kv_heads": lambda: attention(
        Q, R(2, 6, 3, 8), R(2, 6, 3, 8), scale=1.0
    ),
    "attention: segments: expected integers [2, 6], found [2, 6] float32": lambda: attention(
        Q, K, K, scale=1.0, segments=LONG.float()
    ),
    "attention: past.age: expected integers [2, 3], found [2, 6] int64": lambda: attention(
        Q, K, K, scale=1.0, past=Past(R(2, 3, 2, 8), R(2, 3, 2, 8), LONG)
    ),
    "attention: slopes: expected one for each of 4 heads, found 3": lambda: attention(
        Q, K, K, scale=1.0, slopes=(0.5, 0.25, 0.125)
    ),
    "attention_step: slopes: expected one for each of 4 heads, found 1": lambda: attention_step(
        Q[:, 0], R(2, 2, 5, 8), R(2, 2, 5, 8), LONG[:, 0], scale=1.0, alibi=AlibiBias((1.0,), LONG[:, :5])
    ),
    "attention_step: alibi.distance: expected integers [2, 5], found [2, 6] int64": lambda: attention_step(
        Q[:, 0], R(2, 2, 5, 8), R(2, 2, 5, 8), LONG[:, 0], scale=1.0, alibi=AlibiBias((1.0,) * 4, LONG)
    ),
    "attention: window: expected at least 1 visible key, found 0": lambda: attention(Q, K, K, scale=1.0, window=0),
    "attention: scale: expected a number other than 0": lambda: attention(Q, K, K, scale=0.0),
    "attention_step: values: expected floating-point numbers [2, 2, 5, value_dim], found [2, 2, 4, 8]": (
        lambda: attention_step(Q[:, 0], R(2, 2, 5, 8), R(2, 2, 4, 8), LONG[:, 0], scale=1.0)
    ),
    "ssd: B: expected floating-point numbers [2, 6, groups, state], found [2, 7, 2, 3]": lambda: ssd(
        Q, R(2, 6, 4), R(4), R(2, 7, 2, 3), R(2, 6, 2, 3)
    ),
    "ssd: initial_state: expected floating-point numbers [2, 4, 8, 3], found [1, 4, 8, 3]": lambda: ssd(
        Q, R(2, 6, 4), R(4), R(2, 6, 2, 3), R(2, 6, 2, 3), initial_state=R(1, 4, 8, 3)
    ),
    "ssd: 4 heads are not a multiple of 3 groups": lambda: ssd(Q, R(2, 6, 4), R(4), R(2, 6, 3, 3), R(2, 6, 3, 3)),
    "selective_scan: initial_state: expected floating-point numbers [2, 4, 5], found [1, 4, 5]": (
        lambda: selective_scan(R(2, 6, 4), R(2, 6, 4), R(4, 5), R(2, 6, 5), R(2, 6, 5), initial_state=R(1, 4, 5))
    ),
    "gated_delta: initial_state: expected floating-point numbers [2, 4, 3, 8], found [2, 4, 8, 3]": (
        lambda: gated_delta(R(2, 6, 2, 3), R(2, 6, 2, 3), Q, R(2, 6, 4), R(2, 6, 4), initial_state=R(2, 4, 8, 3))
    ),
    "gated_delta: 4 heads are not a multiple of 3 key_heads": (
        lambda: gated_delta(R(2, 6, 3, 3), R(2, 6, 3, 3), Q, R(2, 6, 4), R(2, 6, 4))
    ),
    "gated_delta: g: expected floating-point numbers [2, 6, 4] or [2, 6, 4, 3], found [2, 6, 4, 2] float32": (
        lambda: gated_delta(R(2, 6, 2, 3), R(2, 6, 2, 3), Q, R(2, 6, 4, 2), R(2, 6, 4))
    ),
    "linear_recurrence: a: expected floating-point numbers [2, 6, 4], found [2, 6, 1]": (
        lambda: linear_recurrence(R(2, 6, 4), R(2, 6, 1))
    ),
    "causal_conv1d: initial_state: expected floating-point numbers [2, 2, 4], found [2, 5, 4]": (
        lambda: causal_conv1d(R(2, 6, 4), R(4, 3), initial_state=R(2, 5, 4))
    ),
}


@pytest.mark.parametrize("line", MISFITS)
def test_what_does_not_fit_is_one_line(line):
    with pytest.raises(FusionTreeError) as caught:
        MISFITS[line]()
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("backend", ["auto", "product"])
def test_a_step_over_rows_that_hold_nothing_does_not_end_the_process(backend):
    attention_step(Q[:, 0], R(2, 2, 5, 8), R(2, 2, 5, 8), LONG[:, 0], scale=1.0, backend=backend)


def test_no_rows_are_no_error():
    y, state = ssd(R(0, 6, 4, 8), R(0, 6, 4), R(4), R(0, 6, 2, 3), R(0, 6, 2, 3))
    assert (tuple(y.shape), tuple(state.shape)) == ((0, 6, 4, 8), (0, 4, 8, 3))
