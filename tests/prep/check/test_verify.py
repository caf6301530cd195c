"""prep.check.verify against stores that are damaged on purpose: every fault is found and named, the rest still looked at.

Records are damaged in the file itself or exchanged by lmdb alone, manifests by json alone; `sealed` gives a changed
record a right checksum, so that what lies behind the checksum is tested too. Two worker processes look at everything:
what kills one of them must be a fault like any other.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import simplejpeg
from click.testing import CliRunner, Result
from PIL import Image

from prep.check.verify import Fault, verify_split
from prep.cli import main
from prep.console import Progress
from prep.images.color_stats import Moments, compute_color_stats
from prep.inputs.listing import Listing
from prep.store.datum import Datum
from prep.store.manifest import Store, StoreError, digest_json, split_fingerprint
from prep.workers import WorkerPool
from tests.conftest import Build

CLASSES = ("n0", "n1", "n2")
SIDE, PAGE = 32, 4096

Records = list[tuple[bytes, bytes]]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(count, format) gives a store of 32 px made of `count` pictures of noise, 64 at the most in a shard."""
    made: dict[tuple[int, str], Path] = {}

    def run(count: int, format: str = "ppm") -> Path:
        if (count, format) not in made:
            photos = tmp_path_factory.mktemp("noise")
            rng = np.random.default_rng(count)
            for name in CLASSES:
                (photos / name).mkdir()
            for number in range(count):
                pixels = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
                pixels[:16] = rng.integers(0, 256, (16, 32, 3), np.uint8) // 4 + 96
                head = b"P6 32 32 255\n"
                (photos / CLASSES[number % 3] / f"p{number}.ppm").write_bytes(head + pixels.tobytes())
            made[count, format] = build(photos, "--side", "32", "--format", format)
        return made[count, format]

    return run


@pytest.fixture
def copy(make: Make, tmp_path: Path) -> Make:
    """As `make`, a copy to be damaged."""

    def run(count: int, format: str = "ppm") -> Path:
        return Path(shutil.copytree(make(count, format), tmp_path / "copy"))

    return run


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    with WorkerPool(2) as running:
        yield running


def faults_of(store: Path, workers: WorkerPool, split: str = "train", decode: bool = True) -> list[Fault]:
    return verify_split(Store.open(store), split, workers, Progress(1, "records"), decode)


def the_fault(store: Path, workers: WorkerPool, *parts: str) -> Fault:
    """The only one, which says all `parts`."""
    faults = faults_of(store, workers)
    assert len(faults) == 1, faults
    for part in parts:
        assert part in faults[0].text()
    return faults[0]


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def seal(store: Path, data: dict[str, Any]) -> None:
    """Write a manifest whose checksum is right, whatever else it says."""
    data.pop("checksum", None)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    (store / "manifest.json").write_text(json.dumps({**data, "checksum": hashlib.sha256(canonical).hexdigest()}))


