"""Benchmarks of the build, the stream and the training step, each beside other libraries; `make bench` runs them."""
