"""Values as text for people: counts, durations, sizes, quoted paths, and suggestions for mistyped words."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from shlex import quote


def escaped(text: str) -> str:
    r"""Return `text` as one line that a terminal shows as it is: each unprintable character is replaced by its escape.

    Names of files and classes, texts of archives and manifests, and errors of other programs may contain characters
    that control a terminal. All characters are escaped that `str.isprintable` calls unprintable: control characters
    (C0, DEL, C1), line separators, characters that change the direction of text, and lone surrogates (undecodable bytes
    of file names). Examples of escapes: `\x1b`, `\n`, `\x9b`, `\u202e`, `\udcff`. Backslashes are not escaped, so
    escaping a text twice changes nothing.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def encodable(text: str) -> str:
    r"""Return `text` with each lone surrogate replaced by its escape, so that UTF-8 and JSON can hold the text.

    In a path, Python represents each byte that is not UTF-8 by a lone surrogate. Strict readers of JSON refuse
    surrogates. The path `run-\xff` becomes the text `run-\udcff`. `path_of` turns the text into the path again.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def path_of(text: str) -> Path:
    r"""Return the path for a text from `encodable`: escapes become surrogates again.

    If a file has exactly the name `text`, the escapes are part of its name and are kept.
    """
    if "\\udc" not in text or os.path.lexists(text):
        return Path(text)
    return Path(re.sub(r"\\udc([89a-f][0-9a-f])", lambda escape: chr(0xDC00 + int(escape[1], 16)), text))


def did_you_mean(value: object, allowed: Sequence[str]) -> str:
    """Return a question such as ` Did you mean released?` with the one or two values most similar to `value`.

    Returns "" if no value of `allowed` is similar.
    """
    similar = get_close_matches(str(value), allowed, 2, 0.5)
    return f" Did you mean {' or '.join(similar)}?" if similar else ""


def count_noun(n: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: `1 image`, `1,797 images`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def shell_quoted(path: Path) -> str:
    r"""Return a path quoted for a shell command that the user copies: `'my run'`.

    A path with unprintable characters is quoted as bash and zsh read it: `$'my\x1brun'`.
    """
    text = str(path)
    if text.isprintable():
        return quote(text)
    return "$'" + "".join(_shell_escape(c) for c in text) + "'"


def _shell_escape(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def duration_text(seconds: float) -> str:
    """Return a duration as text: `48 s`, `3 min 20 s`, `1 h 05 min`."""
    rounded_s = round(seconds)
    if rounded_s < 60:
        return f"{rounded_s} s"
    if rounded_s < 3600:
        return f"{rounded_s // 60} min {rounded_s % 60:02d} s"
    return f"{rounded_s // 3600} h {rounded_s % 3600 // 60:02d} min"


def bytes_text(n: float) -> str:
    """Return a number of bytes as text, in powers of 1000: `812 B`, `27.4 KB`, `31.2 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n) < (999.5 if unit == "B" else 999.95):
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
