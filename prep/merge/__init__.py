"""Merging finished stores into a new store: the order of the records, copies of records, resume."""
