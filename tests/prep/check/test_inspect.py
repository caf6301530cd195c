"""prep.check.inspect: inspect against the store's own files, export-files against the records as lmdb and protobuf read them.

Stores with names that would lead out of a folder are made by changing records and manifest, then sealing them again:
alexprep itself cannot make them from files.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.check import inspect
from prep.check.inspect import describe_store, file_name
from prep.cli import main
from prep.console import DiskFull, UserError, bytes_text
from prep.store.datum import Datum
from prep.store.manifest import Store
from prep.workers import TaskProgress
from tests.conftest import CLASSES, Build

RecordsOf = Callable[[Path, str], list[tuple[bytes, Any]]]


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def fails(result: Result, *parts: str) -> None:
    """Exit code 1 and one line on standard error that has all `parts`."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.stdout == "" and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def crafted(store: Path, to: Path, records: list[tuple[bytes, bytes]], classes: list[str] | None = None) -> Path:
    """A copy of `store` whose only training shard holds `records`, and whose classes are `classes`."""
    shutil.copytree(store, to)
    shutil.rmtree(to / "train" / "00000")
    with lmdb.open(str(to / "train" / "00000"), map_size=1 << 26, lock=False) as env, env.begin(write=True) as txn:
        for key, value in records:
            txn.put(key, value)
    manifest = json.loads((to / "manifest.json").read_bytes())
    (shard,) = manifest["splits"]["train"]["shards"]
    shard |= {"records": len(records), "bytes": sum(len(value) for _, value in records)}
    manifest["splits"]["train"]["records"] = len(records)
    if classes is not None:
        manifest["classes"] = classes
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def raw_records(store: Path, split: str = "train") -> list[tuple[bytes, bytes]]:
    records = []
    for folder in sorted((store / split).glob("[0-9]*")):
        with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as txn:
            records += [(bytes(key), bytes(value)) for key, value in txn.cursor()]
    return records


