"""prep.check.inspect and `alexprep inspect`: descriptions and records, compared with the store's own files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from click.testing import CliRunner, Result

from prep.check.inspect import describe_store
from prep.cli import main
from prep.console import bytes_text
from prep.store.datum import Datum
from prep.store.manifest import Store
from tests.conftest import CLASSES, Build
from tests.helpers.damaged_stores import describe_shards, split_records, store_with_records

RecordsOf = Callable[[Path, str], list[tuple[bytes, Any]]]


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def fails(result: Result, *parts: str, code: int = 1) -> None:
    """Assert that the command has exit code `code` and prints one line with all `parts` to standard error."""
    assert result.exit_code == code and isinstance(result.exception, SystemExit), result.output
    assert result.stdout == "" and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def test_a_store_is_described_in_json(stores: dict[str, Path], records_of: RecordsOf) -> None:
    for kind, store in stores.items():
        answer = json.loads(alexprep("inspect", "--store", store, "--json").stdout)
        written = json.loads((store / "manifest.json").read_bytes())
        assert answer["store"] == str(store)
        for name in ("fingerprint", "settings", "tools", "classes"):
            assert answer[name] == written[name]
        assert list(answer["splits"]) == ["train", "val"]
        for name, split in answer["splits"].items():
            records = records_of(store, name)
            assert split["records"] == split["kept"] == split["inputs"] == len(records)
            sizes = [len(value) for _, value in split_records(store, name)]
            assert split["bytes"] == sum(sizes)
            assert split["bytes_per_record"] == pytest.approx(sum(sizes) / len(sizes), abs=0.06)
            assert split["pixels"] == sum(datum.height * datum.width for _, datum in records)
            assert split["shards"] == len(list((store / name).glob("[0-9]*")))
            assert split["fingerprint"] == written["splits"][name]["fingerprint"]
            labels = [datum.label for _, datum in records]
            assert split["records_of_class"] == {CLASSES[k]: labels.count(k) for k in range(3)}
            assert split["converted"] == {"grey": 1, "cmyk": 1, "png": 1}, kind
            assert split["exif_orientation"] == ({"6": 1} if name == "train" else {})
            assert split["bad"] == {}
        assert answer == json.loads(json.dumps(describe_store(Store.open(store))))


def test_a_store_is_described_in_text(stores: dict[str, Path]) -> None:
    said = alexprep("inspect", "--store", stores["jpeg"]).stdout
    written = json.loads((stores["jpeg"] / "manifest.json").read_bytes())
    train = written["splits"]["train"]
    for part in (
        f"{stores['jpeg']}: jpeg, quality 90, central squares, shorter side 256 px, filter area",
        f"fingerprint {written['fingerprint']}, order seed 0",
        f"pillow {written['tools']['pillow']}",
        f"train: 30 records, {bytes_text(train['bytes'])} in 1 shard, {bytes_text(train['bytes'] / 30)} per record",
        f"3 of 3 classes have records, {min(train['label_counts'])} to {max(train['label_counts'])} each",
        "30 inputs: 30 kept, 0 left out",
        "converted: 1 cmyk, 1 grey, 1 png",
        "EXIF orientation: 1 6",
        "val: 12 records",
    ):
        assert part in said, said
    assert "ppm, whole images" in alexprep("inspect", "--store", stores["ppm-whole"]).stdout


def test_inputs_that_were_left_out_are_described(photo_folder: Path, tmp_path: Path, build: Build) -> None:
    photos = Path(shutil.copytree(photo_folder / "train", tmp_path / "photos"))
    (photos / CLASSES[0] / "empty.JPEG").touch()
    store = build(photos, "--side", "32", "--on-bad", "skip")
    said = alexprep("inspect", "--store", store).stdout
    assert "31 inputs: 30 kept, 1 left out" in said and "left out: 1 empty file" in said
    assert str(store / "train" / "inputs.jsonl") in said
    split = json.loads(alexprep("inspect", "--store", store, "--json").stdout)["splits"]["train"]
    assert (split["inputs"], split["kept"], split["bad"]) == (31, 30, {"empty file": 1})


def test_every_record_is_found_by_its_key(stores: dict[str, Path], records_of: RecordsOf, tmp_path: Path) -> None:
    """The test gives keys with and without leading zeros. --out writes the bytes of the image without a change."""
    for kind, split in (("jpeg", "train"), ("ppm-whole", "val")):
        for number, words in ((0, "0"), (11, "0011"), (11, "00000011")):
            key, datum = records_of(stores[kind], split)[number]
            out = tmp_path / "picture"
            result = alexprep(
                "inspect", "--store", stores[kind], "--split", split, "--key", words, "--out", out, "--json"
            )
            assert json.loads(result.stdout) == {
                "shard": str(stores[kind] / split / "00000"),
                "key": key.decode(),
                "source": datum.source.decode(),
                "label": datum.label,
                "class": CLASSES[datum.label],
                "width_px": datum.width,
                "height_px": datum.height,
                "bytes": len(datum.data),
                "out": str(out),
            }
            assert out.read_bytes() == datum.data
    result = alexprep("inspect", "--store", stores["jpeg"], "--key", "3")
    key, datum = records_of(stores["jpeg"], "train")[3]
    said = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert said["key"] == "00000003" and said["source"] == datum.source.decode() and "out" not in said


def test_a_key_of_a_later_shard_is_found(stores: dict[str, Path], tmp_path: Path) -> None:
    records = split_records(stores["jpeg"])
    store = store_with_records(stores["jpeg"], tmp_path / "store", records[:10])
    with lmdb.open(str(store / "train" / "00001"), map_size=1 << 26, lock=False) as env:
        with env.begin(write=True) as txn:
            for key, value in records[10:]:
                txn.put(key, value)
    describe_shards(store, [records[:10], records[10:]])
    answer = json.loads(alexprep("inspect", "--store", store, "--key", "20", "--json").stdout)
    assert answer["shard"] == str(store / "train" / "00001")
    assert answer["source"] == Datum.decode(records[20][1]).source.decode()


def test_a_key_that_no_record_has_is_a_one_line_error(stores: dict[str, Path], tmp_path: Path) -> None:
    store = stores["jpeg"]
    for key in ("000000001", "x", "-1", "1" * 600, "é", "\udcff"):
        fails(alexprep("inspect", "--store", store, "--key", key, "--out", tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    empty = alexprep("inspect", "--store", store, "--key", "")
    assert empty.exit_code == 2 and "--key: the value is empty" in empty.stderr
    fails(alexprep("inspect", "--store", store, "--key", "30"), "no key 00000030 in train (30 records)")
    fails(alexprep("inspect", "--store", store, "--split", "val", "--key", "12"), "in val (12 records)")
    fails(alexprep("inspect", "--store", store, "--out", tmp_path / "out"), "--out", "--key", code=2)
    missing = tmp_path / "no" / "out"
    fails(alexprep("inspect", "--store", store, "--key", "1", "--out", missing), "--out", "there is no folder", code=2)
    fails(alexprep("inspect", "--store", tmp_path / "nowhere", "--key", "1"), "no such store")


def test_a_damaged_record_is_an_error(stores: dict[str, Path], tmp_path: Path) -> None:
    records = split_records(stores["jpeg"])
    key, value = records[4]
    records[4] = key, value[:99] + bytes([value[99] ^ 1]) + value[100:]
    store = store_with_records(stores["jpeg"], tmp_path / "store", records)
    fails(
        alexprep("inspect", "--store", store, "--key", "4", "--out", tmp_path / "out"),
        "key 00000004: checksum",
        "alexprep verify",
    )
    assert not (tmp_path / "out").exists()
    assert alexprep("inspect", "--store", store, "--key", "5").exit_code == 0
    file = store / "train" / "00000" / "data.mdb"
    with open(file, "r+b") as handle:
        handle.write(bytes(16384))
    fails(alexprep("inspect", "--store", store, "--key", "5"), str(store / "train" / "00000"), "alexprep verify")
