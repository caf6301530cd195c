"""Reading a finished store: verify it, inspect it, export its images, plot its colours."""
