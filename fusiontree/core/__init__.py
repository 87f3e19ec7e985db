"""The spec, the contracts, the model: everything that knows no component by name."""
