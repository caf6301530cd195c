"""alexprep: builds LMDB stores of rescaled photographs with exact colour statistics. Imports neither torch nor DALI."""
