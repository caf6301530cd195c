"""The training loop, its state and signals, the watchdog, and forks."""
