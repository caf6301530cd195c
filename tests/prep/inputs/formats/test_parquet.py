"""prep.inputs.formats.parquet: columns, names and labels of Parquet files; images that a build unpacks."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prep.console import DiskFull, UserError
from prep.images.codec import BadImage
from prep.inputs.formats import parquet
from prep.inputs.reader import ListOptions
from prep.inputs.sources import find_splits, list_source
from tests.helpers.listings import paths_and_labels
from tests.prep.inputs.formats.sample_data import hugging_face_table, make_pictures, put

JPEG = b"\xff\xd8\xff"


def write(path: Path, columns: dict[str, Any], names: list[str] | None = None) -> Path:
    features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("data/{}-00000-of-00001-a09b74b3ef9c3b56.parquet",),
        ("data/{}-00000-of-00002.parquet", "data/{}-00001-of-00002.parquet"),
        ("{}-00000-of-00001.parquet",),
        ("{}/0000.parquet", "{}/0001.parquet"),
        ("data/{}/0000.parquet",),
        ("default/{}/0000.parquet", "default/{}/0001.parquet"),
        ("default/partial-{}/0000.parquet",),
        ("full size/imagenet-{}-00000-of-00001.parquet",),
    ],
)
def test_files_are_found_under_the_names_that_huggingface_uses(
    names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library `datasets` calls the splits train, validation and test.

    In this test, each file has one row, and the class of the row is the name of the split.
    """
    for split in ("train", "validation", "test"):
        for number, name in enumerate(names):
            path = tmp_path / name.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, {"image": images(f"{number}.jpg"), "label": [split]})
    (tmp_path / ".gitattributes").touch()
    (tmp_path / "README.md").touch()
    for layout in (None, "parquet"):
        found = find_splits(tmp_path, None, layout)
        listed = {name: list_source(where, name) for name, where in found.items()}
        assert {name: source.classes for name, source in listed.items()} == {
            "train": ("train",),
            "val": ("validation",),
        }
        assert {len(source.inputs) for source in listed.values()} == {len(names)}
        messages = capsys.readouterr().err
        assert f"left out {len(names)} Parquet file" in messages and " outside train and val (first: " in messages
        assert ("only a part of the split train" in messages) == ("partial" in names[0])
    file = tmp_path / names[0].format("validation")
    assert find_splits(file, None).keys() == ({"train"} if "partial" in names[0] else {"val"})
    if file.parent.name == "validation":
        assert find_splits(file.parent, None).keys() == {"val"}


def test_several_configurations_are_refused(tmp_path: Path) -> None:
    for config in ("large", "small"):
        for split in ("train", "test"):
            folder = tmp_path / config / split
            folder.mkdir(parents=True)
            write(folder / "0000.parquet", {"image": images("a.jpg"), "label": ["cat"]})
    with pytest.raises(UserError, match=r"2 configurations \(large, small\)\. Name one configuration as SOURCE"):
        find_splits(tmp_path, None)
    assert find_splits(tmp_path / "small", None).keys() == {"train"}
    write(tmp_path / "small" / "partial-train" / "0000.parquet", {"image": images("a.jpg"), "label": ["cat"]})
    with pytest.raises(UserError, match="Parquet files of train in partial-train and in train"):
        find_splits(tmp_path / "small", None)


def test_parquet_files_that_describe_images_are_no_split(tmp_path: Path) -> None:
    """For `datasets`, a file metadata.parquet can describe the images of a folder. Such a file is not a split."""
    for split in ("train", "val"):
        for name in ("cat/1.jpg", "dog/2.jpg"):
            put(tmp_path / split / name, JPEG)
        write(tmp_path / split / "metadata.parquet", {"file_name": ["cat/1.jpg"], "text": ["a cat"]})
        write(tmp_path / f"{split}.parquet", {"file_name": ["cat/1.jpg"], "text": ["a cat"]})
    write(tmp_path / "train" / "cat" / "train.parquet", {"text": ["a cat"]})
    for source in (tmp_path, tmp_path / "train"):
        assert {where.layout for where in find_splits(source, None).values()} == {"folders"}


def images(*paths: str | None) -> list[dict[str, Any]]:
    return [{"bytes": JPEG + bytes([k]), "path": path} for k, path in enumerate(paths)]


