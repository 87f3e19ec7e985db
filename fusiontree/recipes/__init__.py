"""Run files, grids, and what torchrun starts."""
