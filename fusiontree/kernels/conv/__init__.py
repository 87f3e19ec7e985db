"""Short convolutions over time."""
