"""Edits of JSON values: a field is deleted, or gets a value that is wrong, huge, nested or not printable.

The same edits also change the plain values (texts, numbers, lists and dicts) of a checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]

NESTED_LISTS = 10_000
_LONG_TEXT = 100_000  # number of characters
_SHOWN_ITEMS = 2  # if a list has more items than this, only the first and the last item are edited


@dataclass(frozen=True)
class Nested:
    """Lists nested in each other, `depth` levels deep."""

    depth: int


@dataclass(frozen=True)
class Twice:
    """The object `content`. In its JSON, the key `key` occurs twice, and its first value is `first`."""

    content: Mapping[str, Any]
    key: str
    first: Any


@dataclass(frozen=True)
class ValueEdit:
    """One edit of one field."""

    field: str  # for example `splits.train.shards.0.records`; empty for the whole value
    kind: str  # for example `delete` or `negative`
    value: Any  # the content of the whole file after the edit; can contain Nested and Twice


def encode(value: Any) -> str:
    """Return a value as JSON. NaN and infinities are written as the json module of Python writes them."""
    if isinstance(value, Nested):
        return "[" * value.depth + "]" * value.depth
    if isinstance(value, Twice):
        first = f"{json.dumps(value.key)}: {encode(value.first)}"
        return "{" + ", ".join([first, *(f"{json.dumps(k)}: {encode(v)}" for k, v in value.content.items())]) + "}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {encode(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(encode, value)) + "]"
    return json.dumps(value)


def value_edits(root: Any, skipped: Callable[[Path, Any], bool] = lambda path, value: False) -> Iterator[ValueEdit]:
    """Yield all edits of all fields of a value made of objects, lists, texts, numbers, booleans and null.

    If `skipped` returns True for a field, the field and all fields inside the field are not edited.
    """
    for path, value in _fields(root, (), skipped):
        name = ".".join(map(str, path))
        for kind, changed in _replacements(value):
            if path:
                yield ValueEdit(name, kind, _replaced(root, path, changed))
            elif kind not in ("null", "true", "text", "list", "object"):  # byte_edits makes these edits of whole files
                yield ValueEdit(name, kind, changed)
        if path and isinstance(path[-1], str):
            yield ValueEdit(name, "delete", _deleted(root, path))
            parent = _at(root, path[:-1])
            yield ValueEdit(name, "twice", _replaced(root, path[:-1], Twice(parent, path[-1], value)))


def _fields(value: Any, path: Path, skipped: Callable[[Path, Any], bool]) -> Iterator[tuple[Path, Any]]:
    if skipped(path, value):
        return
    yield path, value
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _fields(item, (*path, key), skipped)
    elif isinstance(value, list | tuple):
        for index in sorted({0, len(value) - 1}) if len(value) > _SHOWN_ITEMS else range(len(value)):
            yield from _fields(value[index], (*path, index), skipped)


def _replacements(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (kind, replacement) for a field."""
    others: dict[str, Any] = {
        "null": None,
        "true": True,
        "text": "text",
        "list": [],
        "object": {},
        "number": 7,
        "fraction": 1.5,
    }
    for kind, other in others.items():
        if type(other) is not type(value) and not (kind == "number" and isinstance(value, float)):
            yield kind, other
    yield "nested", Nested(NESTED_LISTS)
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield from _numbers(value)
    elif isinstance(value, str):
        yield from _texts(value)
    elif isinstance(value, Mapping):
        yield "unknown field", {**value, "unknown_field": 1}
        yield "empty", {}
    elif isinstance(value, list | tuple) and value:
        yield "item removed", list(value)[:-1]
        yield "item repeated", [*value, value[-1]]
        if list(value) != list(value)[::-1]:
            yield "items reversed", list(value)[::-1]


def _numbers(value: float) -> Iterator[tuple[str, Any]]:
    numbers = {"zero": 0, "minus 1": value - 1, "plus 1": value + 1, "negative": -value or -1}
    yield from ((kind, number) for kind, number in numbers.items() if number != value)
    yield "10^30", 10**30
    yield "400 digits", 10**400
    yield "1e308", 1e308
    yield "NaN", math.nan
    yield "Infinity", math.inf
    yield "-Infinity", -math.inf


def _texts(value: str) -> Iterator[tuple[str, Any]]:
    if value:
        yield "empty text", ""
    yield "other text", "text"
    yield "escape code", f"{value}\x1b[31m\x1b]0;title\x07"
    yield "C1 control", f"{value}\x9b31m"
    yield "newline", f"{value}\nError: none"
    yield "NUL", f"{value}\0"
    yield "bidi", f"{value}\u202etxt"
    yield "surrogate", f"{value}\ud800"
    yield "long text", value + "x" * _LONG_TEXT
    yield "outside", f"../{value}"
    yield "absolute", f"/{value}"


def _at(root: Any, path: Path) -> Any:
    for key in path:
        root = root[key]
    return root


def _replaced(root: Any, path: Path, value: Any) -> Any:
    """Return a copy of `root` in which the field at `path` has the value `value`."""
    if not path:
        return value
    copied: Any = dict(root) if isinstance(root, Mapping) else list(root)
    copied[path[0]] = _replaced(root[path[0]], path[1:], value)
    return copied


def _deleted(root: Any, path: Path) -> Any:
    parent = {key: item for key, item in _at(root, path[:-1]).items() if key != path[-1]}
    return _replaced(root, path[:-1], parent)


def plain(value: Any, depth: int) -> Any:
    """Return an edited value for a pickle: Nested becomes `depth` nested lists, and Twice becomes its content."""
    if isinstance(value, Nested):
        nested: list[Any] = []
        for _ in range(depth):
            nested = [nested]
        return nested
    if isinstance(value, Twice):
        return plain(value.content, depth)
    if isinstance(value, dict):
        return {key: plain(item, depth) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item, depth) for item in value)
    return value


def field_matches(field: str, patterns: Sequence[str]) -> bool:
    """Return True if a pattern of `patterns` matches the field `field`, such as `splits.train.account`.

    In a pattern, `*` stands for any one name between dots: `splits.*.account`. A pattern that matches a field also
    matches all fields inside this field.
    """
    parts = field.split(".")
    for pattern in patterns:
        wanted = pattern.split(".") if pattern else []
        pairs = zip(wanted, parts, strict=False)
        if len(wanted) <= len(parts) and all(w in ("*", part) for w, part in pairs):
            return True
    return False
