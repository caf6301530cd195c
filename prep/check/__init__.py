"""Reading a finished store: verify the store, inspect it, export its images, plot its colours."""
