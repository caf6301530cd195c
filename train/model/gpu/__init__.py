"""The network on a GPU: fused Triton kernels, conv1 over blocks of pixels, columns computed together."""
