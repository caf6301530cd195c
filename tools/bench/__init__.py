"""Benchmarks of the build, the stream and the training step, compared with other libraries; run by `make bench`."""
