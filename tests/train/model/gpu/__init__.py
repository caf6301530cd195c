"""Tests of train/model/gpu."""
