"""Presets, and the maps between FusionTree and public model families."""