class Other:
    """The module os for prep.check.inspect alone, with some of its functions exchanged."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self.__dict__ |= functions

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


# inspect


def test_a_store_described_in_json(stores: dict[str, Path], records_of: RecordsOf) -> None:
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
            sizes = [len(value) for _, value in raw_records(store, name)]
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


def test_a_store_described_for_a_person(stores: dict[str, Path]) -> None:
    said = alexprep("inspect", "--store", stores["jpeg"]).stdout
    written = json.loads((stores["jpeg"] / "manifest.json").read_bytes())
    train = written["splits"]["train"]
    for part in (
        f"{stores['jpeg']}: jpeg, quality 90, central squares, shorter side 256 px, filter area",
        f"fingerprint {written['fingerprint']}, order seed 0",
        f"pillow {written['tools']['pillow']}",
        f"train: 30 records, {bytes_text(train['bytes'])} in 1 shard, {bytes_text(train['bytes'] / 30)} each",
        f"3 of 3 classes have records, {min(train['label_counts'])} to {max(train['label_counts'])} each",
        "30 inputs: 30 kept, 0 left out",
        "converted: 1 cmyk, 1 grey, 1 png",
        "EXIF orientation: 1 6",
        "val: 12 records",
    ):
        assert part in said, said
    assert "ppm, whole images" in alexprep("inspect", "--store", stores["ppm-whole"]).stdout


def test_inputs_left_out_are_described(photo_folder: Path, tmp_path: Path, build: Build) -> None:
    photos = Path(shutil.copytree(photo_folder / "train", tmp_path / "photos"))
    (photos / CLASSES[0] / "empty.JPEG").touch()
    store = build(photos, "--side", "32", "--on-bad", "skip")
    said = alexprep("inspect", "--store", store).stdout
    assert "31 inputs: 30 kept, 1 left out" in said and "left out: 1 empty file" in said
    assert str(store / "train" / "inputs.jsonl") in said
    split = json.loads(alexprep("inspect", "--store", store, "--json").stdout)["splits"]["train"]
    assert (split["inputs"], split["kept"], split["bad"]) == (31, 30, {"empty file": 1})


def test_every_record_is_found_by_its_key(stores: dict[str, Path], records_of: RecordsOf, tmp_path: Path) -> None:
    """With leading zeros or without; --out writes the payload to the byte."""
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


def test_a_key_in_a_later_shard(stores: dict[str, Path], tmp_path: Path) -> None:
    records = raw_records(stores["jpeg"])
    store = crafted(stores["jpeg"], tmp_path / "store", records[:10])
    with lmdb.open(str(store / "train" / "00001"), map_size=1 << 26, lock=False) as env:
        with env.begin(write=True) as txn:
            for key, value in records[10:]:
                txn.put(key, value)
    manifest = json.loads((store / "manifest.json").read_bytes())
    shards = manifest["splits"]["train"]["shards"]
    shards.append({**shards[0], "path": "train/00001"})
    (store / "manifest.json").write_text(json.dumps(manifest))
    answer = json.loads(alexprep("inspect", "--store", store, "--key", "20", "--json").stdout)
    assert answer["shard"] == str(store / "train" / "00001")
    assert answer["source"] == Datum.decode(records[20][1]).source.decode()


def test_keys_that_no_record_has(stores: dict[str, Path], tmp_path: Path) -> None:
    store = stores["jpeg"]
    for key in ("000000001", "x", "-1", "1" * 600, "é", "\udcff", ""):
        fails(alexprep("inspect", "--store", store, "--key", key, "--out", tmp_path / "out"))
        assert not (tmp_path / "out").exists()
    fails(alexprep("inspect", "--store", store, "--key", "30"), "no key 00000030 in train (30 records)")
    fails(alexprep("inspect", "--store", store, "--split", "val", "--key", "12"), "in val (12 records)")
    fails(alexprep("inspect", "--store", store, "--out", tmp_path / "out"), "--out", "--key")
    fails(
        alexprep("inspect", "--store", store, "--key", "1", "--out", tmp_path / "no" / "out"), "--out", "No such file"
    )
    fails(alexprep("inspect", "--store", tmp_path / "nowhere", "--key", "1"), "no such store")


def test_damaged_records_are_not_shown(stores: dict[str, Path], tmp_path: Path) -> None:
    records = raw_records(stores["jpeg"])
    key, value = records[4]
    records[4] = key, value[:99] + bytes([value[99] ^ 1]) + value[100:]
    store = crafted(stores["jpeg"], tmp_path / "store", records)
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


# export-files


@pytest.mark.parametrize("kind", ["jpeg", "ppm-whole"])
def test_every_record_is_exported_to_the_byte(
    kind: str, stores: dict[str, Path], records_of: RecordsOf, tmp_path: Path
) -> None:
    """Under its photograph's own name, where that ends as its content demands."""
    ending = {"jpeg": ".jpg", "ppm-whole": ".ppm"}[kind]
    for split in ("train", "val"):
        out = tmp_path / "deep" / split
        result = alexprep("export-files", out, "--store", stores[kind], "--split", split, "--jobs", "2", "--json")
        assert result.exit_code == 0, result.output
        expected = {}
        for _, datum in records_of(stores[kind], split):
            name = os.path.basename(datum.source.decode())
            assert name.endswith(".JPEG")
            expected[f"{CLASSES[datum.label]}/{name}{'' if kind == 'jpeg' else ending}"] = datum.data
        assert files_in(out) == expected
        answer = json.loads(result.stdout)
        assert answer["split"] == split and answer["files"] == len(expected)
        assert answer["bytes"] == sum(map(len, expected.values()))
    again = alexprep("export-files", tmp_path / "deep" / "val", "--store", stores[kind], "--split", "val")
    assert again.exit_code == 0 and "12 files" in again.stdout
    assert files_in(tmp_path / "deep" / "val") == expected


