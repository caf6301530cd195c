"""The two-column AlexNet and its layers, in PyTorch, C and Triton."""
