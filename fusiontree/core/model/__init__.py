"""The spec of a model, the model, and operations on it."""
