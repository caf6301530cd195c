"""Helpers of the tests that run commands under torchrun: jobs, and a program that starts torchrun quickly."""
