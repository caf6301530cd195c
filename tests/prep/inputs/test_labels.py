"""prep.inputs.labels on label files written here, whose labels are known beforehand.

The devkit's order of classes comes from a meta.mat that scipy.io.savemat writes. No photograph is opened, so they are
empty files. Labels that do not fit are one line that names the file and what is wrong in it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from prep.console import UserError
from prep.inputs.labels import read_labels
from prep.inputs.reader import Source
from prep.inputs.sources import list_source

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
    return list_source(folder, split, labels, order, known)


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
        ("1\n2\n1\n", (), ["3 lines", "4 images"]),
        ("1\n2\n1\n1\n1\n", (), ["5 lines", "4 images"]),
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
    assert len(str(caught.value)) < 500


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


@pytest.mark.parametrize(
    ("text", "known", "named"),
    [
        ("a.JPEG 0\nb.JPEG -1\nc.JPEG 0\nB.JPEG 1\n", (), ["-1", "from 0"]),
        ("a.JPEG 0\nb.JPEG -1\nc.JPEG 0\nB.JPEG 1\n", ("x", "y"), ["-1", "from 0"]),
        ("a.JPEG x\nb.JPEG -1\nc.JPEG x\nB.JPEG y\n", (), ["-1"]),
        ("a.JPEG 0\nb.JPEG 99999999999\nc.JPEG 0\nB.JPEG 1\n", (), []),
        ("a.JPEG 0\nb.JPEG 2000000000\nc.JPEG 0\nB.JPEG 1\n", (), []),
        (f"a.JPEG 0\nb.JPEG {'9' * 5000}\nc.JPEG 0\nB.JPEG 1\n", (), []),
        (f"a.JPEG 0\nb.JPEG {'9' * 5000}\nc.JPEG 0\nB.JPEG 1\n", ("x", "y"), ["2 classes"]),
        ("-1\n1\n2\n1\n", (), ["line 1", "'-1'", "from 1"]),
        ("1\n3000000000\n2\n1\n", (), []),
        (f"1\n{'9' * 5000}\n2\n1\n", (), []),
        ("1\n1.5\n2\n1\n", (), ["line 2", "'1.5'"]),
        ("1\n²\n2\n1\n", (), ["line 2", "'²'"]),
    ],
)
def test_labels_that_are_no_class(
    flat: Path, tmp_path: Path, text: str, known: tuple[str, ...], named: list[str]
) -> None:
    """A number that no one counts classes to is an error at once: no list of so many names is made."""
    test_labels_that_do_not_fit(flat, tmp_path, text, known, named)


def test_minus_one_may_be_a_class_of_the_store(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG -1\nb.JPEG x\nc.JPEG x\nB.JPEG -1\n")
    assert [label for _, label in pairs(read(flat, labels, known=("-1", "x")))] == [0, 0, 1, 1]


def test_label_file_as_windows_writes_it(flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(b"a.JPEG 2\r\nB.JPEG 0\r\n\r\nc.JPEG 1\r\nval\\x 1\r\nb.JPEG 2")
    assert pairs(read(flat, path)) == list(zip(IN_ORDER, [0, 2, 2, 1], strict=True))
    path.write_bytes(b"3\r\n1\r\n2\r\n1\r\n")
    assert [label for _, label in pairs(read(flat, path))] == [2, 0, 1, 0]


def test_label_file_in_no_encoding(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 name the file of those bytes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"\xff.JPEG", b"b.JPEG"):
        open(os.fsencode(folder) + b"/" + name, "wb").close()
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xff.JPEG 1\nb.JPEG 0\n")
    assert pairs(read(folder, path)) == [(b"b.JPEG", 0), (b"\xff.JPEG", 1)]


def test_files_that_are_no_labels(flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    rng = np.random.default_rng(1)
    for content in (b"\0" * 100, "a.JPEG 1\nb.JPEG 0\n".encode("utf-16"), *(rng.bytes(3000) for _ in range(20))):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read(flat, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_labels_of_a_tar_are_looked_for_beside_it_and_in_the_devkit(tmp_path: Path) -> None:
    names = [f"ILSVRC2012_val_{number:08d}.JPEG".encode() for number in (1, 2, 3)]
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    label_file(data, "2\n1\n2\n", "ILSVRC2012_validation_ground_truth.txt")
    devkit(data / "meta.mat", {1: "n5", 2: "n3"})
    found, classes = read_labels(None, names, tmp_path / "ILSVRC2012_img_val.tar", None, ())
    assert (found, classes) == (dict(zip(names, [0, 1, 0], strict=True)), ("n3", "n5"))
    label_file(tmp_path, "1\n1\n1\n", "ILSVRC2012_img_val.txt")
    with pytest.raises(UserError, match="2 files beside it"):
        read_labels(None, names, tmp_path / "ILSVRC2012_img_val.tar", None, ())


def test_same_name_in_two_folders_of_the_label_file(flat: Path, tmp_path: Path) -> None:
    """Only the last part of a name counts, so two labels for it are an error even where the folders differ."""
    text = "x/a.JPEG 1\ny/a.JPEG 2\nb.JPEG 0\nc.JPEG 0\nB.JPEG 0\n"
    with pytest.raises(UserError, match=r"line 2: a\.JPEG has two labels, 1 and 2"):
        read(flat, label_file(tmp_path, text))