def change(store: Path, how: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((store / "manifest.json").read_bytes())
    how(data)
    seal(store, data)


def records_of(folder: Path) -> Records:
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as txn:
        return [(bytes(key), bytes(value)) for key, value in txn.cursor()]


def rewrite(folder: Path, records: Records) -> None:
    shutil.rmtree(folder)
    with lmdb.open(str(folder), map_size=1 << 26, lock=False) as env, env.begin(write=True) as txn:
        for key, value in records:
            txn.put(key, value)


def sealed(body: bytes) -> bytes:
    return body + b"\xd5\x3e" + zlib.crc32(body).to_bytes(4, "little")


def changed(value: bytes, **parts: Any) -> bytes:
    return replace(Datum.decode(value), **parts).encode()


# A sound store


@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
def test_a_sound_store_passes(kind: str, stores: dict[str, Path]) -> None:
    result = alexprep("verify", "--store", stores[kind], "--jobs", "2")
    assert result.exit_code == 0, result.output
    assert f"{stores[kind]}: 42 records of train and val agree with the manifest" in result.stdout
    assert result.stdout.count("\n") == 1 and "Error" not in result.stderr


def test_one_split_quickly_in_json(stores: dict[str, Path]) -> None:
    result = alexprep("verify", "--store", stores["ppm"], "--split", "val", "--quick", "--jobs", "1", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer.pop("seconds") > 0
    assert answer == {"ok": True, "splits": ["val"], "records": 12, "faults": []}


def test_progress_counts_on_over_the_splits(stores: dict[str, Path], workers: WorkerPool) -> None:
    """The command shows both splits as one piece of work: 30 of 42, then 42 of 42, never back."""
    counts: list[int] = []

    class Watched(Progress):
        def update(self, done: int, bad: int = 0, size: int = 0) -> None:
            super().update(done, bad, size)
            counts.append(done)

    opened, report = Store.open(stores["ppm"]), Watched(42, "records")
    for split in opened.splits:
        assert verify_split(opened, split, workers, report) == []
    assert counts[-1] == report.done == 42
    assert all(before <= after for before, after in pairwise(counts))


@pytest.mark.parametrize("quality", [50, 100])
def test_a_sound_jpeg_store_of_a_single_photograph_passes(
    quality: int, photo_folder: Path, tmp_path: Path, build: Build, workers: WorkerPool
) -> None:
    """What JPEG loses of one picture is not averaged away, as it is over many."""
    (tmp_path / "photos" / "n0").mkdir(parents=True)
    shutil.copy(next(photo_folder.glob("train/*/*_1.JPEG")), tmp_path / "photos" / "n0")
    store = build(tmp_path / "photos", "--side", "64", "--quality", str(quality))
    assert faults_of(store, workers) == []


def test_a_sound_jpeg_store_of_hard_pictures_passes(tmp_path: Path, build: Build, workers: WorkerPool) -> None:
    """Flat colour, noise, and lines whose colours 4:2:0 mixes: 57 grey levels off in the mean, 135 in each pixel."""
    lines = np.full((64, 64, 3), (0, 0, 255), np.uint8)
    lines[1::2] = 255
    others = np.full((64, 64, 3), (0, 255, 0), np.uint8)
    others[1::2] = (255, 0, 255)
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), np.uint8)
    pictures = {"flat": np.full((64, 64, 3), (7, 8, 9), np.uint8), "noise": noise, "lines": lines, "others": others}
    for name, pixels in pictures.items():
        (tmp_path / name / "n0").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name / "n0" / "a.png")
        store = build(tmp_path / name, "--side", "64", "--quality", "60")
        assert faults_of(store, workers) == [], name


def test_odd_names_of_sources_are_no_fault(tmp_path: Path, build: Build, workers: WorkerPool) -> None:
    """inputs.jsonl holds them as they are: U+2028 and U+0085 end a line for str.splitlines, not for JSON."""
    (tmp_path / "photos" / "n0").mkdir(parents=True)
    for name in ("a\u2028b.png", "c\u0085d.png", "e\u001cf.png", 'g"h\\.png', "é.png"):
        Image.new("RGB", (40, 32), (9, 99, 199)).save(tmp_path / "photos" / "n0" / name)
    store = build(tmp_path / "photos", "--side", "32", "--format", "ppm")
    assert faults_of(store, workers) == []


def test_a_shard_all_of_whose_inputs_were_bad_is_no_fault(tmp_path: Path, build: Build, workers: WorkerPool) -> None:
    """It has no records, so the manifest does not name it."""
    listing = Listing()
    for number in range(128):
        listing.add(f"n0/{number}.ppm".encode(), 0)
    (tmp_path / "photos" / "n0").mkdir(parents=True)
    for place, index in enumerate(listing.permutation(0).tolist()):
        content = b"P6 32 32 255\n" + bytes([place]) * 3072 if place < 64 else b"no picture"
        (tmp_path / "photos" / "n0" / f"{index}.ppm").write_bytes(content)
    store = build(tmp_path / "photos", "--side", "32", "--format", "ppm", "--on-bad", "skip")
    opened = Store.open(store).split("train")
    assert opened.records == 64 and [shard.path for shard in opened.shards] == ["train/00000"]
    assert faults_of(store, workers) == []


