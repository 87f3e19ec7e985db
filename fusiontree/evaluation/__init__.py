"""What a model is worth, and what costs nothing to beat."""
