"""prep.check.export and `alexprep export-files`: files are compared with the records that lmdb and protobuf read.

Some tests need names that lead out of a folder. alexprep builds no store with such names, so the tests write the names
into the records and the manifest.
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

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.check import export
from prep.check.export import file_name
from prep.cli import main
from prep.console import DiskFull, UserError
from prep.store.datum import Datum
from prep.store.manifest import Store
from prep.workers import TaskProgress
from tests.conftest import CLASSES, Build
from tests.helpers.damaged_stores import split_records, store_with_records

RecordsOf = Callable[[Path, str], list[tuple[bytes, Any]]]


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def fails(result: Result, *parts: str) -> None:
    """Assert that the command has exit code 1 and prints one line with all `parts` to standard error."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.stdout == "" and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder, without the marker file of an export."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != export.MARKER]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class OtherOs:
    """A replacement for the module os in prep.check.export. `functions` override functions of os."""

    def __init__(self, **functions: Callable[..., Any]) -> None:
        self.__dict__ |= functions

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.mark.parametrize("kind", ["jpeg", "ppm-whole"])
def test_every_record_is_exported_byte_for_byte(
    kind: str, stores: dict[str, Path], records_of: RecordsOf, tmp_path: Path
) -> None:
    """An exported file has the name of the record's input, with an extension that fits the content."""
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
def test_exported_files_have_safe_names(source: bytes, format: str, name: bytes) -> None:
    assert file_name(source, b"00000007", format) == name


def test_names_that_lead_out_of_the_folder_stay_inside(stores: dict[str, Path], tmp_path: Path) -> None:
    """Some names lead out of the folder, or cannot be file names. Each record is written once, inside the folder."""
    sources = [b"n/..", b"../../../evil.jpg", b"/etc/evil.jpg", b"n/a\0b.jpg", b"n/" + b"x" * 300, b"n/.", b"", b"a\nb"]
    classes = ["..", "/etc/../..", "a/b", "x" * 256, "n\0n", ".", "a//b", "good"]
    plain = [(key, Datum.decode(value)) for key, value in split_records(stores["jpeg"])[: len(sources)]]
    records = [
        (key, replace(datum, source=source, label=label).encode())
        for label, ((key, datum), source) in enumerate(zip(plain, sources, strict=True))
    ]
    store = store_with_records(stores["jpeg"], tmp_path / "store", records, classes)
    out = tmp_path / "a" / "b" / "out"
    before = files_in(tmp_path)
    result = alexprep("export-files", out, "--store", store, "--jobs", "1")
    assert result.exit_code == 0, result.output
    written = files_in(out)
    assert set(files_in(tmp_path)) == set(before) | {f"a/b/out/{name}" for name in written}
    assert {name.split("/")[0] for name in written} == {
        *(f"class_{k:04d}" for k in (0, 1, 3, 4, 5, 6)),
        *("a", "good"),
    }
    assert all(name.count("/") == (2 if name.startswith("a/b/") else 1) for name in written)
    assert sorted(written.values()) == sorted(datum.data for _, datum in plain)


def test_two_records_with_the_same_name_are_an_error(stores: dict[str, Path], tmp_path: Path) -> None:
    """x/same.jpg and y/same.jpg have the same label, as import-caffe may store them. No file may be replaced."""
    twins = [
        (key, replace(Datum.decode(value), source=b"x/same.jpg" if k else b"y/same.jpg", label=1).encode())
        for k, (key, value) in enumerate(split_records(stores["jpeg"])[:2])
    ]
    store = store_with_records(stores["jpeg"], tmp_path / "store", twins)
    result = alexprep("export-files", tmp_path / "out", "--store", store, "--jobs", "1")
    fails(result, str(tmp_path / "out" / CLASSES[1] / "same.jpg"), "other content")
    assert list(files_in(tmp_path / "out").values()) == [Datum.decode(twins[0][1]).data]