# Records


@pytest.mark.parametrize("format", ["ppm", "jpeg"])
def test_a_flipped_bit_in_each_of_a_thousand_records(format: str, copy: Make, workers: WorkerPool) -> None:
    """A thousand faults: each with shard and key, and with the source unless the bit was in what says it."""
    store = copy(1000, format)
    rng = np.random.default_rng(7)
    flipped: dict[tuple[str, str], tuple[str, bool]] = {}
    for folder in sorted((store / "train").glob("[0-9]*")):
        records, content = records_of(folder), bytearray((folder / "data.mdb").read_bytes())
        for key, value in records:
            datum = Datum.decode(value)
            assert content.count(value) == 1
            bit = int(rng.integers(8 * len(value)))
            content[content.index(value) + bit // 8] ^= 1 << bit % 8
            at = value.index(datum.data)
            inside = at <= bit // 8 < at + len(datum.data) or bit // 8 >= len(value) - 6
            flipped[f"train/{folder.name}", key.decode()] = datum.source.decode(), inside
        (folder / "data.mdb").write_bytes(content)
    assert len(flipped) == 1000 and sum(inside for _, inside in flipped.values()) > 900
    for decode in (True, False):
        faults = faults_of(store, workers, decode=decode)
        assert len(faults) == 1000
        assert [(fault.where, fault.key) for fault in faults] == sorted(flipped)
        for fault in faults:
            source, inside = flipped[fault.where, fault.key]
            assert "checksum" in fault.what
            assert fault.source == source or not inside
            assert all(part in fault.text() for part in (fault.where, fault.key, fault.source))


def grey_jpeg(value: bytes) -> bytes:
    return changed(value, data=simplejpeg.encode_jpeg(np.zeros((32, 32, 1), np.uint8), 90, "GRAY"))


def jpeg_of(height: int, width: int) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.zeros((height, width, 3), np.uint8), 90, "RGB", "420"))


def broken_scan(value: bytes) -> bytes:
    data = Datum.decode(value).data
    return changed(value, data=data[: data.index(b"\xff\xda") + 30])


RESEALED: dict[str, tuple[tuple[Callable[[bytes], bytes], str], ...]] = {
    "jpeg": (
        (lambda v: changed(v, data=b"no picture"), "not an image"),
        (lambda v: changed(v, data=b""), "empty file"),
        (broken_scan, "cannot be decoded"),
        (grey_jpeg, "RGB JPEG"),
        (lambda v: changed(v, data=jpeg_of(32, 40)), "(32, 40"),
        (lambda v: changed(v, data=jpeg_of(32, 40), width=40), "40×32 px"),
        (lambda v: changed(v, width=31), "31×32 px"),
        (lambda v: changed(v, height=64, width=64), "64×64 px"),
        (lambda v: changed(v, label=3), "label 3, the store has 3 classes"),
        (lambda v: sealed(b""), "no encoded image"),
        (lambda v: sealed(v[:-17]), "ends at byte"),
        (lambda v: v[:-6], "no checksum"),
        (lambda v: b"", "no checksum"),
        (lambda v: v + b"\0", "no checksum"),
    ),
    "ppm": (
        (lambda v: changed(v, data=Datum.decode(v).data.replace(b"#", b" ", 1)), "PPM"),
        (lambda v: changed(v, data=Datum.decode(v).data[:-1]), "PPM"),
        (lambda v: changed(v, data=Datum.decode(v).data + b"\0"), "PPM"),
        (lambda v: changed(v, data=jpeg_of(32, 32)), "PPM"),
        (lambda v: changed(v, height=33), "32×33 px"),
        (lambda v: changed(v, label=2**40), f"label {2**40}"),
    ),
}


