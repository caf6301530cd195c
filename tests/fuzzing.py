"""Fuzz tests: hypothesis changes files at random, and a reader must accept each file or raise an error of one line.

Hypothesis draws the changes from a fixed seed, so a test always tries the same files. A long test (marker `soak`) tries
more files. If a reader fails in another way, write a separate test that makes the same change to an intact file.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prep.console import UserError

# Time limit of one call of a reader. Reading a small file takes milliseconds, but the first call may load a library.
MAX_CPU_S = 5.0
MEMORY_BYTES = 1_000_000_000
_EXTREMES = (b"\xff" * 8, bytes(8), b"\x7f\xff\xff\xff" * 2, b"\x00\x00\x00\x80", b"\x1b[31m", b"\xe2\x80\xae")


def examples(quick: int, soak: int) -> pytest.MarkDecorator:
    """Parametrize a test with `count`, the number of files to try: `quick` in `make test`, `soak` in `make soak`."""
    return pytest.mark.parametrize("count", [quick, pytest.param(soak, marks=pytest.mark.soak)])


def changed_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Return a hypothesis strategy that draws changed copies of a file. Each copy has one to six changes."""
    end = len(content)
    # Two thirds of the changes are within 200 bytes of the beginning or the end, where file formats have their headers.
    place = st.one_of(st.integers(0, end), st.integers(0, min(end, 200)), st.integers(max(0, end - 200), end))
    piece = st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from(_EXTREMES))
    change = st.tuples(st.sampled_from(("replace", "insert", "remove", "cut", "flip")), place, piece)
    return st.lists(change, min_size=1, max_size=6).map(lambda changes: _apply(content, changes))


def _apply(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    changed = bytearray(content)
    for kind, place, piece in changes:
        at = min(place, len(changed))
        if kind == "replace":
            changed[at : at + len(piece)] = piece
        elif kind == "insert":
            changed[at:at] = piece
        elif kind == "remove":
            del changed[at : at + piece[0]]
        elif kind == "cut" and piece[0] < 40:
            del changed[at:]
        elif kind == "flip" and at < len(changed):
            changed[at] ^= 1 << piece[0] % 8
    return bytes(changed)


def changed_json(value: Any) -> st.SearchStrategy[bytes]:
    """Return a hypothesis strategy that draws JSON texts: `value` with one to three fields changed or removed.

    Some of the new values are valid in JSON, but not expected by a reader. Some texts are not valid JSON.
    """
    numbers = st.one_of(st.integers(), st.floats(), st.sampled_from((10**30, -1, 0, 1e308, 2**63, -(2**63), 10**400)))
    texts = st.one_of(
        st.text(max_size=20), st.sampled_from(("", "\ud800", "\x1b[31m", "../x", "/x", "a\0b", "\u202ex"))
    )
    leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
    values = st.recursive(
        leaves, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=5), part, max_size=4)
    )
    fields = list(_fields(value))
    one = st.tuples(st.sampled_from(fields), st.one_of(st.just(_REMOVED), values))
    trees = st.lists(one, min_size=1, max_size=3).map(lambda changes: _encoded(value, changes))
    return st.one_of(trees, trees, changed_bytes(json.dumps(value).encode()))


_REMOVED = object()


def _fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _fields(item, (*path, key))


def _encoded(value: Any, changes: list[tuple[tuple[Any, ...], Any]]) -> bytes:
    root = json.loads(json.dumps(value))
    for path, replacement in changes:
        parent = root
        try:
            for key in path[:-1]:
                parent = parent[key]
            if replacement is _REMOVED:
                del parent[path[-1]]
            else:
                parent[path[-1]] = replacement
        except (KeyError, IndexError, TypeError):  # an earlier change has removed the field
            continue
    return json.dumps(root).encode()


def try_files(
    strategy: st.SearchStrategy[bytes],
    count: int,
    read: Callable[[bytes], object],
    *allowed: type[Exception],
) -> None:
    """Call `read` with each of `count` files. Assert that `read` returns, or raises an allowed error of one line.

    Allowed errors are UserError and the types in `allowed`. A call may take at most MAX_CPU_S of CPU time and
    MEMORY_BYTES of memory.
    """

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def try_file(content: bytes) -> None:
        began = time.process_time()
        try:
            read(content)
        except (UserError, *allowed) as error:
            text = str(error)
            assert text and len(text.splitlines()) == 1, repr(text)
            if isinstance(error, UserError):
                assert text.isprintable(), repr(text)
        assert time.process_time() - began < MAX_CPU_S

    with limited_memory():
        try_file()


@contextmanager
def limited_memory() -> Iterator[None]:
    """During a `with` block, let this process allocate at most MEMORY_BYTES in addition to its present memory."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def reader_of(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Return a function that writes its argument to the file `path`, and then calls `read`."""

    def write_and_read(content: bytes) -> object:
        path.write_bytes(content)
        return read()

    return write_and_read
