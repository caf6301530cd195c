"""Fixture `search`: a test runs with and without the C library that finds records.

This module also has helpers that read and compare records.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.records import Records
from prep.store import kernels, lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Store


def stored(store: Store, split: str) -> list[tuple[str, bytes, Datum]]:
    """Return (folder, key, Datum) of every record, in the order of the store."""
    paths = store.shard_paths(split)
    return [(path, key, Datum.decode(value)) for path in paths for key, value in lmdb_shard.read(Path(path))]


@pytest.fixture(params=["C library", "py-lmdb"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test that uses this fixture runs once with the C library, and once with py-lmdb only."""
    if request.param == "py-lmdb":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("the kernels were not compiled")
    return str(request.param)


def assert_batch_holds_records(records: Records, numbers: list[int]) -> None:
    batch, expected = records.batch(np.array(numbers, np.int64)), [records[number] for number in numbers]
    assert batch.numbers.tolist() == numbers
    assert batch.labels.tolist() == [record.label for record in expected]
    assert batch.sizes.tolist() == [[record.height, record.width] for record in expected]
    assert batch.payload_bytes.tolist() == [record.payload.size for record in expected]
    assert [array.dtype for array in batch[:5]] == [np.int64, np.int64, np.int32, np.uint64, np.int64]
    for payload, record in zip(batch.payloads(), expected, strict=True):
        assert payload.shape == record.payload.shape and np.array_equal(payload, record.payload)
        assert not payload.flags.writeable
