"""prep.inputs.labels on label files with known labels, which the tests write.

The devkit's order of classes comes from a meta.mat that scipy.io.savemat writes. The images are empty files, since
prep.inputs.labels does not open images. Labels that do not fit the images give a one-line error that names the file
and the fault.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from prep.console import UserError
from prep.inputs.labels import read_labels
from prep.inputs.reader import ListOptions, Source
from prep.inputs.sources import list_source
from tests.helpers.listings import labels_of, paths_and_labels, touch

NAMES = ["b.JPEG", "a.JPEG", "c.JPEG", "B.JPEG"]
SORTED_NAMES = [b"B.JPEG", b"a.JPEG", b"b.JPEG", b"c.JPEG"]  # by bytes


def list_images(
    folder: Path,
    labels: Path | None = None,
    order: str | None = None,
    store_classes: tuple[str, ...] = (),
    split: str = "val",
) -> Source:
    return list_source(folder, split, ListOptions(labels, order), store_classes)


def label_file(tmp_path: Path, text: str, name: str = "labels.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def write_devkit(path: Path, numbered: dict[int, str]) -> None:
    """A meta.mat like the devkit's: an array of structs `synsets` with ILSVRC2012_ID, WNID and other fields."""
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(number, name, f"word of {name}", 0) for number, name in numbered.items()]
    savemat(path, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return touch(tmp_path / "photos", *NAMES)


def test_ground_truth_numbers_are_for_the_images_in_sorted_order(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "3\n1\n2\n1\n")
    source = list_images(flat, labels, store_classes=("n1", "n2", "n3", "n4"))
    assert paths_and_labels(source) == list(zip(SORTED_NAMES, [2, 0, 1, 0], strict=True))
    assert source.classes == ("n1", "n2", "n3", "n4")


def test_ground_truth_without_classes_of_a_store_numbers_them(flat: Path, tmp_path: Path) -> None:
    source = list_images(flat, label_file(tmp_path, "3\n1\n2\n1\n\n"))
    assert labels_of(source) == [2, 0, 1, 0]
    assert len(source.classes) == 3


def test_ground_truth_numbers_are_read_in_the_devkits_order(flat: Path, tmp_path: Path) -> None:
    """In the devkit, classes 1, 2 and 3 are n3, n1 and n2. The labels are positions in the sorted class names."""
    labels = label_file(tmp_path, "3\n1\n2\n1\n")
    write_devkit(tmp_path / "meta.mat", {1: "n3", 2: "n1", 3: "n2", 4: "n9", 5: "n0 is an inner node"})
    expected = list(zip(SORTED_NAMES, [1, 2, 0, 2], strict=True))  # n2, n3, n1, n3
    for order in (None, "devkit"):
        assert paths_and_labels(list_images(flat, labels, order, store_classes=("n1", "n2", "n3"))) == expected
        without_store = list_images(flat, labels, order)
        assert paths_and_labels(without_store) == expected
        assert without_store.classes == ("n1", "n2", "n3")
    assert labels_of(list_images(flat, labels, "sorted", store_classes=("n1", "n2", "n3"))) == [2, 0, 1, 0]


def test_a_devkit_class_that_the_store_lacks_is_refused(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "3\n1\n2\n1\n")
    write_devkit(tmp_path / "meta.mat", {1: "n3", 2: "n1", 3: "n2"})
    with pytest.raises(UserError, match="n3 is not among the store's 2 classes"):
        list_images(flat, labels, store_classes=("n1", "n2"))
    with pytest.raises(UserError, match="number 9"):
        list_images(flat, label_file(tmp_path, "3\n1\n9\n1\n"), store_classes=("n1", "n2", "n3"))


def test_a_missing_or_broken_meta_mat_is_refused(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "1\n1\n1\n1\n")
    with pytest.raises(UserError, match=r"meta\.mat is missing"):
        list_images(flat, labels, "devkit")
    (tmp_path / "meta.mat").write_bytes(b"not a mat file" * 40)
    with pytest.raises(UserError, match=r"not the devkit's meta\.mat"):
        list_images(flat, labels)


def test_labels_may_be_numbers_from_0(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG 2\nB.JPEG 0\nc.JPEG\t1\n\nval/b.JPEG 2\nnot_there.JPEG 1\n")
    source = list_images(flat, labels)
    assert paths_and_labels(source) == list(zip(SORTED_NAMES, [0, 2, 2, 1], strict=True))
    assert source.classes == ("0", "1", "2")
    assert list_images(flat, labels, store_classes=("x", "y", "z", "w")).classes == ("x", "y", "z", "w")


def test_labels_may_be_class_names(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG dog\nB.JPEG cat\nc.JPEG cat\nb.JPEG ape\n")
    source = list_images(flat, labels)
    assert source.classes == ("ape", "cat", "dog")
    assert paths_and_labels(source) == list(zip(SORTED_NAMES, [1, 2, 0, 1], strict=True))
    store_classes = ("dog", "eel", "cat", "ape")  # labels follow this order
    assert labels_of(list_images(flat, labels, store_classes=store_classes)) == [2, 0, 3, 2]


def test_numbers_that_are_class_names_of_the_store_are_names(flat: Path, tmp_path: Path) -> None:
    """If the store's classes are named 10, 20, 30, the label 10 is the class with this name, not class number 10."""
    labels = label_file(tmp_path, "a.JPEG 10\nB.JPEG 30\nc.JPEG 20\nb.JPEG 10\n")
    assert labels_of(list_images(flat, labels, store_classes=("10", "20", "30"))) == [2, 0, 0, 1]


def test_names_may_contain_spaces(tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", "my cat.JPEG", "my dog.JPEG")
    source = list_images(root, label_file(tmp_path, "my cat.JPEG 1\nmy dog.JPEG 0\n"))
    assert paths_and_labels(source) == [(b"my cat.JPEG", 1), (b"my dog.JPEG", 0)]


@pytest.mark.parametrize(
    ("text", "store_classes", "parts"),
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
def test_labels_that_do_not_fit_are_one_line_with_the_fault(
    flat: Path, tmp_path: Path, text: str, store_classes: tuple[str, ...], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        list_images(flat, label_file(tmp_path, text), store_classes=store_classes)
    for part in ["labels.txt", *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_missing_label_file_is_named(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        list_images(flat, tmp_path / "nowhere.txt")


@pytest.mark.parametrize("name", ["photos.txt", "ILSVRC2012_validation_ground_truth.txt", "val_ground_truth.txt"])
def test_the_label_file_next_to_the_folder_is_found(flat: Path, tmp_path: Path, name: str) -> None:
    label_file(tmp_path, "2\n1\n2\n1\n", name)
    assert labels_of(list_images(flat)) == [1, 0, 1, 0]


def test_the_label_file_next_to_the_current_folder_is_found(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_file(tmp_path, "2\n1\n2\n1\n", "val_ground_truth.txt")
    monkeypatch.chdir(flat)
    assert labels_of(list_images(Path("."))) == [1, 0, 1, 0]


def test_none_or_two_label_files_next_to_the_folder_are_refused(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no label file"):
        list_images(flat)
    label_file(tmp_path, "2\n1\n2\n1\n", "photos.txt")
    label_file(tmp_path, "2\n1\n2\n1\n", "my_ground_truth.txt")
    with pytest.raises(UserError, match="2 files look like label files"):
        list_images(flat)


@pytest.mark.parametrize(
    ("text", "store_classes", "parts"),
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
def test_labels_that_cannot_be_classes_are_refused(
    flat: Path, tmp_path: Path, text: str, store_classes: tuple[str, ...], parts: list[str]
) -> None:
    """A huge label is refused before a list with that many class names is made."""
    test_labels_that_do_not_fit_are_one_line_with_the_fault(flat, tmp_path, text, store_classes, parts)


def test_a_class_of_the_store_may_be_named_minus_one(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG -1\nb.JPEG x\nc.JPEG x\nB.JPEG -1\n")
    assert labels_of(list_images(flat, labels, store_classes=("-1", "x"))) == [0, 0, 1, 1]


def test_a_label_file_may_have_windows_line_ends(flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(b"a.JPEG 2\r\nB.JPEG 0\r\n\r\nc.JPEG 1\r\nval\\x 1\r\nb.JPEG 2")
    assert paths_and_labels(list_images(flat, path)) == list(zip(SORTED_NAMES, [0, 2, 2, 1], strict=True))
    path.write_bytes(b"3\r\n1\r\n2\r\n1\r\n")
    assert labels_of(list_images(flat, path)) == [2, 0, 1, 0]


def test_a_label_file_may_hold_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    """File names and names in a label file are compared as bytes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"\xff.JPEG", b"b.JPEG"):
        open(os.fsencode(folder) + b"/" + name, "wb").close()
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xff.JPEG 1\nb.JPEG 0\n")
    assert paths_and_labels(list_images(folder, path)) == [(b"b.JPEG", 0), (b"\xff.JPEG", 1)]


def test_binary_files_are_refused_as_labels(flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    rng = np.random.default_rng(1)
    for content in (b"\0" * 100, "a.JPEG 1\nb.JPEG 0\n".encode("utf-16"), *(rng.bytes(3000) for _ in range(20))):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            list_images(flat, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_labels_of_a_tar_are_found_next_to_it_or_in_the_devkit(tmp_path: Path) -> None:
    names = [f"ILSVRC2012_val_{number:08d}.JPEG".encode() for number in (1, 2, 3)]
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    label_file(data, "2\n1\n2\n", "ILSVRC2012_validation_ground_truth.txt")
    write_devkit(data / "meta.mat", {1: "n5", 2: "n3"})
    labels, classes = read_labels(None, names, tmp_path / "ILSVRC2012_img_val.tar", None, ())
    assert (labels, classes) == (dict(zip(names, [0, 1, 0], strict=True)), ("n3", "n5"))
    label_file(tmp_path, "1\n1\n1\n", "ILSVRC2012_img_val.txt")
    with pytest.raises(UserError, match="2 files look like label files"):
        read_labels(None, names, tmp_path / "ILSVRC2012_img_val.tar", None, ())


def test_the_same_name_in_two_folders_of_the_label_file_is_refused(flat: Path, tmp_path: Path) -> None:
    """A label file's folders are ignored: x/a.JPEG and y/a.JPEG give the image a.JPEG two labels."""
    text = "x/a.JPEG 1\ny/a.JPEG 2\nb.JPEG 0\nc.JPEG 0\nB.JPEG 0\n"
    with pytest.raises(UserError, match=r"line 2: a\.JPEG has two labels, 1 and 2"):
        list_images(flat, label_file(tmp_path, text))
