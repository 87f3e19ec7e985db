"""Specs as data, without tensors: strict fields, errors by path, YAML, registries."""
