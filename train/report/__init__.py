"""Figures and pages about runs: plots, the HTML report, comparisons, and image search."""
