"""Presets, and the maps between FusionTree and public model families, one file per family.

Loading a preset does not import the families: they are imported on first access to a name in `__all__`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusiontree.zoo.families import FAMILIES, Family, family_of

__all__ = ["FAMILIES", "Family", "family_of"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.families"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
