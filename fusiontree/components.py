"""The imports for authors of components: contracts, field types, small modules, errors.

A branch, fusion, gate or encoding is one file with a spec class and its module. It needs only this module and the
operators of `fusiontree.kernels`; `docs/extend.md` shows an example. The names here are public; their places in `core`
may change.
"""

from fusiontree import products
from fusiontree.core.contracts import axes
from fusiontree.core.contracts.axes import Narrowing
from fusiontree.core.contracts.cache import Rows
from fusiontree.core.contracts.context import Context, State, Table
from fusiontree.core.contracts.encoding import Encoding, EncodingSpec, Hook, encodings
from fusiontree.core.contracts.fusion import AnyNode, Fusion, FusionSpec, branch_path, fusions
from fusiontree.core.contracts.gate import AnyGate, Gate, GateScope, GateSpec, Weights, gates
from fusiontree.core.contracts.modules import (
    LinearModule,
    Module,
    Norm,
    NormModule,
    accumulation_dtype,
    constant,
    fan_in,
    normal,
    scaled,
    total,
)
from fusiontree.core.contracts.node import BranchSpec, Node, NodeSpec, Scope, SharedNodeUser, branches
from fusiontree.core.spec.base import (
    Count,
    Flag,
    Name,
    NamedMap,
    Natural,
    NonNegative,
    Positive,
    Problems,
    Real,
    Spec,
    invalid,
)
from fusiontree.core.spec.registry import Registry
from fusiontree.errors import FusionTreeError, SpecError, suggest

__all__ = [
    "AnyGate",
    "AnyNode",
    "BranchSpec",
    "Context",
    "Count",
    "Encoding",
    "EncodingSpec",
    "Flag",
    "Fusion",
    "FusionSpec",
    "FusionTreeError",
    "Gate",
    "GateScope",
    "GateSpec",
    "Hook",
    "LinearModule",
    "Module",
    "Name",
    "NamedMap",
    "Narrowing",
    "Natural",
    "Node",
    "NodeSpec",
    "NonNegative",
    "Norm",
    "NormModule",
    "Positive",
    "Problems",
    "Real",
    "Registry",
    "Rows",
    "Scope",
    "SharedNodeUser",
    "Spec",
    "SpecError",
    "State",
    "Table",
    "Weights",
    "accumulation_dtype",
    "axes",
    "branch_path",
    "branches",
    "constant",
    "encodings",
    "fan_in",
    "fusions",
    "gates",
    "invalid",
    "normal",
    "products",
    "scaled",
    "suggest",
    "total",
]
