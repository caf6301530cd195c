"""Finds unknown fields of dataclasses and TypedDicts, because msgspec can refuse unknown fields only in Structs.

A dataclass with the class variable `refuses_unknown = True` allows only its own fields. A TypedDict allows only its own
fields if its type in a model is `Annotated[T, REFUSES_UNKNOWN]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from msgspec import Meta

REFUSES_UNKNOWN = Meta(extra={"refuses_unknown": True})

_OBJECTS = ("StructType", "DataclassType", "TypedDictType")
_ARRAYS = ("ListType", "VarTupleType", "SetType", "FrozenSetType")


class Unknown(NamedTuple):
    """An unknown field of an object."""

    path: tuple[str | int, ...]  # keys and indices that lead from the root to the object
    field: str  # name of the unknown field
    known: tuple[str, ...]  # names of the fields that the object may have


_Find = Callable[[Any, tuple[str | int, ...]], Unknown | None]


@cache
def finder(type_: Any) -> _Find | None:
    """Return a function that finds the first unknown field of a value of the model `type_`.

    Returns None if no object of the model refuses unknown fields.
    """
    from msgspec import inspect

    return _finder(inspect.type_info(type_), {})


def _finder(node: Any, known: dict[int, list[_Find | None]]) -> _Find | None:
    """Return the function that `finder` describes, for a type of msgspec.inspect.

    An object type can contain itself. `known` therefore has an entry for each object type around `node`: a list that
    holds the function of the type, or None while the function is being made.
    """
    is_strict = False
    while type(node).__name__ == "Metadata":
        is_strict |= bool((node.extra or {}).get("refuses_unknown"))
        node = node.type
    kind = type(node).__name__
    if kind == "UnionType":
        return next((found for part in node.types if (found := _finder(part, known))), None)
    if kind in _ARRAYS:
        return _in_array(_finder(node.item_type, known))
    if kind == "DictType":
        return _in_mapping(_finder(node.value_type, known))
    if kind not in _OBJECTS:
        return None
    is_strict |= bool(getattr(getattr(node, "cls", None), "refuses_unknown", False))
    if id(node) in known:
        above = known[id(node)]
        return lambda data, path: above[0](data, path) if above[0] else None
    box: list[_Find | None] = [None]
    known[id(node)] = box
    parts = {field.encode_name: _finder(field.type, known) for field in node.fields}
    box[0] = _in_object(parts, is_strict) if is_strict or any(parts.values()) else None
    return box[0]


def _in_object(parts: dict[str, _Find | None], is_strict: bool) -> _Find:
    below = {name: find for name, find in parts.items() if find}

    def find(data: Any, path: tuple[str | int, ...]) -> Unknown | None:
        if not isinstance(data, dict):
            return None
        if is_strict and not data.keys() <= parts.keys():
            return Unknown(path, next(name for name in data if name not in parts), tuple(parts))
        return _first((below[name], data[name], (*path, name)) for name in below if name in data)

    return find


def _in_array(find_in_item: _Find | None) -> _Find | None:
    def find(data: Any, path: tuple[str | int, ...]) -> Unknown | None:
        items = enumerate(data) if isinstance(data, (list, tuple)) else ()
        return _first((find_in_item, item, (*path, number)) for number, item in items)

    return find if find_in_item else None


def _in_mapping(find_in_value: _Find | None) -> _Find | None:
    def find(data: Any, path: tuple[str | int, ...]) -> Unknown | None:
        items = data.items() if isinstance(data, dict) else ()
        return _first((find_in_value, value, (*path, key)) for key, value in items)

    return find if find_in_value else None


def _first(calls: Any) -> Unknown | None:
    return next((found for find, data, path in calls if (found := find(data, path))), None)
