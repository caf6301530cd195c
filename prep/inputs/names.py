"""Converts the name of an input from bytes to text that can always be printed and stored as UTF-8."""

from __future__ import annotations

import unicodedata


def name_text(name: bytes) -> str:
    r"""Return a name as text. A byte that is not UTF-8 becomes an escape such as `\xff`."""
    return name.decode("utf-8", "backslashreplace")


def composed(text: str) -> str:
    """Return a text in Unicode's composed form, in which a letter and its accent are one character.

    Most systems write names in the composed form.
    """
    return unicodedata.normalize("NFC", text)


def visible(text: str) -> str:
    """Return the visible part of a text: the composed form without invisible characters."""
    return "".join(c for c in composed(text) if unicodedata.category(c) != "Cf")
