"""A store into a stream of augmented, mean-subtracted batches, with NVIDIA DALI, on GPU or CPU."""
