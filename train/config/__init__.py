"""The settings of a run: architectures, recipes, overrides, devices, and the identity of a run."""
