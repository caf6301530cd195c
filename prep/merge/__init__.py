"""Merges finished stores into a new store, and resumes an interrupted merge."""
