"""Extra values of items that Python code yields (prep.build.build_from): numbers, vectors and texts by field."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from operator import index as as_integer
from typing import Any

import numpy as np

from prep.console import UserError
from prep.extra.csv_values import check_field
from prep.store.extra import Column
from prep.store.models import MAX_WIDTH

_EXPECTED = {
    "int": "a whole number within int64",
    "float": "a finite number within float32",
    "vector": "finite numbers within float32",
    "text": "a text that UTF-8 can write",
}


class ItemValues:
    """The extra values of all items added so far. The first item gives the names, types and widths of the fields."""

    def __init__(self) -> None:
        self._types: dict[str, str] = {}
        self._widths: dict[str, int] = {}
        self._numbers: dict[str, array[Any]] = {}
        self._texts: dict[str, list[bytes]] = {}

    def add(self, values: Mapping[str, object], number: int) -> None:
        """Add the values of item `number`.

        Raises UserError if the item has other fields than item 0, or a value of another type than in item 0.
        """
        if not number:
            for name, value in values.items():
                check_field(name, f"item 0: extra field {name!r}")
                self._types[name] = type_ = _type_of(value)
                self._numbers[name], self._texts[name] = array("q" if type_ == "int" else "f"), []
        if values.keys() != self._types.keys():
            names = (", ".join(map(str, fields)) or "none" for fields in (values, self._types))
            raise UserError("item {}: the extra fields {}; expected {}, as in item 0.".format(number, *names))
        for name, value in values.items():
            try:
                self._add(name, value)
            except (TypeError, ValueError, OverflowError):
                type_ = self._types[name]
                width = f", {self._widths[name]} of them as in item 0" if type_ == "vector" and number else ""
                raise UserError(
                    f"item {number}: extra {name} is {value!r:.60}; expected {_EXPECTED[type_]}{width}."
                ) from None

    def columns(self) -> dict[str, Column]:
        """Return the columns of all fields, with a row for each item in the order of the items."""
        columns = {}
        for name, type_ in self._types.items():
            if type_ == "text":
                columns[name] = Column.of_texts(self._texts[name])
                continue
            numbers = np.frombuffer(self._numbers[name], np.int64 if type_ == "int" else np.float32)
            columns[name] = Column(type_, numbers.reshape(-1, self._widths[name]) if type_ == "vector" else numbers)
        return columns

    def _add(self, name: str, value: Any) -> None:
        """Add one value. Raises TypeError, ValueError or OverflowError if the value is wrong."""
        type_ = self._types[name]
        if isinstance(value, bool) or (isinstance(value, str) != (type_ == "text")):
            raise TypeError
        if type_ == "text":
            self._texts[name].append(value.encode())
        elif type_ == "int":
            self._numbers[name].append(as_integer(value))
        else:
            with np.errstate(over="ignore"):
                row = np.asarray(value, np.float64).astype(np.float32)
            width = self._widths.setdefault(name, row.size)
            if row.ndim != (type_ == "vector") or row.size != width or not 1 <= width <= MAX_WIDTH:
                raise ValueError
            if not np.isfinite(row).all():
                raise ValueError
            self._numbers[name].extend(np.atleast_1d(row).tolist())


def _type_of(value: object) -> str:
    if isinstance(value, str):
        return "text"
    if np.ndim(value) == 1:  # type: ignore[arg-type]  # also torch's tensors
        return "vector"
    return "int" if hasattr(value, "__index__") else "float"
