"""How sibling branches meet."""

from fusiontree.core.contracts import fusions
from fusiontree.fusions.concat import Concat
from fusiontree.fusions.gated import Gated
from fusiontree.fusions.mean import Mean
from fusiontree.fusions.parts import AlignSpec, ExchangeSpec, ProjectionSpec
from fusiontree.fusions.sum import Sum

__all__ = ["AlignSpec", "Concat", "ExchangeSpec", "Gated", "Mean", "ProjectionSpec", "Sum", "fusions"]
