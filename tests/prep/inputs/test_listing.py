"""prep.inputs.listing: content of a listing, record order, and memory.

The tests compute the record order from its definition with hashlib. The memory is measured in a separate process.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prep.console import UserError
from prep.inputs.listing import OWN_FILE, Input, Listing

ADVICE = "Build again."

INPUTS = [
    Input(b"n1/a.JPEG", 0, 12, 34),
    Input(b"", 7),
    Input(b"n1/\xff\xfe \n.JPEG", 1, 2**40, 2**62, 5),
    Input("n2/é.JPEG".encode(), 999, 0, -5, OWN_FILE),
    Input(b"x" * 5000, 2, 1, 1, 2**50),
]


def listing_of(inputs: list[Input]) -> Listing:
    listing = Listing()
    for item in inputs:
        listing.add(item.path, item.label, item.size, item.mtime_ns, item.location)
    return listing


def paths_in_order(listing: Listing, seed: int) -> list[bytes]:
    return [listing.path(index) for index in listing.permutation(seed).tolist()]


def test_a_listing_returns_what_was_added() -> None:
    listing = listing_of(INPUTS)
    assert len(listing) == len(INPUTS)
    assert list(listing) == INPUTS
    assert [listing[index] for index in range(len(INPUTS))] == INPUTS
    assert [listing.path(index) for index in range(len(INPUTS))] == [item.path for item in INPUTS]


@pytest.mark.parametrize("index", [-1, 5, 6])
def test_an_index_out_of_range_raises_index_error(index: int) -> None:
    with pytest.raises(IndexError):
        listing_of(INPUTS).path(index)
    with pytest.raises(IndexError):
        listing_of(INPUTS)[index]


@pytest.mark.parametrize("inputs", [INPUTS, []])
def test_a_saved_listing_is_loaded_unchanged(inputs: list[Input], tmp_path: Path) -> None:
    listing = listing_of(inputs)
    listing.save(tmp_path / "inputs.npz")
    again = Listing.load(tmp_path / "inputs.npz", 1000, ADVICE)
    assert list(again) == inputs
    assert again.same_as(listing)
    assert again.digest() == listing.digest()
    again.add(b"more", 3)
    assert list(again) == [*inputs, Input(b"more", 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "inputs.npz"
    listing_of(INPUTS[:1]).save(path)
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        listing_of(INPUTS).save(path)
    assert list(Listing.load(path, 1000, ADVICE)) == INPUTS[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.npz"]


@pytest.mark.parametrize("content", [b"", b"no archive", "cut"])
def test_loading_another_file_raises_an_error(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    listing_of(INPUTS).save(path)
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"inputs\.npz.*Build again"):
        Listing.load(path, 1000, ADVICE)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"label": [0, 1]}, "label has 2 values, expected 3"),
        ({"label": [0, 1, 7]}, "labels from 0 to 7, expected 0 to 4"),
        ({"label": [0, -1, 2]}, "labels from -1 to 2, expected 0 to 4"),
        ({"ends": [1, 0, 6]}, "`ends` do not ascend"),
        ({"ends": [1, 2, 7]}, "`ends` do not ascend"),
        ({"ends": [-1, 2, 6]}, "`ends` do not ascend"),
        ({"size": [1.0, 2.0, 3.0]}, "size is float64"),
        ({"at": np.zeros((3, 1), int)}, r"at is int64 of shape \(3, 1\)"),
    ],
)
def test_a_listing_whose_arrays_do_not_agree_is_refused(
    change: dict[str, object], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "inputs.npz"
    numbers = np.arange(3)
    good = {"paths": np.full(6, 97, np.uint8), "ends": 2 * numbers + 2, "label": numbers, "size": numbers}
    good |= {"stamp_ns": numbers, "at": numbers}
    np.savez(path, **good)
    assert [item.path for item in Listing.load(path, 5, ADVICE)] == [b"aa"] * 3
    np.savez(path, **{**good, **{name: np.asarray(value) for name, value in change.items()}})
    with pytest.raises(UserError, match=expected):
        Listing.load(path, 5, ADVICE)


OTHERS = [
    [*INPUTS[:3], Input("n2/è.JPEG".encode(), 999, 0, -5), INPUTS[4]],
    [*INPUTS[:3], Input("n2/é.JPEG".encode(), 998, 0, -5), INPUTS[4]],
    [*INPUTS[:3], Input("n2/é.JPEG".encode(), 999, 1, -5), INPUTS[4]],
    [*INPUTS[:3], Input("n2/é.JPEG".encode(), 999, 0, -6), INPUTS[4]],
    [*INPUTS[:3], Input("n2/é.JPEG".encode(), 999, 0, -5, 3), INPUTS[4]],
    INPUTS[:4],
    INPUTS[::-1],
]


@pytest.mark.parametrize("other", OTHERS)
def test_same_as_compares_every_column(other: list[Input]) -> None:
    assert listing_of(INPUTS).same_as(listing_of(INPUTS))
    assert not listing_of(INPUTS).same_as(listing_of(other))


def test_the_digest_covers_paths_labels_and_sizes() -> None:
    """The digest also depends on the position at which each path ends.

    The digest does not depend on modification times, or on offsets in an archive.
    """
    digest = listing_of(INPUTS).digest()
    same = [listing_of(other).digest() == digest for other in OTHERS]
    assert same == [False, False, False, True, True, False, False]
    boundaries = [Input(b"ab", 0), Input(b"c", 0)], [Input(b"a", 0), Input(b"bc", 0)]
    assert listing_of(boundaries[0]).digest() != listing_of(boundaries[1]).digest()


def test_the_record_order_is_by_a_keyed_hash_of_the_path() -> None:
    """The test computes the order from its definition. The order of the letters a to h must never change."""
    paths = [f"n{k % 7:08d}/n{k % 7:08d}_{k}.JPEG".encode() for k in range(500)]
    listing = listing_of([Input(path, 0) for path in paths])
    for seed in (0, 1, 2**63 - 1):
        key = seed.to_bytes(8, "little")
        expected = sorted(paths, key=lambda path, key=key: hashlib.blake2b(path, digest_size=8, key=key).digest())
        assert paths_in_order(listing, seed) == expected
    letters = listing_of([Input(letter.encode(), 0) for letter in "abcdefgh"])
    assert b"".join(paths_in_order(letters, 0)) == b"dgfchbae"


def test_the_record_order_does_not_depend_on_the_order_of_the_listing() -> None:
    inputs = [Input(f"n1/{k}.JPEG".encode(), k % 3, k, k) for k in range(300)]
    expected = paths_in_order(listing_of(inputs), 4)
    for seed in range(3):
        shuffled = random.Random(seed).sample(inputs, len(inputs))
        assert paths_in_order(listing_of(shuffled), 4) == expected


class CollidingHash:
    """Replaces BLAKE2b with a function that gives two thirds of all paths the same hash."""

    def __init__(self, path: bytes, digest_size: int, key: bytes) -> None:
        self.path = path

    def digest(self) -> bytes:
        return b"the same" if self.path[0] % 3 else hashlib.sha256(self.path).digest()[:8]


def test_equal_hashes_are_ordered_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prep.inputs.listing.hashlib.blake2b", CollidingHash)
    inputs = [Input(bytes([97 + k]), 0) for k in range(20)]
    expected = sorted((CollidingHash(item.path, 8, b"").digest(), item.path) for item in inputs)
    for seed in range(3):
        shuffled = random.Random(seed).sample(inputs, len(inputs))
        assert paths_in_order(listing_of(shuffled), 0) == [path for _, path in expected]


def test_the_record_order_of_no_input_and_of_one() -> None:
    assert listing_of([]).permutation(0).tolist() == []
    assert listing_of(INPUTS[:1]).permutation(0).tolist() == [0]
    assert np.issubdtype(listing_of([]).permutation(0).dtype, np.integer)


MEMORY = """
import sys
from pathlib import Path
from prep.console import UserError
from prep.inputs.listing import Listing
from prep.store.manifest import Settings
from prep.build.plan import BuildPlan
from prep.inputs.sources import FolderReader, Source

