"""prep.sources against small folders written here, whose listing and labels are known beforehand.

The devkit's order of classes comes from a meta.mat that scipy.io.savemat writes. Nothing is opened but label files, so
the photographs are empty files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from prep.console import UserError
from prep.sources import Source, find_splits, read_source

NAMES = ["b.JPEG", "a.JPEG", "c.JPEG", "B.JPEG"]
IN_ORDER = [b"B.JPEG", b"a.JPEG", b"b.JPEG", b"c.JPEG"]  # by bytes


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def read(
    folder: Path, labels: Path | None = None, order: str | None = None, known: tuple[str, ...] = (), split: str = "val"
) -> Source:
    return read_source(folder, split, labels, order, known)


def label_file(tmp_path: Path, text: str, name: str = "labels.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def pairs(source: Source) -> list[tuple[bytes, int]]:
    return [(item.path, item.label) for item in source.inputs]


def devkit(path: Path, numbered: dict[int, str]) -> None:
    """A meta.mat like the devkit's: an array of structs `synsets` with ILSVRC2012_ID and WNID, and fields beside."""
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(number, name, f"word of {name}", 0) for number, name in numbered.items()]
    savemat(path, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return touch(tmp_path / "photos", *NAMES)


def test_class_folders_are_sorted_by_bytes(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n2/b.JPEG", "n2/a.JPEG", "n10/z.JPEG", "N3/x.png", "n1/ä.JPEG", "n1/z.JPEG")
    source = read(root, split="train")
    assert source.classes == ("N3", "n1", "n10", "n2")
    assert pairs(source) == [
        (b"N3/x.png", 0),
        (b"n1/z.JPEG", 1),
        ("n1/ä.JPEG".encode(), 1),
        (b"n10/z.JPEG", 2),
        (b"n2/a.JPEG", 3),
        (b"n2/b.JPEG", 3),
    ]
    assert (source.split, source.root) == ("train", root)


def test_a_folder_name_that_begins_another_keeps_its_label(tmp_path: Path) -> None:
    """'n1-x/' sorts before 'n1/' as a path but after it as a name."""
    root = touch(tmp_path / "t", "n1/a.JPEG", "n1-x/a.JPEG")
    source = read(root)
    assert source.classes == ("n1", "n1-x")
    assert dict(pairs(source)) == {b"n1/a.JPEG": 0, b"n1-x/a.JPEG": 1}
    assert [item.path for item in source.inputs] == sorted(item.path for item in source.inputs)


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n1/.DS_Store", ".DS_Store", ".thumbs/x.JPEG")
    assert pairs(read(root)) == [(b"n1/a.JPEG", 0)]


def test_a_class_without_photographs_keeps_its_number_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n3/c.JPEG")
    (root / "n2").mkdir()
    source = read(root)
    assert source.classes == ("n1", "n2", "n3")
    assert dict(pairs(source)) == {b"n1/a.JPEG": 0, b"n3/c.JPEG": 2}
    assert "n2" in capsys.readouterr().err


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "t" / "n1"
    folder.mkdir(parents=True)
    (folder / "x").touch()
    with open(bytes(folder) + b"/\xff\xfe.JPEG", "wb"):
        pass
    assert pairs(read(folder.parent)) == [(b"n1/x", 0), (b"n1/\xff\xfe.JPEG", 0)]


def test_ground_truth_goes_by_the_order_of_names(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "3\n1\n2\n1\n")
    source = read(flat, labels, known=("n1", "n2", "n3", "n4"))
    assert pairs(source) == list(zip(IN_ORDER, [2, 0, 1, 0], strict=True))
    assert source.classes == ("n1", "n2", "n3", "n4")


def test_ground_truth_without_known_classes_numbers_them(flat: Path, tmp_path: Path) -> None:
    source = read(flat, label_file(tmp_path, "3\n1\n2\n1\n\n"))
    assert [label for _, label in pairs(source)] == [2, 0, 1, 0]
    assert len(source.classes) == 3


def test_ground_truth_in_the_devkits_order(flat: Path, tmp_path: Path) -> None:
    """Number 1 is n3, 2 is n1, 3 is n2: the labels are places in the sorted names, whatever the devkit counts."""
    labels = label_file(tmp_path, "3\n1\n2\n1\n")
    devkit(tmp_path / "meta.mat", {1: "n3", 2: "n1", 3: "n2", 4: "n9", 5: "n0 is an inner node"})
    expected = list(zip(IN_ORDER, [1, 2, 0, 2], strict=True))  # n2, n3, n1, n3
    for order in (None, "devkit"):
        assert pairs(read(flat, labels, order, known=("n1", "n2", "n3"))) == expected
        alone = read(flat, labels, order)
        assert pairs(alone) == expected
        assert alone.classes == ("n1", "n2", "n3")
    assert [label for _, label in pairs(read(flat, labels, "sorted", known=("n1", "n2", "n3")))] == [2, 0, 1, 0]


def test_devkit_class_that_the_store_lacks(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "3\n1\n2\n1\n")
    devkit(tmp_path / "meta.mat", {1: "n3", 2: "n1", 3: "n2"})
    with pytest.raises(UserError, match="n3 is not among the store's 2 classes"):
        read(flat, labels, known=("n1", "n2"))
    with pytest.raises(UserError, match="number 9"):
        read(flat, label_file(tmp_path, "3\n1\n9\n1\n"), known=("n1", "n2", "n3"))


def test_devkit_file_missing_or_broken(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "1\n1\n1\n1\n")
    with pytest.raises(UserError, match=r"meta\.mat is missing"):
        read(flat, labels, "devkit")
    (tmp_path / "meta.mat").write_bytes(b"not a mat file" * 40)
    with pytest.raises(UserError, match=r"not the devkit's meta\.mat"):
        read(flat, labels)


def test_name_and_number_a_line(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG 2\nB.JPEG 0\nc.JPEG\t1\n\nval/b.JPEG 2\nnot_there.JPEG 1\n")
    source = read(flat, labels)
    assert pairs(source) == list(zip(IN_ORDER, [0, 2, 2, 1], strict=True))
    assert source.classes == ("0", "1", "2")
    assert read(flat, labels, known=("x", "y", "z", "w")).classes == ("x", "y", "z", "w")


def test_name_and_class_a_line(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG dog\nB.JPEG cat\nc.JPEG cat\nb.JPEG ape\n")
    source = read(flat, labels)
    assert source.classes == ("ape", "cat", "dog")
    assert pairs(source) == list(zip(IN_ORDER, [1, 2, 0, 1], strict=True))
    known = ("dog", "eel", "cat", "ape")  # the store's order rules
    assert [label for _, label in pairs(read(flat, labels, known=known))] == [2, 0, 3, 2]


def test_class_names_that_are_numbers(flat: Path, tmp_path: Path) -> None:
    """Where the store's classes are called 10, 20, 30, a label 10 is that class, not number 10."""
    labels = label_file(tmp_path, "a.JPEG 10\nB.JPEG 30\nc.JPEG 20\nb.JPEG 10\n")
    assert [label for _, label in pairs(read(flat, labels, known=("10", "20", "30")))] == [2, 0, 0, 1]


def test_names_with_spaces(tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", "my cat.JPEG", "my dog.JPEG")
    source = read(root, label_file(tmp_path, "my cat.JPEG 1\nmy dog.JPEG 0\n"))
    assert pairs(source) == [(b"my cat.JPEG", 1), (b"my dog.JPEG", 0)]


@pytest.mark.parametrize(
    ("text", "known", "named"),
    [
        ("a.JPEG 0\nb.JPEG 1\nc.JPEG 0\n", (), ["1 of 4", "B.JPEG"]),
        ("a.JPEG 0\nb.JPEG 1\nc.JPEG 0\nB.JPEG 1\na.JPEG 1\n", (), ["line 5", "a.JPEG", "two labels", "0", "1"]),
        ("a.JPEG 0\nb.JPEG\nc.JPEG 0\nB.JPEG 1\n", (), ["line 2", "b.JPEG"]),
        ("a.JPEG 0\nb.JPEG 3\nc.JPEG 0\nB.JPEG 1\n", ("x", "y"), ["label 3", "2 classes"]),
        ("a.JPEG x\nb.JPEG z\nc.JPEG x\nB.JPEG y\n", ("x", "y"), ["z", "2 classes"]),
        ("1\n2\n1\n", (), ["3 lines", "4 photographs"]),
        ("1\n2\n1\n1\n1\n", (), ["5 lines", "4 photographs"]),
        ("1\n2\n0\n1\n", (), ["line 3", "'0'", "from 1"]),
        ("1\n2\n-1\n1\n", (), ["line 3", "'-1'"]),
        ("1\n2\n1 2\n1\n", (), ["line 3", "'1 2'"]),
        ("1\n2\nx\n1\n", (), ["line 3", "'x'"]),
        ("1\n2\n3\n1\n", ("x", "y"), ["number 3", "2 classes"]),
        ("\n\n", (), ["empty"]),
    ],
)
def test_labels_that_do_not_fit(
    flat: Path, tmp_path: Path, text: str, known: tuple[str, ...], named: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        read(flat, label_file(tmp_path, text), known=known)
    for part in ["labels.txt", *named]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_label_file_that_is_missing(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        read(flat, tmp_path / "nowhere.txt")


@pytest.mark.parametrize("name", ["photos.txt", "ILSVRC2012_validation_ground_truth.txt", "val_ground_truth.txt"])
def test_label_file_beside_the_folder_is_found(flat: Path, tmp_path: Path, name: str) -> None:
    label_file(tmp_path, "2\n1\n2\n1\n", name)
    assert [label for _, label in pairs(read(flat))] == [1, 0, 1, 0]


def test_label_file_beside_a_folder_named_by_a_dot(flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label_file(tmp_path, "2\n1\n2\n1\n", "val_ground_truth.txt")
    monkeypatch.chdir(flat)
    assert [label for _, label in pairs(read(Path(".")))] == [1, 0, 1, 0]


def test_label_file_beside_the_folder_must_be_the_only_one(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no label file"):
        read(flat)
    label_file(tmp_path, "2\n1\n2\n1\n", "photos.txt")
    label_file(tmp_path, "2\n1\n2\n1\n", "my_ground_truth.txt")
    with pytest.raises(UserError, match="2 files beside it"):
        read(flat)


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        read(tmp_path / "empty")


def test_class_folders_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "t" / "n1").mkdir(parents=True)
    (tmp_path / "t" / "n2").mkdir()
    with pytest.raises(UserError, match="2 class folders and not one file"):
        read(tmp_path / "t")


def test_folders_and_files_side_by_side(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG", "README.txt")
    with pytest.raises(UserError, match=r"2 folders and 1 file side by side.*README\.txt"):
        read(root)


def test_class_folders_other_than_the_stores(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG")
    assert read(root, known=("n1", "n2")).classes == ("n1", "n2")
    with pytest.raises(UserError, match=r"2 classes, the store has 3 \(first that only one of them has: n3\)"):
        read(root, known=("n1", "n2", "n3"))
    with pytest.raises(UserError, match="Splits of one store share their classes"):
        read(root, known=("n2", "n1"))


def test_find_splits(tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match="not a folder"):
        find_splits(both / "val" / "a.JPEG", None)
