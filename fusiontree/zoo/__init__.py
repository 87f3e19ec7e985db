"""Presets, and the maps between FusionTree and public model families, a file each."""

from fusiontree.zoo import falcon_h1, gemma, jamba, lfm2, llama, mamba, mamba2, own
from fusiontree.zoo.family import FAMILIES, Family, family_of

__all__ = [
    "FAMILIES",
    "Family",
    "falcon_h1",
    "family_of",
    "gemma",
    "jamba",
    "lfm2",
    "llama",
    "mamba",
    "mamba2",
    "own",
]
