"""The families of components."""

from typing import Any

from fusiontree.core.contracts.encoding import encodings
from fusiontree.core.contracts.fusion import fusions
from fusiontree.core.contracts.gate import gates
from fusiontree.core.contracts.node import branches
from fusiontree.core.spec.registry import Registry

REGISTRIES: dict[str, Registry[Any]] = {r.name: r for r in (branches, fusions, gates, encodings)}
"""Every family by its name."""
