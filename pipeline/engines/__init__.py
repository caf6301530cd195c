"""Engines that turn stored records into augmented batches, on the CPU and on the GPU."""
