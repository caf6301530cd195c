"""The training loop, its state and signals, the watchdog, forks, and ablations."""