@pytest.mark.parametrize(
    ("source", "format", "name"),
    [
        (b"n1/a.JPEG", "jpeg", b"a.JPEG"),
        (b"n1/a.jpg", "jpeg", b"a.jpg"),
        (b"n1/a.png", "jpeg", b"a.png.jpg"),
        (b"n1/a", "jpeg", b"a.jpg"),
        (b"n1/a.JPEG", "ppm", b"a.JPEG.ppm"),
        (b"n1/a.PPM", "ppm", b"a.PPM"),
        (b"a.ppm", "ppm", b"a.ppm"),
        (b"n1/\xff\xfe.jpg", "jpeg", b"\xff\xfe.jpg"),
        (b"n1/a.j\xfc\xe9g", "jpeg", b"a.j\xfc\xe9g.jpg"),
        (b"n1/.jpg", "jpeg", b".jpg.jpg"),
        (b"", "jpeg", b".jpg"),
        (b"n1/", "jpeg", b".jpg"),
        (b"../..", "jpeg", b"...jpg"),
        (b"n1/..", "ppm", b"...ppm"),
        (b"../../etc/passwd", "jpeg", b"passwd.jpg"),
        (b"/etc/x.jpg", "jpeg", b"x.jpg"),
        (b"n1/a\0b.jpg", "jpeg", b"00000007.jpg"),
        (b"n1/" + b"a" * 251 + b".jpg", "jpeg", b"a" * 251 + b".jpg"),
        (b"n1/" + b"a" * 252 + b".jpg", "jpeg", b"00000007.jpg"),
        (b"n1/" + b"a" * 252, "ppm", b"00000007.ppm"),
    ],
)
def test_file_names(source: bytes, format: str, name: bytes) -> None:
    assert file_name(source, b"00000007", format) == name


def test_hostile_names_stay_inside(stores: dict[str, Path], tmp_path: Path) -> None:
    """Classes and sources that lead out of the folder, or are no names: every record is still there, once."""
    sources = [b"n/..", b"../../../evil.jpg", b"/etc/evil.jpg", b"n/a\0b.jpg", b"n/" + b"x" * 300, b"n/.", b"", b"a\nb"]
    classes = ["..", "/etc", "a/b", "x" * 256, "n\0n", ".", "", "good"]
    plain = [(key, Datum.decode(value)) for key, value in raw_records(stores["jpeg"])[: len(sources)]]
    records = [
        (key, replace(datum, source=source, label=label).encode())
        for label, ((key, datum), source) in enumerate(zip(plain, sources, strict=True))
    ]
    datum = plain[0][1]
    records.append((b"00000099", replace(datum, label=99).encode()))  # beyond the classes
    store = crafted(stores["jpeg"], tmp_path / "store", records, classes)
    out = tmp_path / "a" / "b" / "out"
    before = files_in(tmp_path)
    result = alexprep("export-files", out, "--store", store, "--jobs", "1")
    assert result.exit_code == 0, result.output
    written = files_in(out)
    assert set(files_in(tmp_path)) == set(before) | {f"a/b/out/{name}" for name in written}
    assert {name.split("/")[0] for name in written} == {*(f"class_{k:04d}" for k in (*range(7), 99)), "good"}
    assert all(name.count("/") == 1 for name in written)
    assert sorted(written.values()) == sorted([*(datum.data for _, datum in plain), datum.data])


def test_two_records_of_one_name_are_told(stores: dict[str, Path], tmp_path: Path) -> None:
    """As import-caffe makes them of folders x/ and y/ with one label: the second must not replace the first."""
    twins = [
        (key, replace(Datum.decode(value), source=b"x/same.jpg" if k else b"y/same.jpg", label=1).encode())
        for k, (key, value) in enumerate(raw_records(stores["jpeg"])[:2])
    ]
    store = crafted(stores["jpeg"], tmp_path / "store", twins)
    result = alexprep("export-files", tmp_path / "out", "--store", store, "--jobs", "1")
    fails(result, str(tmp_path / "out" / CLASSES[1] / "same.jpg"), "other content")
    assert list(files_in(tmp_path / "out").values()) == [Datum.decode(twins[0][1]).data]


