"""Tests of train.replicas."""
