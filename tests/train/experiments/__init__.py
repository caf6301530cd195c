"""Tests of trainings of several networks with one command."""
