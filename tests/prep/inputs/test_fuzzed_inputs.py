"""Fuzzing of the readers of inputs: archives, label files, lists and the devkit.

The tests change bytes of valid files. A reader must list the inputs, or raise an error of one line.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from prep.images.codec import BadImage
from prep.inputs.classes import read_class_file
from prep.inputs.formats.layouts import find_splits
from prep.inputs.formats.zip_directory import count_entries, iterate_entries
from prep.inputs.labels.devkit import open_devkit
from prep.inputs.labels.label_file import ImageNames, parse_label_file
from prep.inputs.reader import ListOptions
from prep.inputs.sources import list_source
from prep.inputs.tar_members import BoundedFile, iterate_members
from tests.fuzzing import changed_bytes, changed_json, examples, reader_of, try_files
from tests.helpers.listings import write_devkit
from tests.prep.inputs.formats.sample_data import CLASSES, csv_file, make_pictures, parquet, web_dataset

NAMES = [b"a.jpg", b"b.jpg", b"c.jpg"]
LABELS = {
    "blanks": b"a.jpg 1\nb.jpg 2\nc.jpg 1\n",
    "csv": b'filename,label\n"a.jpg",cat\n"b.jpg",dog\nc.jpg,cat\n',
    "numbers": b"1\n2\n1\n",
    "boxes": b"ImageId,PredictionString\na,n01 1 2 3 4 n01 5 6 7 8\nb,n02 1 2 3 4\nc,n02 1 2 3 4\n",
}


def list_all(source: Path) -> None:
    """List the inputs of all splits, and read each input."""
    for split, where in find_splits(source, None).items():
        listed = list_source(where, split, ListOptions(allow_empty_classes=True))
        for item in listed.inputs:
            try:
                listed.reader.head(item, 8)
                listed.reader.read(item)
            except BadImage:
                continue


def tar_of(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.mark.parametrize("kind", LABELS)
@examples(60, 10_000)
def test_label_file(count: int, kind: str) -> None:
    read: Callable[[bytes], object] = lambda content: parse_label_file(Path("labels.txt"), content, ImageNames(NAMES))  # noqa: E731
    try_files(changed_bytes(LABELS[kind]), count, read)


@examples(60, 10_000)
def test_file_of_classes(count: int, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    read = reader_of(path, lambda: read_class_file(path))
    try_files(changed_bytes(b"n01440764 tench\nn01443537 goldfish\n# comment\n/a/airfield 2\n"), count, read)


@examples(60, 10_000)
def test_devkit(count: int, tmp_path: Path) -> None:
    path = tmp_path / "meta.mat"
    write_devkit(path, {1: "n3", 2: "n1", 3: "n2"})  # type: ignore[arg-type]  # savemat takes paths
    read = reader_of(path, lambda: open_devkit(path).synsets())
    try_files(changed_bytes(path.read_bytes()), count, read)


@examples(50, 20_000)
def test_directory_of_a_zip_archive(count: int, tmp_path: Path) -> None:
    path, content = tmp_path / "photos.zip", io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in ("train/n1/a.jpg", "train/n2/b.jpg"):
            archive.writestr(name, b"\xff\xd8\xffpicture")
    read = reader_of(path, lambda: (list(iterate_entries(path)), count_entries(path)))
    try_files(changed_bytes(content.getvalue()), count, read)
    try_files(changed_bytes(content.getvalue()), count, reader_of(path, lambda: list_all(path)))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@examples(30, 20_000)
def test_headers_of_a_tar_archive(count: int, format: int, tmp_path: Path) -> None:
    path, name = tmp_path / "photos.tar", "n1/" + "é" * (30 if format == tarfile.USTAR_FORMAT else 120)
    content = tar_of({"n1/a.jpg": b"\xff\xd8\xffpicture", name: b"", "n2/b.jpg": b"x" * 600}, format)

    def read() -> None:
        with BoundedFile(path) as file:
            for _ in iterate_members(file, path, 0, path.stat().st_size):
                pass

    try_files(changed_bytes(content), count, reader_of(path, read))


@examples(30, 10_000)
def test_labels_of_a_web_dataset(count: int, tmp_path: Path) -> None:
    path = tmp_path / "photos.tar"

    def read(content: bytes) -> None:
        path.write_bytes(
            tar_of({"a.jpg": b"\xff\xd8\xff1", "a.json": content, "b.jpg": b"\xff\xd8\xff2", "b.cls": b"1"})
        )
        list_all(path)

    try_files(changed_json({"label": 1, "height": 50, "caption": "text"}), count, read)


@pytest.mark.parametrize("make", [parquet, web_dataset, csv_file])
@examples(25, 3_000)
def test_lists_and_shards(count: int, make: Callable[[dict[str, bytes], Path], Path], tmp_path: Path) -> None:
    """The files are Parquet files, WebDataset shards and lists of paths."""
    pictures = {name: content[:200] for name, content in make_pictures().items()}
    source = make(pictures, tmp_path / "source")
    suffixes = (".parquet", ".tar", ".csv")
    path = sorted(file for file in [source, *source.rglob("*")] if file.suffix in suffixes and file.is_file())[0]
    try_files(changed_bytes(path.read_bytes()), count, reader_of(path, lambda: list_all(source)))


@examples(25, 3_000)
def test_classes_in_the_metadata_of_a_parquet_file(count: int, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from tests.prep.inputs.formats.sample_data import hugging_face_table

    pictures = {name: content[:200] for name, content in make_pictures().items()}
    table, path = hugging_face_table(pictures), tmp_path / "train.parquet"
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}

    def read(content: bytes) -> None:
        pq.write_table(table.replace_schema_metadata({b"huggingface": content}), path)
        list_all(path)

    try_files(changed_json(json.loads(json.dumps({"info": {"features": features}}))), count, read)
