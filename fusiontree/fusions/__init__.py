"""How sibling branches meet."""

from fusiontree.core.contracts import fusions
from fusiontree.fusions.base import BaseFusion, BaseFusionSpec, example_branches
from fusiontree.fusions.concat import Concat
from fusiontree.fusions.gated import Gated
from fusiontree.fusions.mean import Mean
from fusiontree.fusions.parts import AlignSpec, ExchangeSpec, Features, ProjectionSpec
from fusiontree.fusions.sum import Sum

__all__ = [
    "AlignSpec",
    "BaseFusion",
    "BaseFusionSpec",
    "Concat",
    "ExchangeSpec",
    "Features",
    "Gated",
    "Mean",
    "ProjectionSpec",
    "Sum",
    "example_branches",
    "fusions",
]
