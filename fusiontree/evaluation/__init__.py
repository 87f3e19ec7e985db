"""Evaluation: scores of a model, and baselines."""
