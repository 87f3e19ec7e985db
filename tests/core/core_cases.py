"""Small specs as plain data, and the way to read the one line that bad input answers with."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusiontree import LanguageModel, ModelSpec, build
from fusiontree.core.spec.paths import put, split
from fusiontree.errors import FusionTreeError

torch.set_num_threads(1)

VOCABULARY = 13
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 4, "window": 6, "encodings": ["time"]}
MAMBA = {"kind": "mamba2", "heads": 4, "head_dim": 4, "state": 4, "conv": 3}
MLP = {"kind": "mlp", "hidden": 8}
MIXER = {
    "kind": "gated",
    "branches": {"mamba": MAMBA, "attention": ATTENTION},
    "gate": {"kind": "sigmoid", "granularity": "channel", "rank": 4},
}
ENCODINGS = {"time": {"kind": "srte_sincos"}, "rope": {"kind": "rope"}, "turn": {"kind": "rope", "theta": 500}}


def data(**edits: Any) -> dict[str, Any]:
    """A valid model as plain data: a gated layer, then a feed-forward one."""
    whole = {"vocab_size": VOCABULARY, "width": 16, "encodings": ENCODINGS, "layers": [{"mixer": MIXER}, {"ffn": MLP}]}
    return copy.deepcopy(whole | edits)


def edited(path: str, value: Any) -> dict[str, Any]:
    """The valid model with one value changed or added."""
    changed = data()
    put(changed, split(path), value)
    return changed


def spec(**edits: Any) -> ModelSpec:
    """The valid model."""
    return ModelSpec.parse(data(**edits))


@torch.no_grad()
def model(**edits: Any) -> LanguageModel:
    """The valid model in float64, moved from its start so that gates are not all equal."""
    built = build(spec(**edits), dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return built


def tokens(rows: int, time: int, *, seed: int = 0) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(0, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))


def complaint(job: Callable[[], object], *parts: str) -> str:
    """The message that bad input answers with: our own error, one line, every part in it."""
    with pytest.raises(FusionTreeError) as caught:
        job()
    text = str(caught.value)
    assert text
    assert len(text.splitlines()) == 1
    missing = [part for part in parts if part not in text]
    assert not missing, f"{text!r} does not say {missing}"
    return text
