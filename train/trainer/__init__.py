"""The training loop, its optimizer and schedules, the watchdog, forks, and ablations."""
