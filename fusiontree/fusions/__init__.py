"""How sibling branches meet.

The spec classes, and the registry's `register`, `names` and `get`.
"""

from fusiontree.components import fusions as _registry
from fusiontree.fusions.base import BaseFusion, BaseFusionSpec, example_branches
from fusiontree.fusions.concat import Concat
from fusiontree.fusions.gated import Gated
from fusiontree.fusions.inject import Inject
from fusiontree.fusions.mean import Mean
from fusiontree.fusions.parts import AlignSpec, ExchangeSpec, Features, ProjectionSpec
from fusiontree.fusions.sum import Sum

register, names, get = _registry.register, _registry.names, _registry.get

__all__ = [
    "AlignSpec",
    "BaseFusion",
    "BaseFusionSpec",
    "Concat",
    "ExchangeSpec",
    "Features",
    "Gated",
    "Inject",
    "Mean",
    "ProjectionSpec",
    "Sum",
    "example_branches",
    "get",
    "names",
    "register",
]
