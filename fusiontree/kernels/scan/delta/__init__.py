"""The gated delta rule: a state that is told what it got wrong, and not only what is new."""
