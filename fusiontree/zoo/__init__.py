"""Presets, and the maps between FusionTree and public model families, a file each."""

from fusiontree.zoo import falcon_h1, jamba, llama, mamba, mamba2, olmo_hybrid, qwen3_next
from fusiontree.zoo.family import FAMILIES, Family, family_of

__all__ = [
    "FAMILIES",
    "Family",
    "falcon_h1",
    "family_of",
    "jamba",
    "llama",
    "mamba",
    "mamba2",
    "olmo_hybrid",
    "qwen3_next",
]
