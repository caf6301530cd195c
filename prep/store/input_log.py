"""Where the inputs went: counted for the manifest, told one by one in inputs.jsonl. Nothing here holds them all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from prep.files import atomic_file

_NAMED_REASONS = 20  # a manifest does not grow with the number of bad files


def summarize_outcomes(fates: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of what was converted, turned by EXIF, and left out; of many reasons the commonest by name."""
    converted: Counter[str] = Counter()
    turned: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for fate in fates:
        converted.update(fate.get("how", ()))
        if "exif_orientation" in fate:
            turned[str(fate["exif_orientation"])] += 1
        if fate["fate"] == "bad":
            reasons[str(fate["why"])] += 1
    named = dict(reasons.most_common(_NAMED_REASONS))
    if len(named) < len(reasons):
        named["other reasons"] = reasons.total() - sum(named.values())
    return {"converted": dict(converted), "exif_orientation": dict(turned), "bad": named}


def write_outcomes(path: Path, fates: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Write one line for each fate, the file whole or not at all; returns their account."""
    with atomic_file(path) as file:
        return summarize_outcomes(_written(fates, file))


def _written(fates: Iterable[Mapping[str, Any]], file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    for fate in fates:
        file.write(json.dumps(fate, ensure_ascii=False).encode() + b"\n")
        yield fate


def read_outcomes(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of an inputs.jsonl; a name may hold U+2028, so they end at \\n alone. Raises OSError and ValueError."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield json.loads(line)
