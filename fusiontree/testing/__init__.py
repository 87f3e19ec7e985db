"""The laws, for anybody's component: `check(SpecClass)` runs every law that applies, on small examples.

>>> from fusiontree.branches import SwiGLU
>>> from fusiontree.testing import check
>>> len(check(SwiGLU)) > 10
True
"""

from fusiontree.testing.check import LawBroken, check, check_spec
from fusiontree.testing.laws import LAWS, Law

__all__ = ["LAWS", "Law", "LawBroken", "check", "check_spec"]