def test_labels_are_positions_of_the_class_names_or_names(tmp_path: Path) -> None:
    three = images("a.jpg", "b.jpg", "c.jpg")
    named = write(tmp_path / "named.parquet", {"image": three, "label": [1, 0, 1]}, ["tench, fish", "cat"])
    source = list_source(named, "train")
    assert source.classes == ("tench, fish", "cat")
    assert paths_and_labels(source) == [(b"cat/a.jpg", 1), (b"tench, fish/b.jpg", 0), (b"cat/c.jpg", 1)]
    texts = write(tmp_path / "texts.parquet", {"img": three, "label": ["dog", "cat", "dog"]})
    assert list_source(texts, "train").classes == ("cat", "dog")
    numbers = write(tmp_path / "numbers.parquet", {"image": three, "label": [2, 0, 1]})
    assert list_source(numbers, "train").classes == ("0", "1", "2")
    cifar = {"img": three, "fine_label": [0, 1, 1], "coarse_label": [0, 0, 0]}
    assert [item.label for item in list_source(write(tmp_path / "cifar.parquet", cifar), "train").inputs] == [0, 1, 1]
    unlabelled = write(tmp_path / "test.parquet", {"image": three, "label": [-1, -1, -1]})
    with pytest.raises(UserError, match="no image with a label"):
        list_source(unlabelled, "train")


@pytest.mark.parametrize("paths", [(None, None, None), ("a.jpg", None, "c.jpg"), ("a.jpg", "a.jpg", "c.jpg")])
def test_rows_are_numbered_if_paths_are_missing_or_double(paths: tuple[str | None, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": images(*paths), "label": [0, 0, 0]}, ["cat"])
    names = [item.path for item in list_source(path, "train").inputs]
    assert names == [b"x.parquet/%08d" % row for row in range(3)]


def test_a_column_of_bytes_needs_no_paths(tmp_path: Path) -> None:
    source = list_source(write(tmp_path / "x.parquet", {"image": [JPEG, JPEG + b"1"], "label": [0, 0]}), "train")
    assert [source.reader.read(item) for item in source.inputs] == [JPEG, JPEG + b"1"]


def test_images_are_unpacked_once_and_read_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = make_pictures()
    path = tmp_path / "x.parquet"
    pq.write_table(hugging_face_table(pictures), path, row_group_size=2)
    source = list_source(path, "train")
    reader = source.reader
    assert isinstance(reader, parquet.ParquetReader)
    unpacking = reader.unpacking_into(tmp_path / "unpacked", 10**9)
    for one in (reader, unpacking):
        assert {item.path.decode(): one.read(item) for item in source.inputs} == pictures
    packed = tmp_path / "unpacked" / "00000.images"
    assert packed.read_bytes() == b"".join(pictures.values())
    before = packed.stat().st_mtime_ns
    parquet._offsets.cache_clear()
    assert unpacking.read(source.inputs[5]) == list(pictures.values())[5]
    assert packed.stat().st_mtime_ns == before
    assert reader.unpacking_into(tmp_path / "other", 1000) is reader
    assert "The build reads groups of rows instead, which is slower" in capsys.readouterr().err


def test_a_full_disk_is_no_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, array: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = list_source(write(tmp_path / "x.parquet", {"image": images("a.jpg"), "label": [0]}), "train")
    assert isinstance(source.reader, parquet.ParquetReader)
    monkeypatch.setattr(parquet, "save_array", fail)
    with pytest.raises(DiskFull, match=r"00000\.images: No space left on device"):
        source.reader.unpacking_into(tmp_path / "unpacked", 10**9).read(source.inputs[0])
    assert list((tmp_path / "unpacked").glob("*.images")) == []


def test_a_row_without_bytes_is_bad(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": "a.jpg"}, {"bytes": JPEG, "path": "b.jpg"}]
    source = list_source(write(tmp_path / "x.parquet", {"image": rows, "label": [0, 0]}), "train")
    reader = source.reader
    assert isinstance(reader, parquet.ParquetReader)
    for one in (reader, reader.unpacking_into(tmp_path / "unpacked", 10**9)):
        with pytest.raises(BadImage, match="the row has only the path of an image"):
            one.read(source.inputs[0])
        assert one.read(source.inputs[1]) == JPEG


def test_missing_columns_and_damaged_files_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"columns text, label; expected a column `image` with the bytes of images"):
        list_source(write(tmp_path / "x.parquet", {"text": ["a"], "label": [0]}), "train")
    with pytest.raises(UserError, match="columns image, text; expected a column `label`"):
        list_source(write(tmp_path / "y.parquet", {"image": images("a"), "text": ["a"]}), "train")
    path = write(tmp_path / "z.parquet", {"image": images("a"), "label": [0]})
    content = path.read_bytes()
    for wrong in (content[:-5], content[:8], content[:4] + content[40:]):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"z\.parquet is no Parquet file, or is damaged") as error:
            list_source(path, "train")
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"Install pyarrow with: pip install pyarrow"):
        list_source(path, "train")


