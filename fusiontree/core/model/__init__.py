"""The spec of a model, the model, and what is done with one."""
