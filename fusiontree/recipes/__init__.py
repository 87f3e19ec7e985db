"""Run files, grids, and the module that torchrun starts."""
