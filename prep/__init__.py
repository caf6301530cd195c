"""alexprep: builds LMDB stores of rescaled photographs with exact colour statistics.

The package imports neither torch nor DALI.
"""
