"""Log of the inputs of a build: the file inputs.jsonl, and the totals for the manifest.

inputs.jsonl has a line for each input that was converted, has an EXIF orientation other than 1, was kept although its
decoder warned, or was left out. A line is a JSON object with the outcome of one input. Every outcome has the keys
"source" and "fate". The fate is "kept", "converted", "kept, with warnings", "bad", or "ignored" for a file that is no
input, such as a file beside class folders. Further keys are written only if they apply: "how" (the conversions),
"exif_orientation", "warnings" (the texts of the decoder), "why" (the reason for a bad or ignored input), and "limit"
(the option that made the input bad: "max_pixels", "time_limit" or "on_warning"). With "max_pixels", the key "pixels" is
the number of pixels of the input. With "time_limit", the key "seconds" is the limit. Outcomes are written one by one,
so memory never holds all outcomes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Final

from prep.files import atomic_file
from prep.schema import decode, open_regular
from prep.store.manifest import StoreError
from prep.store.models import Outcome, outcome_fault

IGNORED: Final = "ignored"  # fate of a file or folder that is not an input, such as a file beside class folders
WARNED = "kept, with warnings"  # fate of an input that was kept although its decoder warned about it
_MAX_LINE_BYTES = 1 << 20
_ADVICE = "Check the store with: alexprep verify"
_MAX_REASONS = 20  # this limit keeps the manifest small if there are many different reasons


def summarize_outcomes(outcomes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Count conversions, EXIF orientations, warnings about kept inputs, and reasons for bad and for ignored inputs.

    The result has the fields of Split.account for these counts. Each of the _MAX_REASONS most frequent reasons for bad
    inputs has its own count. All other reasons are counted together as "other reasons". Warnings are counted in the
    same way. If an input has several warnings, only the first is counted.
    """
    converted: Counter[str] = Counter()
    orientations: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    warned: Counter[str] = Counter()
    for outcome in outcomes:
        converted.update(outcome.get("how", ()))
        if "exif_orientation" in outcome:
            orientations[str(outcome["exif_orientation"])] += 1
        if outcome["fate"] == "bad":
            reasons[str(outcome["why"])] += 1
        elif outcome["fate"] == IGNORED:
            ignored[str(outcome["why"])] += 1
        elif "warnings" in outcome:
            warned[str(outcome["warnings"][0])] += 1
    account = {"converted": dict(converted), "exif_orientation": dict(orientations)}
    account |= {"warnings": _most_frequent(warned, "other warnings")} if warned else {}
    account |= {"bad": _most_frequent(reasons, "other reasons")}
    return {**account, IGNORED: dict(ignored)} if ignored else account


def _most_frequent(counts: Counter[str], others: str) -> dict[str, int]:
    """Return the _MAX_REASONS largest counts, and the sum of the other counts under the name `others`."""
    largest = dict(counts.most_common(_MAX_REASONS))
    if len(largest) < len(counts):
        largest[others] = counts.total() - sum(largest.values())
    return largest


def write_outcomes(path: Path, outcomes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Write inputs.jsonl atomically, one line for each outcome. Returns the totals (see summarize_outcomes)."""
    with atomic_file(path) as file:
        return summarize_outcomes(_write_each(outcomes, file))


def _write_each(outcomes: Iterable[Mapping[str, Any]], file: BinaryIO) -> Iterator[Mapping[str, Any]]:
    for outcome in outcomes:
        file.write(json.dumps(outcome, ensure_ascii=False).encode() + b"\n")
        yield outcome


def read_outcomes(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the outcomes in an inputs.jsonl.

    Raises OSError if reading fails, and StoreError, with the number of the line, for a line that is no outcome. Only
    \\n ends a line: a file name may contain U+2028, at which str.splitlines would split as well.
    """
    with open_regular(path, _ADVICE, StoreError) as lines:
        for number in count(1):
            line = lines.readline(_MAX_LINE_BYTES + 1)
            if not line:
                return
            name = f"{path}, line {number}"
            if len(line) > _MAX_LINE_BYTES:
                raise StoreError(f"{name} has more than {_MAX_LINE_BYTES:,} bytes, the largest length. {_ADVICE}")
            outcome = decode(Outcome, line, name, _ADVICE, StoreError)
            fault = outcome_fault(outcome)
            if fault:
                raise StoreError(f"{name}: {fault}. {_ADVICE}")
            yield dict(outcome)
