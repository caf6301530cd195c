"""Diagnostics of the stream: its speed by stage, a preview of the augmentations, the quality of the shuffle."""
