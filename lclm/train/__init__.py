"""Training: a pure step, a loop around it, and what both are configured with."""
