"""Every registered component keeps every law."""

import pytest
import torch

from fusiontree.core.contracts.registries import REGISTRIES
from fusiontree.testing import check, check_spec
from fusiontree.zoo.presets import load_spec

torch.set_num_threads(1)
COMPONENTS = [(family, kind) for family, registry in REGISTRIES.items() for kind in registry.names()]


@pytest.mark.parametrize(("family", "kind"), COMPONENTS)
def test_component_keeps_the_laws(family, kind):
    check(REGISTRIES[family].get(kind))


@pytest.mark.parametrize("name", ["quickstart", "v1", "v2", "v3"])
def test_presets_keep_the_laws_when_made_small(name):
    spec = load_spec(name)
    one = spec.expanded_layers()[:1]
    mixer = {"branches.mamba.heads": 2, "branches.mamba.head_dim": 4, "branches.mamba.state": 4, "gate.rank": 2}
    mixer |= {"branches.attention.head_dim": 4, "branches.attention.window": 4}
    if one[0].mixer.align is not None:
        mixer |= {"align.hidden": 8, "mlp.hidden": 8}
    small = spec.model_copy(update={"layers": one, "width": 16, "vocab_size": 11})
    check_spec(small.replace({f"layers.0.mixer.{path}": value for path, value in mixer.items()}))
