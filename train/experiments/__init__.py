"""Trains several networks with one command: ablations, and ensembles whose members share one stream."""
