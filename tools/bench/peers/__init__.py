"""Programs that tools.bench.build and tools.bench.stream run to measure other libraries: one file for each program.

The programs import no modules of this project except those of this folder, because some programs run in another Python
environment, which lacks the dependencies of this project.
"""