def test_a_file_that_another_worker_writes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers may both see that a file does not exist, and then both begin to write it."""
    path = tmp_path / "a.jpg"

    def meanwhile() -> int:
        path.write_bytes(b"another's")
        return 1

    monkeypatch.setattr(export, "os", OtherOs(getpid=meanwhile))
    with pytest.raises(UserError, match="other content"):
        export._write_new_file(os.fsencode(path), b"mine")
    assert files_in(tmp_path) == {"a.jpg": b"another's"}
    export._write_new_file(os.fsencode(path), b"another's")


def test_files_with_other_content_are_not_overwritten(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert alexprep("export-files", out, "--store", store, "--split", "val", "--jobs", "1").exit_code == 0
    path = sorted(out.rglob("*.JPEG"))[5]
    path.write_bytes(b"mine")
    fails(alexprep("export-files", out, "--store", store, "--split", "val", "--jobs", "1"), str(path), "other content")
    assert path.read_bytes() == b"mine"
    path.unlink()
    path.mkdir()
    fails(alexprep("export-files", out, "--store", store, "--split", "val", "--jobs", "1"), "same command again")


def test_a_folder_with_other_files_is_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    """Only two kinds of folders are allowed: an empty folder, and a folder with an export of the same split.

    The export in the folder may be unfinished.
    """
    out, store = tmp_path / "out", stores["jpeg"]

    def run(split: str, kind: str = "jpeg") -> Result:
        return alexprep("export-files", out, "--store", stores[kind], "--split", split, "--jobs", "1")

    for other in (out / CLASSES[0] / "a.jpg", out / ".git" / "config", out / "notes.txt"):
        other.parent.mkdir(parents=True)
        other.write_text("mine")
        before = files_in(tmp_path)
        result = run("val")
        assert result.exit_code == 2 and f"{out}: the folder has other files (first: " in result.stderr
        assert files_in(tmp_path) == before and not (out / export.MARKER).exists()
        shutil.rmtree(out)
    out.mkdir()
    assert run("val").exit_code == 0 and len(files_in(out)) == Store.open(store).split("val").records
    next(out.rglob("*.JPEG")).unlink()
    assert run("val").exit_code == 0 and len(files_in(out)) == Store.open(store).split("val").records
    for words in (("train",), ("val", "ppm-whole")):
        result = run(*words)
        assert result.exit_code == 2 and "an export of another split or store" in result.stderr
    assert len(files_in(out)) == Store.open(store).split("val").records
    (out / export.MARKER).write_text("damaged")
    assert run("val").exit_code == 2


def test_a_killed_export_is_resumed(photo_folder: Path, tmp_path: Path, build: Build) -> None:
    """An export is killed after some files. No file is incomplete, and the second export adds the missing files."""
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
    whole = {Datum.decode(value).data for _, value in split_records(store)}
    there = {path: path.stat().st_mtime_ns for path in out.rglob("*.ppm")}
    assert there and all(path.read_bytes() in whole for path in there)
    again = subprocess.run([*program, "--store", str(store), "--jobs", "2"], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert {path.read_bytes() for path in out.rglob("*.ppm")} == whole and len(whole) == 300
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in there.items())


def test_an_exported_ppm_store_is_rebuilt_with_the_same_records(
    photo_folder: Path, tmp_path: Path, build: Build, records_of: RecordsOf
) -> None:
    """Pillow reads the pixels of a record from the exported file.

    A store that is built from the exported files, with the same side length, has the same images.
    """
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


def test_the_export_of_a_damaged_store_names_the_record(stores: dict[str, Path], tmp_path: Path) -> None:
    records = split_records(stores["jpeg"])
    key, value = records[4]
    records[4] = key, value[:99] + bytes([value[99] ^ 1]) + value[100:]
    store = store_with_records(stores["jpeg"], tmp_path / "store", records)
    result = alexprep("export-files", tmp_path / "out", "--store", store, "--jobs", "1")
    fails(result, "00000, key 00000004: checksum", "alexprep verify")
    written = files_in(tmp_path / "out")
    assert len(written) == 4 and Datum.decode(records[3][1]).data in written.values()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, UserError)]
)
def test_a_full_disk_has_exit_code_3(
    number: int, kind: type[UserError], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the exit code that --help documents, and no incomplete file is left."""

    def full(*paths: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(export, "os", OtherOs(replace=full, link=full))
    opened = Store.open(store)
    task = export._ExportTask(str(store / "val" / "00000"), tmp_path / "out", opened.classes, opened.settings)
    with pytest.raises(UserError, match=os.strerror(number)) as caught:
        export._export_shard(task, TaskProgress())
    assert caught.type is kind
    assert files_in(tmp_path / "out") == {}


def test_a_label_beyond_the_last_class_is_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    (key, value), *_ = split_records(stores["jpeg"])
    record = replace(Datum.decode(value), label=99).encode()
    store = store_with_records(stores["jpeg"], tmp_path / "store", [(key, record)], ["a", "b"])
    result = alexprep("export-files", tmp_path / "out", "--store", store, "--jobs", "1")
    assert result.exit_code == 1 and f"key {key.decode()}: label 99, expected 0 to 1. Check the store" in result.output
