"""Modules of tools.gpu_check: its settings, facts about the machine, correctness checks, and timings."""
