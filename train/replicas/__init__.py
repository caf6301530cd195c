"""Replicas of a network in several processes that torchrun started: their ranks, and the values that they exchange."""