def peak_mb():
    status = Path("/proc/self/status").read_text()  # in a child process, ru_maxrss starts at the value of the parent
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000

count, before = int(sys.argv[1]), peak_mb()
listing = Listing()
for number in range(count):
    label = number // 1300
    wnid = b"n%08d" % (1440764 + 7919 * label)
    listing.add(b"%b/%b_%d.JPEG" % (wnid, wnid, number * 37 % 99991), label, 110_000 + number, 1_340_000_000 * 10**9)
classes = tuple(f"n{k:08d}" for k in range(1000))
settings = Settings(256, False, "jpeg", 90, "area", 0)
plan = BuildPlan(Source(FolderReader(Path("/data")), "train", classes, listing), Path("/store/train"), settings, False)
seen = 0
for task in map(plan.task, range(plan.shard_count)):
    seen += len(task.inputs)
work = Path(sys.argv[2])
listing.save(work / "inputs.npz")
assert Listing.load(work / "inputs.npz", 1000, "").same_as(listing)
assert seen == count, seen
print(before, peak_mb())
"""


def peak_mb(count: int, folder: Path) -> tuple[float, float]:
    """Return (memory after the imports, peak memory) in MB of a process that lists and plans `count` inputs."""
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY, str(count), str(folder)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    before, after = ended.stdout.split()
    return float(before), float(after)


def test_a_tenth_of_imagenet_takes_less_than_40_mb(tmp_path: Path) -> None:
    before, after = peak_mb(130_000, tmp_path)
    assert after - before < 40


@pytest.mark.soak
def test_imagenet_takes_less_than_300_mb(tmp_path: Path) -> None:
    """The process lists 1.3 million inputs. The limit includes the memory of the imported modules."""
    assert peak_mb(1_300_000, tmp_path)[1] < 300
