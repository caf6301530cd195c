"""Streams from a damaged store: each stream ends with an error that names the damaged record or shard."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest

from pipeline.loader import EvalLoader, TrainLoader, eval_loader, train_loader
from pipeline.sampling import epoch_permutation
from prep.store.datum import Datum
from prep.store.manifest import Store, StoreError
from tests.conftest import TRAIN_RECORDS, VAL_RECORDS


@pytest.fixture
def broken(numbered_store: Path, tmp_path: Path) -> Path:
    """A copy of the store `numbered_store`, which a test may damage."""
    return Path(shutil.copytree(numbered_store, tmp_path / "store"))


def change(store: Path, split: str, position: int, edit: Callable[[bytes], bytes]) -> tuple[str, str]:
    """Replace the value of record `position` by edit(value). Returns the record's key and source."""
    folder = Store.open(store).shard_paths(split)[0]
    with lmdb.open(folder, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        key, value = list(txn.cursor())[position]
        txn.put(key, edit(value))
    return key.decode(), Datum.decode(value).source.decode()


def flip_a_bit_of_the_jpeg(value: bytes) -> bytes:
    at = value.index(b"\xff\xd8\xff") + 1
    return value[:at] + bytes([value[at] ^ 4]) + value[at + 1 :]


def give_another_label(value: bytes) -> bytes:
    return replace(Datum.decode(value), label=TRAIN_RECORDS).encode()


def cut_off(value: bytes) -> bytes:
    return value[:300]


DAMAGE = {"flipped bit": flip_a_bit_of_the_jpeg, "label": give_another_label, "cut off": cut_off}


def stopped_with(loader: TrainLoader | EvalLoader) -> tuple[str, int]:
    """Iterate until a StoreError is raised. Return its message, and the number of images that were served before."""
    served = 0
    try:
        for batch in loader:
            served += len(batch.labels)
    except StoreError as error:
        return str(error), served
    pytest.fail("the pass was not stopped")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("position", [0, 5, VAL_RECORDS - 1])
@pytest.mark.parametrize("views", [1, 10])
def test_a_damaged_record_stops_an_evaluation_and_its_location_is_given(
    broken: Path, damage: str, position: int, views: int
) -> None:
    key, source = change(broken, "val", position, DAMAGE[damage])
    with eval_loader(broken, 2, views=views) as loader:
        message, served = stopped_with(loader)
    assert served <= position
    assert f"{broken}/val/00000, key {key}" in message and f"alexprep verify --store {broken}" in message
    assert "\n" not in message and "Critical error" not in message
    assert damage == "cut off" or f"source {source}:" in message


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_stops_training_and_its_location_is_given(broken: Path, damage: str) -> None:
    position = int(epoch_permutation(TRAIN_RECORDS, 0, 0)[17])
    key, _ = change(broken, "train", position, DAMAGE[damage])
    with train_loader(broken, 4) as loader:
        message, _ = stopped_with(loader)
        assert message.startswith(f"{broken}/train/00000, key {key}") and "alexprep verify" in message
        assert (loader.epoch, loader.step) <= (0, 4)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("train", "flipped bit"),
        ("train", "label"),
        ("train", "cut off"),
        ("val", "flipped bit"),
        ("val", "label"),
        ("val", "cut off"),
    ],
)
def test_a_stream_does_not_skip_a_damaged_record_when_it_is_iterated_again(
    broken: Path, damage: str, kind: str
) -> None:
    position = int(epoch_permutation(TRAIN_RECORDS, 0, 0)[17])
    change(broken, kind, 17 if kind == "val" else position, DAMAGE[damage])
    with train_loader(broken, 4) if kind == "train" else eval_loader(broken, 4) as loader:
        for _ in range(3):
            stopped_with(loader)


def test_a_loader_closes_safely_when_an_error_leaves_its_with_block(broken: Path) -> None:
    """A subprocess opens and closes a loader 20 times.

    If the loader unmapped files while DALI still reads them, the subprocess would crash.
    """
    change(broken, "val", 0, flip_a_bit_of_the_jpeg)
    script = (
        "import sys\n"
        "from pipeline.loader import eval_loader\n"
        "from prep.store.manifest import StoreError\n"
        "for views in 10 * (1, 10):\n"
        "    try:\n"
        "        with eval_loader(sys.argv[1], 8, views=views, threads=1) as loader:\n"
        "            list(loader)\n"
        "    except StoreError as error:\n"
        "        print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(broken)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("key 00000000") == 20


def test_a_jpeg_that_cannot_be_decoded_stops_the_stream_even_with_a_correct_checksum(broken: Path) -> None:
    """The second half of the JPEG file is zeros. The headers of the file are intact."""
    halved = lambda data: data[: len(data) // 2] + bytes(len(data) // 2)  # noqa: E731
    change(broken, "val", 3, lambda value: replace(Datum.decode(value), data=halved(Datum.decode(value).data)).encode())
    with eval_loader(broken, 4) as loader:
        message, _ = stopped_with(loader)
    assert f"{broken}/val/00000, key 00000003, source " in message and "cannot be decoded" in message
    assert f"alexprep verify --store {broken}" in message
    assert "\n" not in message and "Critical error" not in message


@pytest.mark.parametrize("kind", ["ppm", "ppm-whole"])
def test_too_few_pixels_in_a_raw_record_are_reported(stores: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The checksum of the record is correct."""
    store = Path(shutil.copytree(stores[kind], tmp_path / "store"))
    key, source = change(store, "val", 4, lambda v: replace(Datum.decode(v), data=Datum.decode(v).data[:-3]).encode())
    with eval_loader(store, 2) as loader, pytest.raises(StoreError) as stopped:
        list(loader)
    assert f"key {key}, source {source}:" in str(stopped.value) and "bytes of pixels" in str(stopped.value)


def test_a_truncated_shard_is_reported_without_a_crash(broken: Path) -> None:
    """The stream runs in a subprocess, because reading past the end of a mapped file would kill the process."""
    file = broken / "val" / "00000" / "data.mdb"
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    script = "import sys\nfrom pipeline.loader import eval_loader\nlist(eval_loader(sys.argv[1], 4))\n"
    process = subprocess.run(
        [sys.executable, "-c", script, str(broken)], capture_output=True, text=True, check=False, timeout=120
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"prep.store.manifest.StoreError: {broken}/val/00000")
    assert f"alexprep verify --store {broken}" in process.stderr


@pytest.mark.parametrize("change_to", ["fewer", "more"])
def test_a_shard_with_a_wrong_number_of_records_is_reported(broken: Path, change_to: str) -> None:
    folder = Store.open(broken).shard_paths("val")[0]
    with lmdb.open(folder, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        txn.delete(b"00000004") if change_to == "fewer" else txn.put(b"00000099", txn.get(b"00000004"))
    with eval_loader(broken, 4) as loader, pytest.raises(StoreError, match=r"2[24] records, the manifest says 23"):
        list(loader)


def test_a_missing_shard_is_reported(broken: Path) -> None:
    shutil.rmtree(broken / "val" / "00000")
    with pytest.raises(StoreError, match="val/00000"), eval_loader(broken, 4) as loader:
        list(loader)
