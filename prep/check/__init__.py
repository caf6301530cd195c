"""Reading a finished store: verify, inspect, export, and plot its colours."""
