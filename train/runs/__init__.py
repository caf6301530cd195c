"""A run on disk: its folder, checkpoints, status, and the loading of trained networks."""
