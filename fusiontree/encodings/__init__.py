"""Time bases that branches share by naming them.

The spec classes, and the registry's `register`, `names` and `get`.
"""

from fusiontree.components import encodings as _registry
from fusiontree.encodings.alibi import Alibi
from fusiontree.encodings.rope import Rope
from fusiontree.encodings.rope_scaling import Linear, Llama3, Yarn
from fusiontree.encodings.srte import SrteLearned, SrteSincos

register, names, get = _registry.register, _registry.names, _registry.get

__all__ = ["Alibi", "Linear", "Llama3", "Rope", "SrteLearned", "SrteSincos", "Yarn", "get", "names", "register"]