@pytest.mark.parametrize("format", RESEALED)
def test_what_a_right_checksum_hides_is_found(format: str, copy: Make, workers: WorkerPool) -> None:
    """Each in a record of its own; the others are not named, and the digest is not held against such a shard."""
    store = copy(150, format)
    folder = store / "train" / "00001"
    records = records_of(folder)
    expected = {}
    for (number, (key, value)), (how, what) in zip(list(enumerate(records))[::3], RESEALED[format], strict=False):
        records[number] = key, how(value)
        expected[key.decode()] = Datum.decode(value).source.decode(), what
    rewrite(folder, records)
    assert len(expected) == len(RESEALED[format])
    faults = faults_of(store, workers)
    assert [fault.key for fault in faults] == sorted(expected)
    for fault in faults:
        source, what = expected[fault.key]
        assert fault.where == "train/00001" and what in fault.what, fault
        assert fault.source in (source, "")
    if format == "jpeg":
        closed = {fault.key for fault in faults_of(store, workers, decode=False)}
        assert closed == {key for key, (_, what) in expected.items() if key in closed} and 0 < len(closed) < len(faults)


def swap_labels(records: Records) -> None:
    first = Datum.decode(records[0][1])
    other = next(i for i, (_, value) in enumerate(records) if Datum.decode(value).label != first.label)
    second = Datum.decode(records[other][1])
    records[0] = records[0][0], replace(first, label=second.label).encode()
    records[other] = records[other][0], replace(second, label=first.label).encode()


def use_another(records: Records) -> None:
    records[3] = records[3][0], records[4][1]


def rename_key(records: Records) -> None:
    records[-1] = b"00099999", records[-1][1]


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (swap_labels, "digest"),
        (use_another, "the manifest says"),
        (rename_key, "digest"),
        (lambda records: records.pop(), "the manifest says"),
        (lambda records: records.append((b"00099999", records[0][1])), "the manifest says"),
        (lambda records: records.clear(), "records 0, the manifest says"),
    ],
)
@pytest.mark.parametrize("decode", [True, False])
def test_sound_records_that_are_not_the_ones_built(
    how: Callable[[Records], object], what: str, decode: bool, copy: Make, workers: WorkerPool
) -> None:
    """Only the shard's sums can tell."""
    store = copy(150)
    folder = store / "train" / "00001"
    records = records_of(folder)
    how(records)
    rewrite(folder, records)
    (fault,) = faults_of(store, workers, decode=decode)
    assert (fault.where, fault.key) == ("train/00001", "") and what in fault.what


@pytest.mark.parametrize("key", [b"0000000x", b"000000001", b"x", b"\xff" * 8, b"-0000001"])
def test_keys_that_are_none(key: bytes, copy: Make, workers: WorkerPool) -> None:
    store = copy(64)
    folder = store / "train" / "00000"
    records = records_of(folder)
    rewrite(folder, [*records, (key, records[5][1])])
    faults = faults_of(store, workers)
    assert {fault.where for fault in faults} == {"train/00000"}
    assert faults[-1].source == Datum.decode(records[5][1]).source.decode()
    assert "eight digits" in faults[-1].what


# The LMDB


def diagnosed(store: Path, workers: WorkerPool) -> list[Fault]:
    """Faults that name the one shard, as a store damaged in its pages must have."""
    faults = faults_of(store, workers)
    assert faults and {fault.where for fault in faults} == {"train/00000"}
    return faults


def test_a_file_cut_short_anywhere(copy: Make, workers: WorkerPool) -> None:
    store = copy(64)
    file = store / "train" / "00000" / "data.mdb"
    whole = file.read_bytes()
    rng = np.random.default_rng(20)
    cuts = [0, 1, PAGE - 1, PAGE, 2 * PAGE, len(whole) - PAGE, len(whole) - 1]
    for length in [*cuts, *rng.integers(0, len(whole), 20 - len(cuts)).tolist()]:
        file.write_bytes(whole[:length])
        assert len(diagnosed(store, workers)) == 1
    file.write_bytes(whole)
    assert faults_of(store, workers) == []


