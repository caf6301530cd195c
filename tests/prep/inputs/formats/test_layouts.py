"""prep.inputs.formats.layouts: the option --layout, and how the layout of a folder or file is recognized."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest

from prep.console import UserError
from prep.inputs.formats.layouts import find_splits, split_source
from prep.inputs.sources import list_source
from tests.helpers.listings import touch
from tests.helpers.tars import tar_of
from tests.prep.inputs.formats.sample_data import class_folders, class_tars, make_pictures, put, web_dataset


def test_a_layout_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    folder = touch(tmp_path / "folder", "n1/a.jpg")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("n1/a.jpg", b"x")
    for layout in ("tar", "zip"):
        with pytest.raises(UserError, match=f"--layout {layout}: .* is a folder, expected a file"):
            find_splits(folder, None, layout)
    for layout in ("folders", "class-tars"):
        with pytest.raises(UserError, match=rf"--layout {layout}: .*x\.zip is a file, expected a folder"):
            find_splits(tmp_path / "x.zip", None, layout)
    for layout, suffix in (("webdataset", "tar"), ("parquet", "parquet"), ("csv", "csv"), ("class-tars", "tar")):
        with pytest.raises(UserError, match=rf"--layout {layout}: .*folder has 0 files \.{suffix}"):
            find_splits(folder, None, layout)
    with pytest.raises(UserError, match=r"x\.zip is not a tar archive, or is damaged"):
        list_source(find_splits(tmp_path / "x.zip", None, "tar")["train"], "train")


def test_class_tars_may_have_the_names_of_splits(tmp_path: Path) -> None:
    """train.tar can be a class, as in COCO. If the folder also contains test.tar, train.tar is a split."""
    jpeg = tar_of([("a.jpg", b"\xff\xd8\xff")])
    for name in ("airplane", "bus", "train"):
        put(tmp_path / "coco" / f"{name}.tar", jpeg)
    (found,) = find_splits(tmp_path / "coco", None).values()
    assert (found.path, found.layout) == (tmp_path / "coco", "class-tars")
    assert list_source(found, "train").classes == ("airplane", "bus", "train")
    for name in ("train", "val", "test"):
        put(tmp_path / "splits" / f"{name}.tar", jpeg)
    assert [where.layout for where in find_splits(tmp_path / "splits", None).values()] == ["tar", "tar"]


def test_splits_may_have_different_layouts(tmp_path: Path) -> None:
    pictures = make_pictures()
    class_tars(pictures, tmp_path / "ILSVRC2012_img_train")
    web_dataset(pictures, tmp_path / "val")
    found = find_splits(tmp_path, None)
    assert {name: where.layout for name, where in found.items()} == {"train": "class-tars", "val": "webdataset"}
    train = list_source(found["train"], "train")
    assert list_source(found["val"], "val", store_classes=train.classes).inputs.digest()
    nested = class_folders(pictures, tmp_path / "nested" / "train").parent
    class_folders(pictures, nested / "validation")
    assert {name: where.path.name for name, where in find_splits(nested, None).items()} == {
        "train": "train",
        "val": "validation",
    }


def test_a_tar_with_json_files_of_other_names_is_no_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("n1/a.jpg", "n1/info.json", "n1/b.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    assert split_source(path).layout == "tar"
    assert split_source(path, "webdataset").layout == "webdataset"


def test_packed_classes_are_not_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = touch(tmp_path / "half", "n00000001/a.jpg", "n00000002/a.jpg", "n00000002.tar")
    assert list_source(half, "train").classes == ("n00000001", "n00000002")
    touch(half, "n00000003.tar")
    with pytest.raises(
        UserError, match=r"1 class tars that are not unpacked \(n00000003\.tar\) beside 2 class folders"
    ):
        list_source(half, "train")
    for name in ("n1.tar", "n2.tar"):
        put(tmp_path / "tars" / name, tar_of([("a.jpg", b"\xff\xd8\xff")]))
    touch(tmp_path / "tars", "n3.tgz")
    with pytest.raises(UserError, match=r"n3\.tgz: compressed"):
        list_source(tmp_path / "tars", "train")
    with pytest.raises(UserError, match=r"n1\.tar\.gz, n2\.tar\.gz: compressed"):
        find_splits(touch(tmp_path / "packed", "n1.tar.gz", "n2.tar.gz"), None)
    both = touch(tmp_path / "both", "train/n1/a.jpg", "val/n1/b.jpg", "validation/n1/c.jpg")
    assert find_splits(both, None)["val"].path.name == "val"
    assert "val is read from val; left out: validation" in capsys.readouterr().err