def test_a_file_that_appears_at_the_last_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers may come to one name at once, and each have seen that nothing is there."""
    path = tmp_path / "a.jpg"

    def meanwhile() -> int:
        path.write_bytes(b"another's")
        return 1

    monkeypatch.setattr(inspect, "os", Other(getpid=meanwhile))
    with pytest.raises(UserError, match="other content"):
        inspect._write_new_file(os.fsencode(path), b"mine")
    assert files_in(tmp_path) == {"a.jpg": b"another's"}
    inspect._write_new_file(os.fsencode(path), b"another's")


def test_files_of_other_content_are_not_overwritten(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert alexprep("export-files", out, "--store", store, "--split", "val", "--jobs", "1").exit_code == 0
    path = sorted(out.rglob("*.JPEG"))[5]
    path.write_bytes(b"mine")
    fails(alexprep("export-files", out, "--store", store, "--split", "val", "--jobs", "1"), str(path), "other content")
    assert path.read_bytes() == b"mine"
    path.unlink()
    path.mkdir()
    fails(alexprep("export-files", out, "--store", store, "--split", "val", "--jobs", "1"), "same command again")


def test_an_export_that_was_killed_goes_on(photo_folder: Path, tmp_path: Path, build: Build) -> None:
    """SIGKILL once some files are there; afterwards no file is half written, and the second call adds the rest."""
    photos = tmp_path / "photos"
    for number in range(300):
        path = photos / CLASSES[number % 3] / f"p{number}.ppm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P6 32 32 255\n" + np.random.default_rng(number).bytes(3072))
    store = build(photos, "--side", "32", "--format", "ppm")
    out = tmp_path / "out"
    program = [sys.executable, "-c", "from prep.cli import main; main()", "export-files", str(out)]
    running = subprocess.Popen([*program, "--store", str(store), "--jobs", "1"], stdout=-1, stderr=-1)
    while running.poll() is None and (not out.exists() or sum(1 for _ in out.rglob("*.ppm")) < 20):
        pass
    running.kill()
    running.communicate()
    whole = {Datum.decode(value).data for _, value in raw_records(store)}
    there = {path: path.stat().st_mtime_ns for path in out.rglob("*.ppm")}
    assert there and all(path.read_bytes() in whole for path in there)
    again = subprocess.run([*program, "--store", str(store), "--jobs", "2"], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert {path.read_bytes() for path in out.rglob("*.ppm")} == whole and len(whole) == 300
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in there.items())


def test_exported_ppm_is_the_pixels_and_builds_the_same_store(
    photo_folder: Path, tmp_path: Path, build: Build, records_of: RecordsOf
) -> None:
    """Pillow reads the pixels of the record; a store of the exported files at the same side has the same payloads."""
    store = build(photo_folder, "--format", "ppm", "--side", "48", "--keep-aspect", "--split", "train")
    out = tmp_path / "out"
    assert alexprep("export-files", out, "--store", store, "--jobs", "1").exit_code == 0
    records = {datum.source.decode(): datum for _, datum in records_of(store, "train")}
    for source, datum in records.items():
        with Image.open(out / f"{source}.ppm") as image:
            assert image.size == (datum.width, datum.height)
            assert np.asarray(image).tobytes() == datum.data[3 * datum.width :]
    again = build(out, "--format", "ppm", "--side", "48", "--keep-aspect")
    rebuilt = {datum.source.decode(): datum for _, datum in records_of(again, "train")}
    assert {f"{source}.ppm" for source in records} == set(rebuilt)
    for source, datum in records.items():
        assert rebuilt[f"{source}.ppm"].data == datum.data and rebuilt[f"{source}.ppm"].label == datum.label
    moments = [
        json.loads((path / "manifest.json").read_bytes())["splits"]["train"]["moments"] for path in (store, again)
    ]
    assert moments[0] == moments[1]


def test_export_of_a_damaged_store_names_the_record(stores: dict[str, Path], tmp_path: Path) -> None:
    records = raw_records(stores["jpeg"])
    key, value = records[4]
    records[4] = key, value[:99] + bytes([value[99] ^ 1]) + value[100:]
    store = crafted(stores["jpeg"], tmp_path / "store", records)
    result = alexprep("export-files", tmp_path / "out", "--store", store, "--jobs", "1")
    fails(result, "00000, key 00000004: checksum", "alexprep verify")
    written = files_in(tmp_path / "out")
    assert len(written) == 4 and Datum.decode(records[3][1]).data in written.values()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, UserError)]
)
def test_a_full_disk_has_its_own_exit_code(
    number: int, kind: type[UserError], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As --help says: 3 where the disk is full. What is half written does not stay."""

    def full(*paths: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(inspect, "os", Other(replace=full, link=full))
    opened = Store.open(store)
    task = inspect._ExportTask(str(store / "val" / "00000"), tmp_path / "out", opened.classes, "jpeg")
    with pytest.raises(UserError, match=os.strerror(number)) as caught:
        inspect._export_shard(task, TaskProgress())
    assert caught.type is kind
    assert files_in(tmp_path / "out") == {}
