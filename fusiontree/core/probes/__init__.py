"""Observe, force and drop the gates and branches of a running model."""
