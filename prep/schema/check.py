"""Checks JSON and Python objects against a typed model, and describes the first wrong field in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar, cast

import msgspec

from prep.console import UserError, escaped
from prep.schema.fields import text_of
from prep.schema.unknown_fields import finder

MAX_DEPTH = 64  # largest number of levels of nested objects and arrays
MAX_VALUES = 5_000_000  # largest number of values in all containers of a file; 5 million dicts need 0.6 GB
_SHOWN_CHARACTERS = 60  # longer values are shortened in errors
_PATH_PART = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_LOCATION = re.compile(r" - at (`key` in )?`\$(.*)`$", re.DOTALL)

T = TypeVar("T")


class _Refused(ValueError):
    """Content that no model accepts, such as an object with the same key twice."""


def decode(type_: type[T], content: bytes, name: str, advice: str, error: Callable[[str], UserError] = UserError) -> T:
    """Parse a JSON text, and return its value as an object of the model `type_`.

    `name` is the name of the file or line in errors, and `advice` is the last sentence of an error. Raises `error` for
    text that parse_json refuses, and for the first field that the model does not allow.
    """
    return _typed(type_, parse_json(content, name, advice, error), name, advice, error)


def convert(type_: type[T], data: object, name: str, advice: str, error: Callable[[str], UserError] = UserError) -> T:
    """Return `data` as an object of the model `type_`. `data` consists of dicts, lists, tuples, strings and numbers.

    The other arguments and the errors are those of `decode`. Strings must be valid Unicode, without lone surrogates.
    The data may have at most MAX_DEPTH levels and MAX_VALUES values. NaN and infinite numbers are allowed where the
    type is `float` without bounds; the types `Finite` and `NonNegative` refuse them.
    """
    try:
        _check_size(data)
    except _Refused as refused:
        raise error(escaped(f"{name}: {refused}. {advice}")) from None
    return _typed(type_, data, name, advice, error)


def parse_json(content: bytes, name: str, advice: str, error: Callable[[str], UserError] = UserError) -> Any:
    """Return the value of a JSON text that no model describes. If there is a model, use `decode` instead.

    Raises `error` unless the content is strict JSON in UTF-8 without byte order mark. NaN, infinite numbers, lone
    surrogates, control characters in a string, and objects with the same key twice are refused. More than MAX_DEPTH
    levels or more than MAX_VALUES values are refused, too.
    """
    try:
        text = content.decode("utf-8")
        if text.startswith("\ufeff"):
            raise _Refused("begins with a byte order mark, expected UTF-8 without it")
        if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:  # checked before memory is allocated
            raise _Refused(f"holds more than {MAX_VALUES:,} values, expected at most {MAX_VALUES:,}")
        msgspec.json.decode(text)  # stricter than json.loads about numbers and surrogates
        data = json.loads(text, object_pairs_hook=_unique_keys)
        _check_size(data)
    except _Refused as refused:
        raise error(escaped(f"{name}: {refused}. {advice}")) from None
    except UnicodeDecodeError as invalid:
        what = f"cannot be read as UTF-8 text (byte {invalid.start} is 0x{content[invalid.start]:02x})"
        raise error(escaped(f"{name}: {what}. {advice}")) from None
    except RecursionError:
        raise error(escaped(f"{name}: {_too_deep()}. {advice}")) from None
    except ValueError as malformed:
        what = f"cannot be read as JSON ({_shortened(str(malformed), 120)})"
        raise error(escaped(f"{name}: {what}. {advice}")) from None
    return data


def _typed(type_: type[T], data: Any, name: str, advice: str, error: Callable[[str], UserError]) -> T:
    try:
        value = msgspec.convert(data, type_)
        find_unknown = finder(cast(Hashable, type_))
        unknown = find_unknown(data, ()) if find_unknown else None
        if unknown is None:
            return value
        what = _unknown_text(_where(unknown.path), unknown.field, unknown.known)
    except msgspec.ValidationError as invalid:
        what = _description(type_, data, invalid)
    except RecursionError:
        what = _too_deep()
    except (ValueError, OverflowError) as invalid:
        what = str(invalid)
    raise error(escaped(f"{name}: {what}. {advice}"))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these (key, value) pairs. Raises _Refused if a key occurs twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {shown(twice)} occurs twice in one object, expected once")
    return made


def _too_deep() -> str:
    return f"objects and arrays are nested more than {MAX_DEPTH} levels deep, expected at most {MAX_DEPTH}"


def _check_size(data: object) -> None:
    """Raise _Refused if the data has too many levels or values, or a string with a lone surrogate."""
    level, values = [data], 0
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                parts = [*value, *value.values()]
            elif isinstance(value, (list, tuple, set, frozenset)):
                parts = list(value)
            else:
                if isinstance(value, str) and not value.isascii():
                    _check_unicode(value)
                continue
            values += len(parts)
            if values > MAX_VALUES:
                raise _Refused(f"holds more than {MAX_VALUES:,} values, expected at most {MAX_VALUES:,}")
            deeper += parts
        if not deeper:
            return
        level = deeper
    raise _Refused(_too_deep())


def _check_unicode(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Refused(f"holds the string {shown(value)}, expected Unicode without surrogates") from None


def _description(type_: Any, data: Any, invalid: msgspec.ValidationError) -> str:
    """Return a text that says what is wrong: field, value found, value expected."""
    found_at = _LOCATION.search(str(invalid))
    message = str(invalid)[: found_at.start()] if found_at else str(invalid)
    path = _resolved_path(type_, data, str(invalid), found_at.group(2) if found_at else "")
    node, value = _expected_type(type_, path), _value_at(data, path)
    where = _where(path)
    if invalid.__cause__ is not None:  # the message of a check in __post_init__ of a model
        return f"{where}: {message}" if path else message
    field = message.partition("`")[2].partition("`")[0]
    if message.startswith("Object missing required field"):
        return f"{where} has no field {field}, expected {text_of(_field_type(node, field))}"
    if message.startswith("Object contains unknown field"):
        return _unknown_text(where, field, [part.encode_name for part in _plain(node).fields])
    if found_at and found_at.group(1):  # a key of an object
        return f"{where} has the key {shown(path.bad_key)}, expected {text_of(_plain(node).key_type)}"
    return f"{where} is {shown(value)}, expected {text_of(node)}"


def _where(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path) or "the content"


def _unknown_text(where: str, field: str, known: Sequence[str]) -> str:
    return f"{where} has the unknown field {shown(field)}, expected only {', '.join(known[:12])}"


class _Path(list[str | int]):
    """Keys and indices from the root of the data to a value. `bad_key` is the key that is wrong, if a key is wrong."""

    bad_key: object = ""


def _resolved_path(type_: Any, data: Any, message: str, location: str) -> _Path:
    """Return the path to the wrong value.

    msgspec's message has `[...]` in place of the key of a mapping. The returned path has the key.
    """
    path = _Path()
    for match in _PATH_PART.finditer(location):
        name, index = match.groups()
        if name is not None:
            path.append(name)
        elif index != "...":
            path.append(int(index))
        else:
            path.append(_wrong_key(type_, data, message, path))
    if "at `key` in" in message:
        path.bad_key = _wrong_key(type_, data, message, path)
    return path


def _wrong_key(type_: Any, data: Any, message: str, path: _Path) -> Any:
    """Find, by bisection, the first entry of the mapping at `path` that causes the error `message`. Returns its key."""
    keys = list(_value_at(data, path))
    low, high = 0, len(keys)  # the first `high` entries raise the error, the first `low` entries do not
    while high - low > 1:
        middle = (low + high) // 2
        mapping = _value_at(data, path)
        part = {key: mapping[key] for key in keys[:middle]}
        try:
            msgspec.convert(_with_value(data, path, part), type_)
        except msgspec.ValidationError as invalid:
            if str(invalid) == message:
                high = middle
                continue
        low = middle
    return keys[low] if keys else ""


def _with_value(data: Any, path: list[str | int], value: Any) -> Any:
    """Return a copy of `data` in which `value` is at `path`. Only the containers on the path are copied."""
    if not path:
        return value
    copy: Any = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = _with_value(data[path[0]], path[1:], value)
    return copy


def _value_at(data: Any, path: list[str | int]) -> Any:
    for part in path:
        data = data[part]
    return data


def _plain(node: Any) -> Any:
    """Return a type of msgspec.inspect without its metadata and without `or null`."""
    while type(node).__name__ in ("Metadata", "UnionType"):
        node = node.type if type(node).__name__ == "Metadata" else _container(node.types)
    return node


def _container(types: tuple[Any, ...]) -> Any:
    names = (
        "StructType",
        "DataclassType",
        "TypedDictType",
        "DictType",
        "TupleType",
        "VarTupleType",
        "ListType",
        "Metadata",
    )
    return next((part for part in types if type(part).__name__ in names), types[0])


def _field_type(node: Any, name: str) -> Any:
    return next(field.type for field in _plain(node).fields if field.encode_name == name)


def _expected_type(type_: Any, path: list[str | int]) -> Any:
    """Return the type of the value at `path`, as a type of msgspec.inspect."""
    from msgspec import inspect

    node: Any = inspect.type_info(type_)
    for part in path:
        plain = _plain(node)
        kind = type(plain).__name__
        if kind in ("StructType", "DataclassType", "TypedDictType"):
            node = _field_type(plain, str(part))
        elif kind == "DictType":
            node = plain.value_type
        elif kind == "TupleType":
            node = plain.item_types[int(part)]
        else:
            node = plain.item_type
    return node


def shown(value: object) -> str:
    """Return a value from a file as short text for an error, with control characters escaped."""
    if isinstance(value, dict):
        return f"an object of {len(value):,} fields"
    if isinstance(value, (list, tuple)):
        return f"an array of {len(value):,} values"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return escaped(f'"{_shortened(value, _SHOWN_CHARACTERS)}"')
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN_CHARACTERS:
        return f"an integer of {value.bit_length():,} bits"
    return escaped(_shortened(repr(value), _SHOWN_CHARACTERS))


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
