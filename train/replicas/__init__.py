"""Replicas of a network in several processes that torchrun started: who they are, and what they exchange."""
