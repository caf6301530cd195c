"""Benchmarks of the build, the stream and the training step, with comparisons to other libraries.

`make bench` runs the benchmarks.
"""
