"""How fast things are on this machine, next to what it could do."""
