"""The training loop, its state and signals, the check for divergence, and forks."""
