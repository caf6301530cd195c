"""Photographs into a store: rescale, pack into sharded LMDB, measure the colours exactly. Imports neither torch nor
DALI.
"""
