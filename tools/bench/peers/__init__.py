"""Other libraries that tools.bench.build and tools.bench.stream measure, each a program of its own.

The programs import no module of this project from outside this folder. Some of them run with the interpreter of another
environment, where this project's dependencies are missing.
"""
