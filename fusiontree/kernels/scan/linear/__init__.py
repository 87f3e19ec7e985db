"""The recurrence of each channel by itself, with a decay at each token."""