@pytest.mark.parametrize("content", ["zeros", "random", "of another page"])
def test_a_page_overwritten(content: str, copy: Make, workers: WorkerPool) -> None:
    """Each page that records lie on, one at a time; the last of the two header pages is the one in use."""
    store = copy(64)
    file = store / "train" / "00000" / "data.mdb"
    whole = file.read_bytes()
    rng = np.random.default_rng(4)
    pages = len(whole) // PAGE
    for page in [1, 2, 3, 4, *range(5, pages, 6)]:
        other = rng.integers(pages - 1)
        page_now = {"zeros": bytes(PAGE), "random": rng.bytes(PAGE), "of another page": b""}[content]
        if not page_now:
            other = (page + 7) % pages
            page_now = whole[other * PAGE : (other + 1) * PAGE]
        file.write_bytes(whole[: page * PAGE] + page_now + whole[(page + 1) * PAGE :])
        diagnosed(store, workers)
    file.write_bytes(whole)
    assert faults_of(store, workers) == []


def put(file: Path, at: int, content: bytes) -> None:
    with open(file, "r+b") as handle:
        handle.seek(at)
        handle.write(content)


def newest_header(content: bytes) -> int:
    """Where the header page in use begins: of the two the one with the higher transaction number."""
    return max((0, PAGE), key=lambda at: int.from_bytes(content[at + 144 : at + 152], "little"))


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (16, b"\0\0\0\0"),  # magic
        (20, b"\x09"),  # version
        (120, (63).to_bytes(8, "little")),  # entries, which DALI takes for the number of records
        (128, (3).to_bytes(8, "little")),  # root
        (128, b"\xff" * 8),
        (136, (10**6).to_bytes(8, "little")),  # last page
        (144, bytes(8)),  # transaction number: the other header, of an empty LMDB, is taken
    ],
    ids=["magic", "version", "entries", "root", "no-root", "last-page", "transaction"],
)
def test_a_header_damaged(offset: int, content: bytes, copy: Make, workers: WorkerPool) -> None:
    store = copy(64)
    file = store / "train" / "00000" / "data.mdb"
    put(file, newest_header(file.read_bytes()) + offset, content)
    diagnosed(store, workers)


def make_deadly(store: Path) -> None:
    """The first record says that it is 200 MB long: who reads it is killed by the kernel."""
    file = store / "train" / "00000" / "data.mdb"
    content = file.read_bytes()
    node = content.index(b"\x08\x0000000000") + 2 - 8  # low and high half of the size, flags, length of the key, key
    put(file, node, (200_000_000).to_bytes(4, "little"))


def test_what_kills_a_worker_is_a_fault_and_the_others_are_still_looked_at(copy: Make, workers: WorkerPool) -> None:
    store = copy(150)
    make_deadly(store)
    folder = store / "train" / "00002"
    records = records_of(folder)
    rewrite(folder, [(records[0][0], b"damaged"), *records[1:]])
    deadly, other = faults_of(store, workers)
    assert (deadly.where, deadly.key) == ("train/00000", "")
    assert "was killed (SIG" in deadly.what and "at record 0" in deadly.what
    assert (other.where, other.key) == ("train/00002", records[0][0].decode())


