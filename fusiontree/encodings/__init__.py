"""Time bases that branches share by naming them."""

from fusiontree.core.contracts import encodings
from fusiontree.encodings.rope import Rope
from fusiontree.encodings.srte import SrteLearned, SrteSincos

__all__ = ["Rope", "SrteLearned", "SrteSincos", "encodings"]
