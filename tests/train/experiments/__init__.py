"""Tests of commands that train several networks."""
