"""FusionTree: hybrid language models for long context, composed from a declarative spec.

>>> from fusiontree import build, load_spec
>>> model = build(load_spec("quickstart"), device="meta")
>>> model.layers[0].mixer.spec.kind
'gated'

Names are imported at their first use (PEP 562), so that an import of the package for its version or its command line
does not wait for torch. Modules of the package are also attributes, imported in the same way.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusiontree import branches, encodings, fusions, gates, pruning, testing
    from fusiontree.core.contracts.context import Context
    from fusiontree.core.contracts.modules import Norm
    from fusiontree.core.model.layers import LayerSpec, Repeat, Residual
    from fusiontree.core.model.model import LanguageModel, build
    from fusiontree.core.model.spec import EmbeddingSpec, HeadSpec, ModelSpec
    from fusiontree.core.model.weights import load, save
    from fusiontree.zoo.presets import load_spec, presets

__version__ = "0.1.0"

__all__ = [
    "Context",
    "EmbeddingSpec",
    "HeadSpec",
    "LanguageModel",
    "LayerSpec",
    "ModelSpec",
    "Norm",
    "Repeat",
    "Residual",
    "branches",
    "build",
    "encodings",
    "fusions",
    "gates",
    "load",
    "load_spec",
    "presets",
    "pruning",
    "save",
    "testing",
]

_HOMES = {
    "core.contracts.context": ("Context",),
    "core.contracts.modules": ("Norm",),
    "core.model.layers": ("LayerSpec", "Repeat", "Residual"),
    "core.model.model": ("LanguageModel", "build"),
    "core.model.spec": ("EmbeddingSpec", "HeadSpec", "ModelSpec"),
    "core.model.weights": ("load", "save"),
    "zoo.presets": ("load_spec", "presets"),
}
_HOME_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        found = getattr(import_module(_HOME_OF[name]), name)
    elif not name.startswith("_") and name.isidentifier() and find_spec(f"{__name__}.{name}"):
        found = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
