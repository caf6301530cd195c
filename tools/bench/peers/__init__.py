"""Programs that tools.bench.build and tools.bench.stream run to measure other libraries: one file for each program.

The programs import no other module of this project, because some programs run in another Python environment, which
lacks the dependencies of this project.
"""
