"""prep.check.verify and `alexprep verify`: undamaged stores pass, faults are reported as lines and as JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.check.verify import verify_split
from prep.cli import main
from prep.console import Progress
from prep.inputs.listing import Listing
from prep.store.datum import Datum
from prep.store.manifest import Store
from prep.workers import WorkerPool
from tests.conftest import Build
from tests.helpers.damaged_stores import (
    PAGE_BYTES,
    MakeStore,
    faults_of,
    lengthen_first_record,
    read_records,
    replace_records,
)


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
def test_an_undamaged_store_passes(kind: str, stores: dict[str, Path]) -> None:
    result = alexprep("verify", "--store", stores[kind], "--jobs", "2")
    assert result.exit_code == 0, result.output
    assert f"{stores[kind]}: 42 records of train and val agree with the manifest" in result.stdout
    assert "settings that cannot be verified from the records: filter, background" in result.stdout
    assert result.stdout.count("\n") == 2 and "Error" not in result.stderr


def test_one_split_is_verified_quickly_with_an_answer_in_json(stores: dict[str, Path]) -> None:
    result = alexprep("verify", "--store", stores["ppm"], "--split", "val", "--quick", "--jobs", "1", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer.pop("seconds") > 0
    assert {"filter", "quality"} < set(answer.pop("not_verified"))
    assert answer == {"ok": True, "splits": ["val"], "records": 12, "faults": []}


def test_progress_counts_over_all_splits(stores: dict[str, Path], workers: WorkerPool) -> None:
    """Progress counts both splits together: it reaches 30 of 42 records, then 42 of 42, and never decreases."""
    counts: list[int] = []

    class Watched(Progress):
        def update(self, done: int, bad: int = 0, size: int = 0) -> None:
            super().update(done, bad, size)
            counts.append(done)

    opened, progress = Store.open(stores["ppm"]), Watched(42, "records")
    for split in opened.splits:
        assert verify_split(opened, split, workers, progress) == []
    assert counts[-1] == progress.done == 42
    assert all(before <= after for before, after in pairwise(counts))


@pytest.mark.parametrize("quality", [50, 100])
def test_a_jpeg_store_of_a_single_photograph_passes(
    quality: int, photo_folder: Path, tmp_path: Path, build: Build, workers: WorkerPool
) -> None:
    """The error of JPEG compression averages out over many images, but not in a single image."""
    (tmp_path / "photos" / "n0").mkdir(parents=True)
    shutil.copy(next(photo_folder.glob("train/*/*_1.JPEG")), tmp_path / "photos" / "n0")
    store = build(tmp_path / "photos", "--side", "64", "--quality", str(quality))
    assert faults_of(store, workers) == []


def test_a_jpeg_store_of_images_that_jpeg_changes_most_passes(
    tmp_path: Path, build: Build, workers: WorkerPool
) -> None:
    """One image has a single colour, and one is noise. Two images have lines whose colours 4:2:0 subsampling mixes.

    In these images, JPEG changes the mean of a channel by up to 56 grey levels, and single values by more than 200 grey
    levels.
    """
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


def test_odd_names_of_inputs_are_not_faults(tmp_path: Path, build: Build, workers: WorkerPool) -> None:
    """inputs.jsonl contains U+2028 and U+0085 without escapes.

    str.splitlines splits at U+2028 and U+0085, but JSON allows both characters in a string.
    """
    (tmp_path / "photos" / "n0").mkdir(parents=True)
    for name in ("a\u2028b.png", "c\u0085d.png", "e\u001cf.png", 'g"h\\.png', "é.png"):
        Image.new("RGB", (40, 32), (9, 99, 199)).save(tmp_path / "photos" / "n0" / name)
    store = build(tmp_path / "photos", "--side", "32", "--format", "ppm")
    assert faults_of(store, workers) == []


def test_a_shard_without_a_good_input_is_not_a_fault(tmp_path: Path, build: Build, workers: WorkerPool) -> None:
    """A shard without good inputs has no records, so the manifest does not list this shard."""
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


def test_the_command_names_each_fault_on_a_line(copy_store: MakeStore) -> None:
    """Shard 0 has a record that is too long, shard 1 is truncated, shard 2 has a bad record, and shard 3 is missing."""
    store = copy_store(300)
    lengthen_first_record(store)
    file = store / "train" / "00001" / "data.mdb"
    file.write_bytes(file.read_bytes()[:-PAGE_BYTES])
    records = read_records(store / "train" / "00002")
    replace_records(store / "train" / "00002", [(key, value[:-1] + b"\0") for key, value in records[:1]] + records[1:])
    shutil.rmtree(store / "train" / "00003")
    program = [sys.executable, "-c", "from prep.cli import main; main()", "verify", "--store", str(store)]
    plain = subprocess.run([*program, "--jobs", "2"], capture_output=True, text=True, timeout=60)
    assert plain.returncode == 1
    lines = plain.stdout.splitlines()
    assert len(lines) == 4
    for number, (line, what) in enumerate(
        zip(lines, ("a record of 200,000,000 bytes", "bytes, expected", "checksum", ""), strict=True)
    ):
        assert line.startswith(f"train/{number:05d}") and what in line
    assert records[0][0].decode() in lines[2] and Datum.decode(records[0][1]).source.decode() in lines[2]
    assert plain.stderr == f"Error: {plain.stderr[7:-1]}\n" and f"{store}: 4 faults" in plain.stderr

    result = alexprep("verify", "--store", store, "--jobs", "2", "--json")
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    assert answer["ok"] is False and answer["records"] == 300
    assert [set(fault) for fault in answer["faults"]] == [{"where", "key", "source", "what"}] * 4
    assert [fault["where"] for fault in answer["faults"]] == [f"train/{number:05d}" for number in range(4)]


def test_a_missing_store_or_split_is_a_one_line_error(copy_store: MakeStore, tmp_path: Path) -> None:
    for words, message in (
        (("--store", tmp_path / "nowhere"), "no such store"),
        (("--store", copy_store(64), "--split", "val"), "has no split val"),
    ):
        result = alexprep("verify", *words)
        assert result.exit_code == 1 and result.stdout == ""
        assert message in result.stderr and result.stderr.count("\n") == 1
