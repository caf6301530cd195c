"""prep.inputs.sources: which splits a SOURCE has, and which classes and labels fit the store."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from prep.console import UserError
from prep.inputs.sources import find_splits, list_source
from tests.helpers.listings import list_images, paths_and_labels, touch


def test_classes_other_than_those_of_the_store_are_refused(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG")
    assert list_images(root, store_classes=("n1", "n2")).classes == ("n1", "n2")
    with pytest.raises(UserError, match=r"2 classes, the store has 3 \(first class that only one of the two has: n3\)"):
        list_images(root, store_classes=("n1", "n2", "n3"))
    with pytest.raises(UserError, match="All splits of a store must have the same classes"):
        list_images(root, store_classes=("n2", "n1"))


def test_splits_are_found_in_folders(tmp_path: Path) -> None:
    both = touch(tmp_path / "both", "train/n1/a.JPEG", "val/a.JPEG", "devkit/x")
    assert find_splits(both, None) == {"train": both / "train", "val": both / "val"}
    assert list(find_splits(both, None)) == ["train", "val"]
    assert find_splits(both, "val") == {"val": both / "val"}
    one = touch(tmp_path / "one", "train/n1/a.JPEG")
    assert find_splits(one, None) == {"train": one / "train"}
    with pytest.raises(UserError, match="has train but no val"):
        find_splits(one, "val")
    classes = touch(tmp_path / "classes", "n1/a.JPEG")
    assert find_splits(classes, None) == {"train": classes}
    assert find_splits(classes, "val") == {"val": classes}
    with pytest.raises(UserError, match="no such folder"):
        find_splits(tmp_path / "nowhere", None)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="not a folder or an archive"):
        find_splits(tmp_path / "fifo", None)


def test_splits_are_found_in_archives(tmp_path: Path) -> None:
    names = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
    source = touch(tmp_path / "ilsvrc", *names, "ILSVRC2012_devkit_t12/data/meta.mat", "ILSVRC2012_img_test.tar")
    assert find_splits(source, None) == {"train": source / names[0], "val": source / names[1]}
    assert find_splits(source, "val") == {"val": source / names[1]}
    for archive, split in ((names[0], "train"), (names[1], "val"), ("ILSVRC2012_img_test.tar", "train")):
        assert find_splits(source / archive, None) == {split: source / archive}
        assert find_splits(source / archive, "val") == {"val": source / archive}
    short = touch(tmp_path / "short", "train.tar", "val.tar")
    assert find_splits(short, None) == {"train": short / "train.tar", "val": short / "val.tar"}
    assert find_splits(short / "val.tar", None) == {"val": short / "val.tar"}
    mixed = touch(tmp_path / "mixed", "train/n1/a.JPEG", "val.tar", "train.tar")
    assert find_splits(mixed, None) == {"train": mixed / "train", "val": mixed / "val.tar"}


def test_a_label_file_is_ignored_for_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG")
    (tmp_path / "labels.txt").write_text("a.JPEG 7\n")
    source = list_source(root, "train", tmp_path / "labels.txt", None, ())
    assert paths_and_labels(source) == [(b"n1/a.JPEG", 0), (b"n2/a.JPEG", 1)]
    assert "--labels is ignored" in capsys.readouterr().err


def test_a_tar_of_class_folders_is_listed_like_the_folder(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n2/b.JPEG", "n10/z.JPEG", "n1/a.JPEG", "n1/.hidden", "n1-x/a.JPEG")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(root, ".")
    folder, archive = list_images(root), list_images(tmp_path / "t.tar")
    assert archive.classes == folder.classes == ("n1", "n1-x", "n10", "n2")
    assert paths_and_labels(archive) == paths_and_labels(folder)
    with pytest.raises(UserError, match="4 classes, the store has 1"):
        list_images(tmp_path / "t.tar", store_classes=("n1",))
