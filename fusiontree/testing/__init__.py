"""The laws, for anybody's component: `check(SpecClass)` runs every law that applies, on small examples; `check_op(OP)`
does so for an operator's backends.

>>> from fusiontree.branches import SwiGLU
>>> from fusiontree.testing import check
>>> len(check(SwiGLU)) > 10
True
"""

from fusiontree.testing.check import LawBroken, check, check_spec
from fusiontree.testing.laws import LAWS, Law
from fusiontree.testing.operators import OP_LAWS, OperatorBroken, OpLaw, check_op

__all__ = ["LAWS", "OP_LAWS", "Law", "LawBroken", "OpLaw", "OperatorBroken", "check", "check_op", "check_spec"]
