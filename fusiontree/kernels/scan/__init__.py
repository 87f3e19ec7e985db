"""Linear recurrences with a matrix state."""
