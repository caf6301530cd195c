"""Diagnostics of the stream: speed by stage, preview of the augmentations, quality of the shuffle."""
