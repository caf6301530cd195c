"""Tests of the comparison of content with typed models: right content is accepted, wrong content gives one line."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, Struct

from prep.console import UserError
from prep.schema import Count, Digest, Finite, convert, decode, parse_json

ADVICE = "Build the store again."


class Part(Struct, frozen=True, forbid_unknown_fields=True):
    """A model whose fields have bounds. The model also compares two fields with each other."""

    path: Annotated[str, Meta(min_length=1, max_length=8)]
    records: Count
    low: Finite = 0.0
    high: Finite = 1.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, expected at most high, {self.high}")


class Whole(Struct, frozen=True, forbid_unknown_fields=True):
    """A model with each kind of container: dicts, tuples and other models."""

    splits: dict[str, tuple[Part, ...]]
    counts: dict[Annotated[str, Meta(max_length=3)], Count] = {}
    kind: Literal["jpeg", "ppm"] = "jpeg"
    digest: Digest = "0" * 64
    vector: tuple[Finite, Finite, Finite] = (0.0, 0.0, 0.0)
    limit: Annotated[int, Meta(ge=1, le=100)] | None = None
    flag: bool = False


@dataclass(frozen=True)
class Lenient:
    """A model that ignores unknown fields."""

    name: str
    loss: float = 0.0


GOOD: dict[str, Any] = {"splits": {"train": [{"path": "a", "records": 3}], "val": [{"path": "b", "records": 4}]}}


def error_of(data: object) -> str:
    """Return the error message for `data`. Asserts that the message is the same for JSON and for Python objects."""
    with pytest.raises(UserError) as caught:
        decode(Whole, json.dumps(data).encode(), "m.json", ADVICE)
    with pytest.raises(UserError) as caught_of_object:
        convert(Whole, data, "m.json", ADVICE)
    message = str(caught.value)
    assert str(caught_of_object.value) == message
    assert message.startswith("m.json: ") and message.endswith(f". {ADVICE}") and message.isprintable()
    return message.removeprefix("m.json: ").removesuffix(f". {ADVICE}")


def test_good_content_becomes_a_model() -> None:
    whole = decode(Whole, json.dumps({**GOOD, "limit": 7, "vector": [1, 2, 3.5]}).encode(), "m.json", ADVICE)
    assert whole.splits["val"] == (Part("b", 4),) and whole.limit == 7 and whole.vector == (1, 2, 3.5)
    assert convert(Whole, GOOD, "m.json", ADVICE).splits["train"][0].records == 3
    assert decode(Lenient, b'{"name": "a", "newer": [1]}', "run.json", ADVICE) == Lenient("a")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"splits": 5}, "splits is 5, expected an object"),
        ({"splits": {"train": {}}}, "splits.train is an object of 0 fields, expected an array"),
        (
            {"splits": {"train": [], "val": [{"path": "b", "records": -1}]}},
            "splits.val.0.records is -1, expected an integer of at least 0",
        ),
        (
            {"splits": {"train": [{"path": "a", "records": True}]}},
            "splits.train.0.records is true, expected an integer of at least 0",
        ),
        (
            {"splits": {"train": [{"path": "a", "records": 1.0}]}},
            "splits.train.0.records is 1.0, expected an integer of at least 0",
        ),
        (
            {"splits": {"train": [{"path": "a", "records": 1 << 200}]}},
            f"splits.train.0.records is {1 << 200}"[: len("splits.train.0.records is ") + 59]
            + "…, expected an integer of at least 0",
        ),
        (
            {"splits": {"val": [{"path": "b"}]}},
            "splits.val.0 has no field records, expected an integer of at least 0",
        ),
        (
            {"splits": {"val": [{"path": "b", "records": 1, "x\x1b": 2}]}},
            'splits.val.0 has the unknown field "x\\x1b", expected only path, records, low, high',
        ),
        (
            {"splits": {"a\x1b[2J": [{"path": "", "records": 1}]}},
            'splits.a\\x1b[2J.0.path is "", expected a string of at least 1 and at most 8 characters',
        ),
        (
            {"splits": {"val": [{"path": "b", "records": 1, "low": 3}]}},
            "splits.val.0: low is 3.0, expected at most high, 1.0",
        ),
        ({"counts": {"abc": 1, "abcd": 2}}, 'counts has the key "abcd", expected a string of at most 3 characters'),
        ({"counts": {"a": 1, "b": None, "c": 2}}, "counts.b is null, expected an integer of at least 0"),
        ({"kind": "png"}, 'kind is "png", expected jpeg or ppm'),
        ({"kind": 5}, "kind is 5, expected jpeg or ppm"),
        ({"digest": "ABC"}, 'digest is "ABC", expected 64 lower-case hexadecimal digits'),
        ({"vector": [1, 2]}, "vector is an array of 2 values, expected an array of 3 values"),
        ({"vector": [1, 2, "x"]}, 'vector.2 is "x", expected a finite number'),
        ({"limit": 101}, "limit is 101, expected an integer of at least 1 and at most 100 or null"),
        ({"limit": "7"}, 'limit is "7", expected an integer of at least 1 and at most 100 or null'),
        ({"flag": 1}, "flag is 1, expected true or false"),
        ({"digest": "0" * 64 + "\n"}, f'digest is "{"0" * 59}…", expected 64 lower-case hexadecimal digits'),
    ],
)
def test_the_error_names_field_found_and_expected(change: dict[str, Any], expected: str) -> None:
    assert error_of({**GOOD, **change}) == expected


def test_a_wrong_root_is_described() -> None:
    assert error_of([1, 2]) == "the content is an array of 2 values, expected an object with the fields splits"
    assert error_of({}) == "the content has no field splits, expected an object"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"name": "a"', "cannot be read as JSON"),
        (b'{"name": "a"} x', "cannot be read as JSON"),
        (b'\xef\xbb\xbf{"name": "a"}', "byte order mark"),
        ('{"name": "a"}'.encode("utf-16"), "cannot be read as UTF-8"),
        (b'{"name": "\xff"}', r"cannot be read as UTF-8 text \(byte 10 is 0xff\)"),
        (b'{"name": "\xed\xa0\x80"}', "cannot be read as UTF-8"),
        (b'{"name": "\\ud800"}', "cannot be read as JSON"),
        (b'{"name": "a", "newer": "\\udfff"}', "cannot be read as JSON"),
        (b'{"name": "a\nb"}', "cannot be read as JSON"),
        (b'{"name": "a", "loss": NaN}', "cannot be read as JSON"),
        (b'{"name": "a", "loss": -Infinity}', "cannot be read as JSON"),
        (b'{"name": "a", "loss": 1e999}', "cannot be read as JSON"),
        (b'{"name": "a", "newer": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b'{"name": "a", "newer": 1, "newer": 2}', 'the key "newer" occurs twice'),
        (b'{"name": "a", "newer": ' + b"[" * 70 + b"]" * 70 + b"}", "more than 64 levels"),
        (b'{"name": "a", "newer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "more than 64 levels"),
        (b'{"a":' * 100_000, "more than 64 levels"),
    ],
)
def test_text_that_is_not_strict_json_is_refused(content: bytes, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        decode(Lenient, content, "run.json", ADVICE)
    assert str(caught.value).startswith("run.json: ") and len(str(caught.value)) < 300
    with pytest.raises(UserError, match=expected):
        parse_json(content, "run.json", ADVICE)


def test_python_objects_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prep.schema.check.MAX_VALUES", 20_000)
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(UserError, match="more than 64 levels"):
        convert(Lenient, {"name": "a", "newer": cycle}, "c.pt", ADVICE)
    shared: list[Any] = [0]
    for _ in range(40):
        shared = [shared] * 10
    with pytest.raises(UserError, match="more than 20,000 values"):
        convert(Lenient, {"name": "a", "newer": shared}, "c.pt", ADVICE)
    with pytest.raises(UserError, match="surrogates"):
        convert(Lenient, {"name": "a\udcff"}, "c.pt", ADVICE)
    with pytest.raises(UserError, match=r"name is b'a', expected a string"):
        convert(Lenient, {"name": b"a"}, "c.pt", ADVICE)


def test_a_text_of_too_many_values_is_refused_before_memory_is_allocated_for_them() -> None:
    content = b"[" + b"[]," * 5_000_000 + b"[]]"  # these lists would take 0.3 GB as Python objects
    tracemalloc.start()
    with pytest.raises(UserError, match=r"more than 5,000,000 values, expected at most 5,000,000"):
        parse_json(content, "run.json", ADVICE)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2 * len(content)


def test_numbers_that_are_not_finite_are_refused_where_the_type_says_so() -> None:
    for number in (float("nan"), float("inf"), -float("inf")):
        assert convert(Lenient, {"name": "a", "loss": number}, "c.pt", ADVICE).name == "a"
        with pytest.raises(UserError, match=f"vector.1 is {number}, expected a finite number"):
            convert(Whole, {**GOOD, "vector": [0, number, 0]}, "c.pt", ADVICE)


def test_the_wrong_key_is_found_among_many() -> None:
    data = {**GOOD, "counts": {f"{k}": k for k in range(900)}}
    data["counts"]["617"] = -617
    data["counts"]["700"] = -700
    assert error_of(data) == "counts.617 is -617, expected an integer of at least 0"
