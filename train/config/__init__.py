"""Settings of a run: architectures, recipes, overrides, devices, identity. The modules import without torch."""
