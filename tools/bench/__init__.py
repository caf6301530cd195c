"""Benchmarks of the build, the stream and the training step, with comparisons to other libraries.

`make bench` runs four of the benchmarks: build, stream, train and replicas.
"""
