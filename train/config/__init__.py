"""Settings of a run: architectures, recipes and overrides, devices, and the identity of a run. Imports no torch."""
