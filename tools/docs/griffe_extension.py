"""Griffe extension that adapts docstrings and comments of this project to the documentation site.

mkdocs.yml names the extension. Only `make docs` uses the extension. The extension turns a list of names and meanings
into a Markdown table. This is an example of such a list:

    store         folder that `alexprep build-lmdb` wrote
    batch_size    images in a batch of this loader

If an attribute has no docstring, the comment on the attribute's line becomes its docstring. If this line has no
comment, the comment lines above the attribute become the docstring.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

_ENTRY = re.compile(r"(?P<name>\w\S*(?:, \w\S*)*) {2,}(?P<text>\S.*)")
_CONTINUATION = re.compile(r" {5,}(?P<text>\S.*)")
_COMMENT = re.compile(r"\s*#\s?(?P<text>.*)")


class ReadableDocstrings(griffe.Extension):
    """Rewrites docstrings while griffe collects them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace lists of names and meanings by tables."""
        if obj.docstring:
            obj.docstring.value = with_tables(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Use the comment of an attribute as its docstring."""
        if attr.docstring is None and attr.lineno and attr.endlineno and isinstance(attr.filepath, Path):
            text = comment_of(attr.lines_collection[attr.filepath], attr.lineno, attr.endlineno)
            if text and not text.startswith(("noqa", "type:")):
                attr.docstring = griffe.Docstring(text, parent=attr)


def with_tables(text: str) -> str:
    """Return the docstring with each list of names and meanings as a Markdown table."""
    lines: list[str] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if entry := _ENTRY.fullmatch(line):
            rows.append([entry["name"], entry["text"]])
        elif rows and (more := _CONTINUATION.fullmatch(line)):
            rows[-1][1] += f" {more['text']}"
        else:
            if rows:
                lines += ["", "| name | meaning |", "| --- | --- |", *(_row(*row) for row in rows), ""]
                rows = []
            lines.append(line)
    return "\n".join(lines).strip()


def _row(name: str, text: str) -> str:
    text = text.replace("|", r"\|")
    return f"| `{name}` | {text} |"


def comment_of(source: list[str], first: int, last: int) -> str:
    """Return the comment at the end of line `last`.

    If line `last` has no comment, return the comment lines above line `first`. Lines are counted from 1.
    """
    at_end = re.search(r"\s#\s(?P<text>.*)$", source[last - 1])
    if at_end:
        return at_end["text"]
    above: list[str] = []
    while first > 1 and (comment := _COMMENT.fullmatch(source[first - 2])):
        above.insert(0, comment["text"])
        first -= 1
    return " ".join(above)
