"""Presets, and the maps between FusionTree and public model families, a file each."""

from fusiontree.zoo import (
    bamba,
    falcon_h1,
    gemma,
    granitemoehybrid,
    jamba,
    lfm2,
    llama,
    mamba,
    mamba2,
    nemotron_h,
    olmo_hybrid,
    own,
    qwen3_next,
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
    "lfm2",
    "llama",
    "mamba",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "own",
    "qwen3_next",
    "zamba2",
]
