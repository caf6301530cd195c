"""The other contestants of tools.bench_build and tools.bench_stream, each a program of its own.

They import nothing of the project, for some run under the interpreter of another environment, which has the peer.
"""
