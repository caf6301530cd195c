"""Engines turn records into augmented images: a C kernel on a CPU, a Triton kernel on a GPU, DALI on both."""
