"""Names of inputs: bytes on a disk, and text that can be printed and stored as UTF-8 whatever the bytes are."""

from __future__ import annotations


def name_text(name: bytes) -> str:
    r"""A name as text; bytes that are not UTF-8 become `\xff`."""
    return name.decode("utf-8", "backslashreplace")
