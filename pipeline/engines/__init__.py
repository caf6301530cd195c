"""Engines turn records into augmented images, with a C kernel on a CPU or with a DALI graph."""