def test_the_command_survives_and_names_each_fault_on_a_line(copy: Make) -> None:
    """As a process: one shard kills its reader, one is cut short, one has a bad record, one is missing."""
    store = copy(300)
    make_deadly(store)
    file = store / "train" / "00001" / "data.mdb"
    file.write_bytes(file.read_bytes()[:-PAGE])
    records = records_of(store / "train" / "00002")
    rewrite(store / "train" / "00002", [(key, value[:-1] + b"\0") for key, value in records[:1]] + records[1:])
    shutil.rmtree(store / "train" / "00003")
    program = [sys.executable, "-c", "from prep.cli import main; main()", "verify", "--store", str(store)]
    plain = subprocess.run([*program, "--jobs", "2"], capture_output=True, text=True, timeout=60)
    assert plain.returncode == 1
    lines = plain.stdout.splitlines()
    assert len(lines) == 4
    for number, (line, what) in enumerate(zip(lines, ("killed", "bytes, expected", "checksum", ""), strict=True)):
        assert line.startswith(f"train/{number:05d}") and what in line
    assert records[0][0].decode() in lines[2] and Datum.decode(records[0][1]).source.decode() in lines[2]
    assert plain.stderr == f"Error: {plain.stderr[7:-1]}\n" and f"{store}: 4 faults" in plain.stderr

    result = alexprep("verify", "--store", store, "--jobs", "2", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["ok"] is False and answer["records"] == 300
    assert [set(fault) for fault in answer["faults"]] == [{"where", "key", "source", "what"}] * 4
    assert [fault["where"] for fault in answer["faults"]] == [f"train/{number:05d}" for number in range(4)]


def test_shards_that_are_missing_or_too_many(copy: Make, workers: WorkerPool) -> None:
    store = copy(150)
    shutil.copytree(store / "train" / "00001", store / "train" / "00003")
    assert the_fault(store, workers, "does not name").where == "train/00003"
    shutil.rmtree(store / "train" / "00003")
    (store / "train" / "00002" / "data.mdb").unlink()
    assert the_fault(store, workers, "No such file").where == "train/00002"
    shutil.rmtree(store / "train" / "00002")
    assert the_fault(store, workers, "No such file").where == "train/00002"


# The manifest and the files beside it


def train(data: dict[str, Any]) -> dict[str, Any]:
    split: dict[str, Any] = data["splits"]["train"]
    return split


def move(shards: list[dict[str, Any]], name: str) -> None:
    """One from the second to the first: their sum stays."""
    shards[0][name] += 1
    shards[1][name] -= 1


MANIFEST: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "fingerprint of the store": (lambda d: d.update(fingerprint="0" * 64), "fingerprint of the store"),
    "fingerprint": (lambda d: train(d).update(fingerprint="0" * 64), "fingerprint"),
    "records": (lambda d: train(d).update(records=151), "151"),
    "bytes": (lambda d: train(d).update(bytes=1), "bytes of all shards"),
    "label_counts": (lambda d: train(d).update(label_counts=[50, 50, 51]), "records of all classes"),
    "label_counts moved": (lambda d: train(d).update(label_counts=[51, 49, 50]), "50 records of n0, it says 51"),
    "label_counts of a class more": (lambda d: train(d)["label_counts"].append(0), "classes with a count"),
    "kept": (lambda d: train(d)["account"].update(kept=149), "inputs kept"),
    "inputs": (lambda d: train(d)["account"].update(inputs=151), "inputs kept or bad"),
    "bad": (lambda d: train(d)["account"].update(bad={"empty file": 1}), "bad"),
    "a class renamed": (lambda d: d["classes"].__setitem__(1, "other"), "fingerprint"),
    "classes exchanged": (lambda d: d["classes"].reverse(), "fingerprint"),
    "shard digest": (lambda d: train(d)["shards"][1].update(digest="0" * 64), "digest"),
    "shard records": (lambda d: train(d)["shards"][1].update(records=49), "records"),
    "shard bytes": (lambda d: train(d)["shards"][1].update(bytes=1), "bytes"),
    "shard records moved": (lambda d: move(train(d)["shards"], "records"), "train/00000: records"),
    "shard bytes moved": (lambda d: move(train(d)["shards"], "bytes"), "train/00000: bytes"),
    "shards exchanged": (lambda d: train(d)["shards"].reverse(), "fingerprint"),
    "shard left out": (lambda d: train(d)["shards"].pop(), "does not name"),
    "side": (lambda d: d["settings"].update(side_px=33), "the store's shorter side is 33"),
    "format": (lambda d: d["settings"].update(format="jpeg"), "expected an RGB JPEG"),
    "pixels": (lambda d: train(d).update(pixels=1), "pixels"),
}


