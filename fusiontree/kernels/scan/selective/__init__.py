"""The recurrence of Mamba-1, where each entry of a channel's state decays at a rate of its own."""
