"""Programs that tools.bench.build and tools.bench.stream run to measure other libraries: one file for each program.

The programs import no module of this project from outside this folder. Some programs run with the interpreter of
another environment, which lacks the dependencies of this project.
"""
