"""Time bases that branches share by naming them.

The spec classes, and the registry's `register`, `names` and `get`.
"""

from fusiontree.components import encodings as _registry
from fusiontree.encodings.alibi import Alibi
from fusiontree.encodings.rope import Rope
from fusiontree.encodings.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling
from fusiontree.encodings.srte import SrteLearned, SrteSincos

register, names, get = _registry.register, _registry.names, _registry.get

__all__ = [
    "Alibi",
    "LinearScaling",
    "Llama3Scaling",
    "Rope",
    "SrteLearned",
    "SrteSincos",
    "YarnScaling",
    "get",
    "names",
    "register",
]
