"""Helpers of the tests that run commands under torchrun: a program that starts torchrun quickly, and the jobs."""
