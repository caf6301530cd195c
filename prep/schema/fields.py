"""Field types that many models use, and the texts that describe an expected type in errors."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

MAX_INT = 2**63 - 1
_LARGEST_FLOAT = 1.7976931348623157e308

# `extra["expected"]` is the text for errors, if the bounds themselves are hard to read.
Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
Finite = Annotated[float, Meta(ge=-_LARGEST_FLOAT, le=_LARGEST_FLOAT, extra={"expected": "a finite number"})]
NonNegative = Annotated[float, Meta(ge=0, le=_LARGEST_FLOAT, extra={"expected": "a finite number of at least 0"})]
Digest = Annotated[
    str, Meta(pattern="^[0-9a-f]{64}$", max_length=64, extra={"expected": "64 lower-case hexadecimal digits"})
]
Text = Annotated[str, Meta(max_length=4096)]


def one_of(*values: str) -> Meta:
    """Return a Meta for a string that must be one of `values`. The values may have only letters, digits, _ and -."""
    return Meta(
        pattern=rf"^({'|'.join(values)})(?![\s\S])",
        extra={"expected": " or ".join(values)},
        extra_json_schema={"enum": list(values)},
    )


_NAMES = {"Any": "any value", "None": "null", "Bool": "true or false", "Bytes": "bytes", "ByteArray": "bytes"}


def text_of(node: Any) -> str:
    """Return the name of a type of msgspec.inspect for errors, such as `an integer of at least 0`."""
    kind = type(node).__name__.removesuffix("Type")
    if kind == "Metadata":
        return str((node.extra or {}).get("expected") or text_of(node.type))
    if kind == "Union":
        return " or ".join(text_of(part) for part in node.types)
    if kind == "Literal":
        return " or ".join(str(value) for value in node.values)
    if kind in ("Int", "Float"):
        return ("an integer" if kind == "Int" else "a number") + _range_text(node)
    if kind == "Str":
        pattern = f" of the form {node.pattern}" if node.pattern else ""
        return "a string" + _length_text(node, "characters") + pattern
    if kind == "Tuple":
        return f"an array of {len(node.item_types)} values"
    if kind in ("List", "VarTuple", "Set", "FrozenSet", "Collection"):
        return "an array" + _length_text(node, "values")
    if kind in ("Struct", "Dataclass", "TypedDict"):
        required = [field.encode_name for field in node.fields if field.required]
        return "an object" + (f" with the fields {', '.join(required)}" if 0 < len(required) <= 12 else "")
    if kind == "Dict":
        return "an object" + _length_text(node, "fields")
    return _NAMES.get(kind, kind)


def _range_text(node: Any) -> str:
    lowest = f"at least {node.ge:,}" if node.ge is not None else f"more than {node.gt:,}" if node.gt is not None else ""
    highest = f"at most {node.le:,}" if node.le is not None else f"less than {node.lt:,}" if node.lt is not None else ""
    if node.le == MAX_INT and lowest:
        highest = ""  # nearly all wrong values are within 64 bits, so the text leaves out this bound
    return f" of {' and '.join(filter(None, (lowest, highest)))}" if lowest or highest else ""


def _length_text(node: Any, unit: str) -> str:
    if node.min_length and node.min_length == node.max_length:
        return f" of {node.min_length:,} {unit}"
    lowest = f"at least {node.min_length:,}" if node.min_length else ""
    highest = f"at most {node.max_length:,}" if node.max_length is not None else ""
    return f" of {' and '.join(filter(None, (lowest, highest)))} {unit}" if lowest or highest else ""
