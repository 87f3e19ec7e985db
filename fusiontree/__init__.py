"""FusionTree: hybrid language models for long context, composed from a declarative spec.

>>> from fusiontree import build, load_spec
>>> model = build(load_spec("quickstart"), device="meta")
>>> model.layers[0].mixer.spec.kind
'gated'
"""

from fusiontree import branches, encodings, fusions, gates, pruning, testing
from fusiontree.core.context import Context
from fusiontree.core.model import LanguageModel, build
from fusiontree.core.model_spec import EmbeddingSpec, HeadSpec, ModelSpec
from fusiontree.core.modules import Norm
from fusiontree.core.stack import LayerSpec, Repeat, Residual
from fusiontree.core.weights import load, save
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
