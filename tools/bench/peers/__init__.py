"""Other libraries that tools.bench.build and tools.bench.stream measure, each a program of its own.

They import nothing of this project outside of this folder: some run with the interpreter of another environment, in
which the library is installed.
"""
