"""Converts the name of an input from bytes to text that can always be printed and stored as UTF-8."""

from __future__ import annotations


def name_text(name: bytes) -> str:
    r"""A name as text; a byte that is not UTF-8 becomes an escape such as `\xff`."""
    return name.decode("utf-8", "backslashreplace")
