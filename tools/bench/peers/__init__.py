"""The other contestants of tools.bench.build and tools.bench.stream, each a program of its own.

They import nothing of the project, for some run under the interpreter of another environment, which has the peer.
"""
