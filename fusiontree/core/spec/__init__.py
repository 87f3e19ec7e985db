"""Data alone, no tensor: strict fields, errors by path, YAML, registries."""