def test_splits_of_a_repository(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        write(tmp_path / "data" / f"{name}.parquet", {"image": images(f"{name}.jpg"), "label": [0]})
    found = find_splits(tmp_path, None)
    assert {name: len(where.files) for name, where in found.items()} == {"train": 2, "val": 1}


def test_digits_in_a_column_of_texts_are_names_of_classes(tmp_path: Path) -> None:
    """The labels `1` and `2` are names here. As positions from 0, they would be the second and the third class."""
    three = images("a.jpg", "b.jpg", "c.jpg")
    texts = write(tmp_path / "texts.parquet", {"image": three, "label": ["1", "10", "2"]})
    assert list_source(texts, "train").classes == ("1", "2", "10")
    assert [item.label for item in list_source(texts, "val", store_classes=("1", "2", "10")).inputs] == [0, 2, 1]


def test_class_names_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    one = images("a.jpg")
    double = write(tmp_path / "double.parquet", {"image": one, "label": [0]}, ["cat", "cat"])
    with pytest.raises(UserError, match="two classes have the name cat"):
        list_source(double, "train")
    for name, names in (("train-0", ["cat", "dog"]), ("train-1", ["dog", "cat"])):
        write(tmp_path / "data" / f"{name}.parquet", {"image": one, "label": [0]}, names)
    with pytest.raises(UserError, match=r"class names cat, dog, but .*train-1\.parquet has .*class names dog, cat"):
        list_source(tmp_path / "data", "train")


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ({"image": images("c.jpg"), "label": [0]}, ["dog", "cat"], "class names cat, dog, but .*class names dog, cat"),
        ({"image": images("c.jpg"), "label": [0]}, None, "class names cat, dog, but .*no class names"),
        ({"image": images("c.jpg"), "label": ["cat"]}, ["cat", "dog"], "numbers in column label .*but .*texts"),
        ({"img": images("c.jpg"), "label": [0]}, ["cat", "dog"], "images in column image, .*images in column img"),
    ],
    ids=["other order", "no names", "texts", "other column"],
)
def test_files_that_differ_are_refused(
    columns: dict[str, Any], names: list[str] | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "train-0.parquet", {"image": images("a.jpg", "b.jpg"), "label": [0, 1]}, ["cat", "dog"])
    write(tmp_path / "train-1.parquet", columns, names)
    with pytest.raises(UserError, match=message):
        list_source(find_splits(tmp_path, None)["train"], "train")


def test_kinds_of_labels(tmp_path: Path) -> None:
    three = images("a.jpg", "b.jpg", "c.jpg")
    path = write(tmp_path / "f.parquet", {"image": three, "label": [1.0, float("nan"), 0.0]})
    with pytest.raises(UserError, match=r"1 image without a label \(b\.jpg\), so a class may be missing"):
        list_source(path, "train")
    floats = list_source(path, "train", ListOptions(allow_empty_classes=True))
    assert (floats.classes, floats.refused) == (("0", "1"), (("b.jpg", "no label"),))
    assert list_source(
        write(tmp_path / "b.parquet", {"image": three, "label": [b"x", b"y", b"x"]}), "train"
    ).classes == (
        "x",
        "y",
    )
    with pytest.raises(UserError, match=r"label \[0, 1\]; expected the name of one class"):
        list_source(write(tmp_path / "l.parquet", {"image": three, "label": [[0, 1], [0], [1]]}), "train")
    with pytest.raises(UserError, match=r"1 of the labels \(cow\) is not among the 2 class names \(cat, dog\)"):
        list_source(
            write(tmp_path / "n.parquet", {"image": three, "label": ["cat", "cow", "dog"]}, ["cat", "dog"]), "train"
        )
