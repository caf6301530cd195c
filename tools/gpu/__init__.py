"""Modules of tools.gpu_check: settings, facts about the machine, correctness checks, and timings."""