@pytest.mark.parametrize("name", MANIFEST)
def test_manifest_that_says_something_else(name: str, copy: Make, workers: WorkerPool) -> None:
    store = copy(150)
    how, what = MANIFEST[name]
    change(store, how)
    faults = faults_of(store, workers)
    assert any(what in fault.text() for fault in faults), faults
    for fault in faults:
        if found := re.search(r"(\S+) pixels, it says (\S+)", fault.what):
            assert found[1] != found[2]  # the two values differ


def test_shards_exchanged_with_a_right_fingerprint(copy: Make, workers: WorkerPool) -> None:
    """The keys tell: those of a split ascend over its shards."""
    store = copy(150)
    opened = Store.open(store)
    change(store, lambda data: train(data)["shards"].reverse())
    new = split_fingerprint(opened.classes, opened.split("train").shards[::-1])
    change(store, lambda data: train(data).update(fingerprint=new))
    change(store, lambda data: data.update(fingerprint=digest_json({"train": new})))
    assert any("follows key" in fault.what for fault in faults_of(store, workers))


@pytest.mark.parametrize("name", ["settings", "shards", "records", "label_counts", "moments", "account", "classes"])
def test_manifest_of_other_types_gets_one_line(name: str, copy: Make, workers: WorkerPool) -> None:
    """Whatever stands there: a fault or StoreError that names the file, and no other error."""
    store = copy(64)
    for value in (None, "x", -1, [[1]], {"a": {}}):
        change(store, lambda data, value=value: (data if name in data else train(data)).__setitem__(name, value))
        try:
            said = [fault.text() for fault in faults_of(store, workers)]
        except StoreError as error:
            said = [str(error)]
        assert any("manifest" in line or "colour.json" in line for line in said), said


def set_moments(store: Path, moments: Moments) -> None:
    """As if the build had written them: colour.json fits."""
    change(store, lambda data: train(data).update(moments=moments.to_json(), pixels=moments.pixels))
    stats = compute_color_stats(Store.open(store).split("train").records, moments)
    (store / "train" / "colour.json").write_text(json.dumps(stats.__dict__))


def test_moments_to_the_bit(copy: Make, workers: WorkerPool) -> None:
    """One more or less in any of the 13 sums of a ppm store."""
    store = copy(64)
    true = Moments.from_json(Store.open(store).split("train").moments)
    set_moments(store, true)
    assert faults_of(store, workers) == []
    set_moments(store, replace(true, pixels=true.pixels + 1))
    the_fault(store, workers, "manifest.json", "pixels")
    for channel in range(3):
        total = list(true.total)
        total[channel] += 1
        set_moments(store, replace(true, total=tuple(total)))
        the_fault(store, workers, "manifest.json", "moments")
        for other in range(3):
            outer = [list(row) for row in true.outer]
            outer[channel][other] -= 1
            set_moments(store, replace(true, outer=tuple(map(tuple, outer))))
            the_fault(store, workers, "manifest.json", "moments")
            assert faults_of(store, workers, decode=False) == []  # which --quick cannot see


def shifted(true: Moments, levels: int) -> Moments:
    """Those of the same pictures, each pixel `levels` brighter: the same covariance."""
    n, t = true.pixels, true.total
    outer = tuple(tuple(true.outer[i][j] + levels * (t[i] + t[j]) + n * levels**2 for j in range(3)) for i in range(3))
    return Moments(n, tuple(s + n * levels for s in t), outer)


