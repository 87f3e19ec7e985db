"""Any mixer of any family gives way to a gated fusion of itself with another, in one line; it trains and generates."""

import pytest
import torch
from public import CONFIGS, VOCABULARY, config_of

import fusiontree as ft
from fusiontree.zoo import family_of

MAMBA = {"kind": "mamba2", "heads": 3, "head_dim": 8, "state": 8}
FIRST = {family: name for name, (family, _) in reversed(CONFIGS.items())}
"""One configuration of each family."""


@pytest.mark.parametrize("name", FIRST.values(), ids=FIRST)
def test_a_mixer_is_swapped_in_one_line(name):
    config = config_of(name)
    spec = family_of(config.model_type).spec_of(config.to_dict())
    path = next(path for path, _ in spec.nodes() if path.endswith(".mixer"))
    branches = {"own": spec.node(path), "mamba": MAMBA}
    swapped = spec.replace({path: {"kind": "gated", "branches": branches, "gate": {"kind": "sigmoid"}}})
    assert set(spec.diff(swapped)) == {path}
    model = ft.build(swapped, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        losses.append(model.cross_entropy(tokens, tokens))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert len(model.generate([[1, 2, 3]], max_new_tokens=4)[0]) == 7
