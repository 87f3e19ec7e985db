"""Presets, and the maps between FusionTree and public model families, a file each.

Whoever asks for a preset does not wait for the families: their files are imported when one of them is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusiontree.zoo import (
        bamba,
        falcon_h1,
        gemma,
        granitemoehybrid,
        jamba,
        kimi_linear,
        lfm2,
        llama,
        mamba,
        mamba2,
        minimax,
        nemotron_h,
        olmo_hybrid,
        own,
        qwen3_next,
        recurrent_gemma,
        zamba2,
    )
    from fusiontree.zoo.family import FAMILIES, Family, family_of

__all__ = [
    "FAMILIES",
    "Family",
    "bamba",
    "falcon_h1",
    "family_of",
    "gemma",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "llama",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "own",
    "qwen3_next",
    "recurrent_gemma",
    "zamba2",
]

_FILES = tuple(name for name in __all__ if name.islower() and name != "family_of")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _FILES:
        return import_module(f"{__name__}.{name}")
    for file in _FILES:  # each registers its families
        import_module(f"{__name__}.{file}")
    return getattr(import_module(f"{__name__}.family"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
