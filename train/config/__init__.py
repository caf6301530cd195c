"""Settings of a run: architectures, recipes, overrides, devices and the identity. This room does not import torch."""
