"""Conversion of networks to and from other programs' formats."""
