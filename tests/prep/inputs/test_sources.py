"""prep.inputs.sources: the splits of a SOURCE, and the classes and labels that fit the store."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from prep.console import UserError
from prep.inputs.reader import ListOptions
from prep.inputs.sources import find_splits, list_source
from tests.helpers.listings import list_images, paths_and_labels, touch


def split_paths(source: Path, split: str | None) -> dict[str, Path]:
    return {name: where.path for name, where in find_splits(source, split).items()}


def test_classes_other_than_those_of_the_store_are_refused(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG")
    assert list_images(root, store_classes=("n1", "n2")).classes == ("n1", "n2")
    with pytest.raises(UserError, match=r"2 classes, the store has 3\. Only in the store: n3\."):
        list_images(root, store_classes=("n1", "n2", "n3"))
    with pytest.raises(
        UserError, match=r"2 classes, the store has 2\. Only in this split: n2\. Only in the store: n3\."
    ):
        list_images(root, store_classes=("n1", "n3"))
    # Even with allow_empty_classes, the class n2 is refused, because n2 has no label in the store.
    with pytest.raises(UserError, match=r"Only in this split: n2\. All splits"):
        list_source(root, "val", ListOptions(allow_empty_classes=True), ("n1", "n3"))


def test_the_classes_of_the_store_keep_their_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(tmp_path / "t", "2/a.JPEG", "10/b.JPEG")
    assert list_images(root).classes == ("2", "10")
    source = list_images(root, store_classes=("10", "2"))  # an earlier alexprep sorted classes as text
    assert source.classes == ("10", "2")
    assert dict(paths_and_labels(source)) == {b"10/b.JPEG": 0, b"2/a.JPEG": 1}
    assert "keep the labels of the store: label 0 is 10. In a new store, label 0 would be 2" in capsys.readouterr().err
    source = list_source(root, "val", ListOptions(allow_empty_classes=True), ("2", "3", "10"))
    assert (source.classes, dict(paths_and_labels(source))) == (("2", "3", "10"), {b"2/a.JPEG": 0, b"10/b.JPEG": 2})


def test_a_file_gives_the_order_of_the_classes(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "cat/a.JPEG", "golden retriever/b.JPEG", "ape/c.JPEG")
    file = tmp_path / "classes.txt"
    file.write_text("golden retriever\ncat some words\n\nape\n")
    source = list_source(root, "train", ListOptions(class_file=file))
    assert source.classes == ("golden retriever", "cat", "ape")
    assert dict(paths_and_labels(source)) == {b"golden retriever/b.JPEG": 0, b"cat/a.JPEG": 1, b"ape/c.JPEG": 2}
    assert list_source(root, "val", ListOptions(class_file=file), source.classes).classes == source.classes
    with pytest.raises(UserError, match=r"label 0 is golden retriever, but ape in the store\. .*keep their labels"):
        list_source(root, "val", ListOptions(class_file=file), ("ape", "cat", "golden retriever"))
    file.write_text("cat\nbird\n")
    with pytest.raises(
        UserError, match=r"classes\.txt has 2\. Only in this split: ape, golden retriever\. Only in .*: bird"
    ):
        list_source(root, "train", ListOptions(class_file=file))


def test_splits_are_found_in_folders(tmp_path: Path) -> None:
    both = touch(tmp_path / "both", "train/n1/a.JPEG", "val/a.JPEG", "devkit/x")
    assert split_paths(both, None) == {"train": both / "train", "val": both / "val"}
    assert list(find_splits(both, None)) == ["train", "val"]
    assert split_paths(both, "val") == {"val": both / "val"}
    one = touch(tmp_path / "one", "train/n1/a.JPEG")
    assert split_paths(one, None) == {"train": one / "train"}
    with pytest.raises(UserError, match="has train but no val"):
        find_splits(one, "val")
    classes = touch(tmp_path / "classes", "n1/a.JPEG")
    assert split_paths(classes, None) == {"train": classes}
    assert split_paths(classes, "val") == {"val": classes}
    with pytest.raises(UserError, match="no such folder"):
        find_splits(tmp_path / "nowhere", None)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="not a folder or an archive"):
        find_splits(tmp_path / "fifo", None)


def test_splits_are_found_in_archives(tmp_path: Path) -> None:
    names = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
    source = touch(tmp_path / "ilsvrc", *names, "ILSVRC2012_devkit_t12/data/meta.mat", "ILSVRC2012_img_test.tar")
    assert split_paths(source, None) == {"train": source / names[0], "val": source / names[1]}
    assert split_paths(source, "val") == {"val": source / names[1]}
    for archive, split in ((names[0], "train"), (names[1], "val"), ("ILSVRC2012_img_test.tar", "train")):
        assert split_paths(source / archive, None) == {split: source / archive}
        assert split_paths(source / archive, "val") == {"val": source / archive}
    short = touch(tmp_path / "short", "train.tar", "val.tar")
    assert split_paths(short, None) == {"train": short / "train.tar", "val": short / "val.tar"}
    assert split_paths(short / "val.tar", None) == {"val": short / "val.tar"}
    mixed = touch(tmp_path / "mixed", "train/n1/a.JPEG", "val.tar", "train.tar")
    assert split_paths(mixed, None) == {"train": mixed / "train", "val": mixed / "val.tar"}


def test_a_label_file_is_ignored_for_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG")
    (tmp_path / "labels.txt").write_text("a.JPEG 7\n")
    source = list_source(root, "train", ListOptions(tmp_path / "labels.txt"))
    assert paths_and_labels(source) == [(b"n1/a.JPEG", 0), (b"n2/a.JPEG", 1)]
    assert "--labels is ignored" in capsys.readouterr().err


def test_a_tar_of_class_folders_is_listed_like_the_folder(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n2/b.JPEG", "n10/z.JPEG", "n1/a.JPEG", "n1/.hidden", "n1-x/a.JPEG")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(root, ".")
    folder, archive = list_images(root), list_images(tmp_path / "t.tar")
    assert archive.classes == folder.classes == ("n1", "n1-x", "n10", "n2")
    assert paths_and_labels(archive) == paths_and_labels(folder)
    with pytest.raises(UserError, match=r"4 classes, the store has 1\. Only in this split: n1-x, n10, n2\."):
        list_images(tmp_path / "t.tar", store_classes=("n1",))