def test_moments_beyond_what_jpeg_explains(copy: Make, workers: WorkerPool) -> None:
    """Of a jpeg store: far from its pictures' in the mean, in the spread alone, and in the mean image alone."""
    store = copy(150, "jpeg")
    true = Moments.from_json(Store.open(store).split("train").moments)
    set_moments(store, true)
    assert faults_of(store, workers) == []
    set_moments(store, shifted(true, 80))
    assert any("mean" in fault.what and fault.where == "manifest.json" for fault in faults_of(store, workers))
    centred = [[true.outer[i][j] * true.pixels - true.total[i] * true.total[j] for j in range(3)] for i in range(3)]
    outer = tuple(
        tuple(true.outer[i][j] - 3 * centred[i][j] // (4 * true.pixels) for j in range(3)) for i in range(3)
    )  # a quarter of the covariance
    set_moments(store, replace(true, outer=outer))
    assert any("covariance" in fault.what for fault in faults_of(store, workers))
    set_moments(store, true)
    mean = np.load(store / "train" / "mean_image.npy")
    np.save(store / "train" / "mean_image.npy", mean + np.float32(150))
    assert {fault.where for fault in faults_of(store, workers)} == {"train/mean_image.npy"}


def test_colour_file(copy: Make, workers: WorkerPool) -> None:
    store = copy(64)
    path = store / "train" / "colour.json"
    whole = json.loads(path.read_bytes())
    for name, value in whole.items():
        other = value + 1 if isinstance(value, int) else np.multiply(value, 1.00001).tolist()
        path.write_text(json.dumps({**whole, name: other}))
        assert the_fault(store, workers, "pca-stats writes it again").where == "train/colour.json"
    for content in (b"", b"{}", b"[]", b"\xff"):
        path.write_bytes(content)
        assert the_fault(store, workers).where == "train/colour.json"
    path.unlink()
    assert the_fault(store, workers, "pca-stats").where == "train/colour.json"
    assert alexprep("pca-stats", "--store", store).exit_code == 0
    assert faults_of(store, workers) == []


def test_mean_image_to_the_bit(copy: Make, workers: WorkerPool) -> None:
    store = copy(64)
    path = store / "train" / "mean_image.npy"
    whole = np.load(path)
    other = whole.copy()
    other[31, 31, 2] = np.nextafter(other[31, 31, 2], np.float32(0))
    for array in (other, whole[..., ::-1], whole[:31], whole.astype(np.float64)):
        np.save(path, array)
        assert the_fault(store, workers).where == "train/mean_image.npy"
    path.write_bytes(b"no array")
    the_fault(store, workers, "digest")
    path.unlink()
    the_fault(store, workers, "cannot be read")
    np.save(path, whole)
    assert faults_of(store, workers) == []


def test_account_of_the_inputs(make: Make, tmp_path: Path, build: Build, workers: WorkerPool) -> None:
    """Lines left out, added, changed: against the counts of the manifest."""
    (tmp_path / "photos" / "n0").mkdir(parents=True)
    Image.new("RGB", (40, 32), (9, 99, 199)).save(tmp_path / "photos" / "n0" / "a.png")
    (tmp_path / "photos" / "n0" / "bad.jpg").write_bytes(b"no picture")
    store = build(tmp_path / "photos", "--side", "32", "--format", "ppm", "--on-bad", "skip")
    path = store / "train" / "inputs.jsonl"
    assert faults_of(store, workers) == []
    converted, bad = path.read_text().splitlines()
    assert json.loads(converted)["fate"] == "converted" and json.loads(bad)["fate"] == "bad"
    for lines in (
        [converted],
        [bad],
        [],
        [converted, bad, bad],
        [converted, converted, bad],
        [converted, bad.replace('"why": "', '"why": "no ')],
        [converted.replace("png", "cmyk"), bad],
        [converted, bad, "{"],
        [converted, bad, '{"source": "x"}'],
        [converted, bad, "3"],
    ):
        path.write_text("".join(f"{line}\n" for line in lines))
        assert {fault.where for fault in faults_of(store, workers)} == {"train/inputs.jsonl"}, lines
    path.write_bytes(b"\xff\xfe")
    assert the_fault(store, workers, "digest").where == "train/inputs.jsonl"
    path.unlink()
    assert the_fault(store, workers, "cannot be read").where == "train/inputs.jsonl"


def test_a_store_or_split_that_is_not_there(copy: Make, tmp_path: Path) -> None:
    for words, message in (
        (("--store", tmp_path / "nowhere"), "no such store"),
        (("--store", copy(64), "--split", "val"), "has no split val"),
    ):
        result = alexprep("verify", *words)
        assert result.exit_code == 1 and result.stdout == ""
        assert message in result.stderr and result.stderr.count("\n") == 1
