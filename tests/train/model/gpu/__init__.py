"""Tests of train/model/gpu: Triton kernels, and the choice between the kernels and PyTorch operators."""
