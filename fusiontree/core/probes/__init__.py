"""Looking at a running model, and taking over its gates and branches for a while."""
