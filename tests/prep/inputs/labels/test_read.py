"""Labels of images from label files that the tests write. The expected labels are written by hand.

The devkit's order of classes comes from a meta.mat that scipy.io.savemat writes. The images are empty files, because
prep.inputs.labels does not open images. If labels do not fit the images, a one-line error names the file and the fault.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from prep.console import UserError
from prep.inputs.reader import ListOptions
from prep.inputs.sources import list_source
from tests.helpers.listings import (
    devkit_archive,
    label_file,
    labels_of,
    list_labelled,
    paths_and_labels,
    touch,
    write_devkit,
)

NAMES = ["b.JPEG", "a.JPEG", "c.JPEG", "B.JPEG"]
SORTED_NAMES = [b"B.JPEG", b"a.JPEG", b"b.JPEG", b"c.JPEG"]  # by bytes
CLASSES3 = ("n1", "n2", "n3")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return touch(tmp_path / "photos", *NAMES)


# Ground truth: one number on each line


def test_ground_truth_numbers_are_for_the_images_in_sorted_order(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "3\n1\n2\n1\n")
    source = list_labelled(flat, labels, "sorted", ("n1", "n2", "n3", "n4"))
    assert paths_and_labels(source) == list(zip(SORTED_NAMES, [2, 0, 1, 0], strict=True))
    assert source.classes == ("n1", "n2", "n3", "n4")
    assert source.labels_from == labels


def test_ground_truth_without_classes_of_a_store_numbers_them(flat: Path, tmp_path: Path) -> None:
    source = list_labelled(flat, label_file(tmp_path, "3\n1\n2\n1\n\n"), "sorted")
    assert labels_of(source) == [2, 0, 1, 0]
    assert source.classes == ("1", "2", "3")


@pytest.mark.parametrize("name", ["ILSVRC2012_validation_ground_truth.txt", "numbers.txt"])
@pytest.mark.parametrize("store_classes", [(), CLASSES3])
def test_numbers_alone_are_refused_without_the_devkit(
    name: str, store_classes: tuple[str, ...], flat: Path, tmp_path: Path
) -> None:
    labels = label_file(tmp_path, "3\n1\n2\n1\n", name)
    with pytest.raises(UserError) as caught:
        list_labelled(flat, labels, None, store_classes)
    for part in (str(labels), "meta.mat", "ILSVRC2012_devkit_t12.tar.gz", "--devkit", "--label-order sorted"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"--label-order devkit needs the devkit's meta\.mat.*image-net\.org"):
        list_labelled(flat, labels, "devkit", store_classes)


def test_ground_truth_numbers_are_read_in_the_devkits_order(flat: Path, tmp_path: Path) -> None:
    """In the devkit, classes 1, 2 and 3 are n3, n1 and n2. The labels are positions in the sorted class names."""
    labels = label_file(tmp_path, "3\n1\n2\n1\n")
    write_devkit(tmp_path / "meta.mat", {1: "n3", 2: "n1", 3: "n2", 4: "n9", 5: "n0 is an inner node"})
    expected = list(zip(SORTED_NAMES, [1, 2, 0, 2], strict=True))  # n2, n3, n1, n3
    for order in (None, "devkit"):
        assert paths_and_labels(list_labelled(flat, labels, order, CLASSES3)) == expected
        without_store = list_labelled(flat, labels, order)
        assert paths_and_labels(without_store) == expected
        assert without_store.classes == CLASSES3
    assert labels_of(list_labelled(flat, labels, "sorted", CLASSES3)) == [2, 0, 1, 0]


@pytest.mark.parametrize(
    "where", ["meta.mat", "folder", "data folder", "archive", "beside the images", "beside the file"]
)
def test_the_devkit_may_be_packed_and_lie_anywhere(where: str, flat: Path, tmp_path: Path) -> None:
    """The labels are the same from a meta.mat, from the devkit's folder, and from ILSVRC2012_devkit_t12.tar.gz."""
    numbers, devkit = {1: "n3", 2: "n1", 3: "n2"}, None
    labels = label_file(tmp_path / "labels", "3\n1\n2\n1\n")
    data = tmp_path / "elsewhere" / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    if where in ("meta.mat", "folder", "data folder"):
        write_devkit(data / "meta.mat", numbers)
        devkit = {"meta.mat": data / "meta.mat", "folder": data.parent, "data folder": data}[where]
    else:
        folder = {"archive": data, "beside the images": tmp_path, "beside the file": labels.parent}[where]
        archive = devkit_archive(folder, numbers, "1\n")
        devkit = archive if where == "archive" else None
    source = list_source(flat, "val", ListOptions(labels, devkit=devkit), CLASSES3)
    assert labels_of(source) == [1, 2, 0, 2]


def test_the_ground_truth_in_the_packed_devkit_needs_no_label_file(flat: Path, tmp_path: Path) -> None:
    archive = devkit_archive(tmp_path, {1: "n3", 2: "n1", 3: "n2"}, "3\n1\n2\n1\n")
    for options in (ListOptions(), ListOptions(devkit=archive)):
        assert labels_of(list_source(flat, "val", options, CLASSES3)) == [1, 2, 0, 2]


def test_a_devkit_class_that_the_store_lacks_is_refused(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "3\n1\n2\n1\n")
    write_devkit(tmp_path / "meta.mat", {1: "n3", 2: "n1", 3: "n2"})
    with pytest.raises(UserError, match=r"n3 of .* not among the 2 classes of the store"):
        list_labelled(flat, labels, None, ("n1", "n2"))
    with pytest.raises(UserError, match="number 9 is not in"):
        list_labelled(flat, label_file(tmp_path, "3\n1\n9\n1\n"), None, CLASSES3)


def test_a_missing_or_broken_devkit_is_refused(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "1\n1\n1\n1\n")
    (tmp_path / "meta.mat").write_bytes(b"not a mat file" * 40)
    with pytest.raises(UserError, match=r"not the devkit's meta\.mat"):
        list_labelled(flat, labels)
    (tmp_path / "cut.tar.gz").write_bytes(devkit_archive(tmp_path, {1: "n1"}, "1\n").read_bytes()[:-40])
    (tmp_path / "empty").mkdir()
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(labels)
    for name, part in (
        ("cut.tar.gz", "archive is damaged"),
        ("empty", r"no meta\.mat"),
        ("other.tar", r"no meta\.mat"),
        ("no", "No such file"),
    ):
        with pytest.raises(UserError, match=rf"--devkit .*{name}.*{part}.*Download ILSVRC2012_devkit_t12"):
            list_source(flat, "val", ListOptions(labels, devkit=tmp_path / name), CLASSES3)


def test_a_part_of_ilsvrcs_images_finds_its_lines_by_number(tmp_path: Path) -> None:
    """There are three images and a ground truth of six lines. An image with the number k in its name has line k."""
    root = touch(tmp_path / "val", *(f"ILSVRC2012_val_{k:08d}.JPEG" for k in (2, 4, 6)))
    labels = label_file(tmp_path, "1\n2\n1\n3\n1\n1\n")
    assert labels_of(list_labelled(root, labels, "sorted", CLASSES3)) == [1, 2, 0]
    with pytest.raises(UserError, match=r"2 lines for 3 images .*val_00000002\.JPEG to ILSVRC2012_val_00000006"):
        list_labelled(root, label_file(tmp_path, "1\n2\n"), "sorted", CLASSES3)


def test_classes_alone_on_each_line_are_names(flat: Path, tmp_path: Path) -> None:
    """TensorFlow's imagenet_2012_validation_synset_labels.txt has one synset on each line."""
    source = list_labelled(flat, label_file(tmp_path, "n3\nn1\nn2\nn1\n"), None, CLASSES3)
    assert paths_and_labels(source) == list(zip(SORTED_NAMES, [2, 0, 1, 0], strict=True))
    synsets = label_file(tmp_path, "n01440764\nn01443537\nn01440764\nn01443537\n")
    assert labels_of(list_labelled(flat, synsets)) == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"each line has only a label, such as b=1, a=0.*--classes FILE"):
        list_labelled(flat, label_file(tmp_path, "b=1\na=0\nc=1\nB=1\n"))


# Names and labels


def test_labels_may_be_numbers_from_0(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG 2\nB.JPEG 0\nc.JPEG\t1\n\nval/b.JPEG 2\nnot_there.JPEG 1\n")
    source = list_labelled(flat, labels)
    assert paths_and_labels(source) == list(zip(SORTED_NAMES, [0, 2, 2, 1], strict=True))
    assert source.classes == ("0", "1", "2")
    assert list_labelled(flat, labels, None, ("x", "y", "z", "w")).classes == ("x", "y", "z", "w")


def test_labels_may_be_class_names(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG dog\nB.JPEG cat\nc.JPEG cat\nb.JPEG ape\n")
    source = list_labelled(flat, labels)
    assert source.classes == ("ape", "cat", "dog")
    assert paths_and_labels(source) == list(zip(SORTED_NAMES, [1, 2, 0, 1], strict=True))
    store_classes = ("dog", "eel", "cat", "ape")  # a label is a position in this tuple
    assert labels_of(list_labelled(flat, labels, None, store_classes)) == [2, 0, 3, 2]
    order = label_file(tmp_path, "dog\ncat\nape\n", "classes.txt")
    source = list_source(flat, "train", ListOptions(labels, class_file=order))
    assert (source.classes, labels_of(source)) == (("dog", "cat", "ape"), [1, 0, 2, 1])


def test_what_was_read_is_told_with_an_example(flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a.JPEG dog\nB.JPEG cat\nc.JPEG cat\nb.JPEG ape\na.JPEG dog\ngone.JPEG eel\n"
    list_labelled(flat, label_file(tmp_path, text), None, ("ape", "cat", "dog", "eel"))
    said = capsys.readouterr().err
    assert "1 line repeated with the same label: a.JPEG" in said
    assert "1 line without an image: gone.JPEG" in said
    assert "read as names of classes; B.JPEG is class cat, label 1" in said
    assert "1 class without a photograph: eel" in said


def test_a_class_without_a_photograph_is_refused_unless_it_is_allowed(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG dog\nB.JPEG cat\nc.JPEG cat\nb.JPEG ape\ngone.JPEG eel\n")
    with pytest.raises(UserError, match=r"1 class has no photograph: eel.*--allow-empty-classes"):
        list_source(flat, "train", ListOptions(labels))
    source = list_source(flat, "train", ListOptions(labels, allow_empty_classes=True))
    assert source.classes == ("ape", "cat", "dog", "eel")


@pytest.mark.parametrize(
    ("text", "store_classes", "parts"),
    [
        ("a.JPEG 0\nb.JPEG 1\nc.JPEG 0\n", (), ["1 of 4", "B.JPEG"]),
        ("a.JPEG 0\nb.JPEG 1\nc.JPEG 0\nB.JPEG 1\na.JPEG 1\n", (), ["line 5", "a.JPEG", "two labels", "0", "1"]),
        ("a.JPEG 0\nb.JPEG\nc.JPEG 0\nB.JPEG 1\n", (), ["line 2", "b.JPEG"]),
        ("a.JPEG 0\nb.JPEG 3\nc.JPEG 0\nB.JPEG 1\n", ("x", "y"), ["number 3", "2 classes"]),
        ("a.JPEG x\nb.JPEG z\nc.JPEG x\nB.JPEG y\n", ("x", "y"), ["z", "2 classes"]),
        ("1\n2\n1\n", (), ["3 lines", "4 images"]),
        ("1\n2\n1\n1\n1\n", (), ["5 lines", "4 images"]),
        ("1\n2\n0\n1\n", (), ["number 0", "begin with 1"]),
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
    order = None if " " in text.split("\n")[0] else "sorted"
    with pytest.raises(UserError) as caught:
        list_labelled(flat, label_file(tmp_path, text), order, store_classes)
    for part in ["labels.txt", *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_missing_label_file_is_named(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        list_labelled(flat, tmp_path / "nowhere.txt")


BESIDE = ["photos.txt", "photos.csv", "ILSVRC2012_validation_ground_truth.txt", "val_ground_truth.txt"]


@pytest.mark.parametrize("name", [*BESIDE, "photos/labels.csv", "LOC_val_solution.csv"])
def test_the_label_file_next_to_the_folder_is_found(flat: Path, tmp_path: Path, name: str) -> None:
    label_file(tmp_path, "2\n1\n2\n1\n", name)
    source = list_labelled(flat, None, "sorted")
    assert (labels_of(source), source.labels_from) == ([1, 0, 1, 0], tmp_path / name)


def test_kaggles_label_file_is_found_beside_the_folder_ilsvrc(tmp_path: Path) -> None:
    root = touch(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val", "a.JPEG", "b.JPEG")
    label_file(tmp_path, "ImageId,PredictionString\nb,n1 1 2 3 4\na,n2 1 2 3 4 \n", "LOC_val_solution.csv")
    assert labels_of(list_labelled(root, None, None, ("n1", "n2"))) == [1, 0]


def test_the_label_file_next_to_the_current_folder_is_found(
    flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_file(tmp_path, "2\n1\n2\n1\n", "val_ground_truth.txt")
    monkeypatch.chdir(flat)
    assert labels_of(list_labelled(Path("."), None, "sorted")) == [1, 0, 1, 0]


def test_none_or_two_label_files_next_to_the_folder_are_refused(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no label file"):
        list_labelled(flat)
    label_file(tmp_path, "2\n1\n2\n1\n", "photos.txt")
    label_file(tmp_path, "2\n1\n2\n1\n", "my_ground_truth.txt")
    with pytest.raises(UserError, match="2 files look like label files"):
        list_labelled(flat)


@pytest.mark.parametrize(
    ("text", "store_classes", "parts"),
    [
        ("a.JPEG 0\nb.JPEG -1\nc.JPEG 0\nB.JPEG 1\n", (), ["-1", "from 0"]),
        ("a.JPEG 0\nb.JPEG -1\nc.JPEG 0\nB.JPEG 1\n", ("x", "y"), ["-1", "from 0"]),
        ("a.JPEG x\nb.JPEG -1\nc.JPEG x\nB.JPEG y\n", (), ["-1"]),
        ("a.JPEG 0\nb.JPEG 99999999999\nc.JPEG 0\nB.JPEG 1\n", (), []),
        ("a.JPEG 0\nb.JPEG 2000000000\nc.JPEG 0\nB.JPEG 1\n", (), []),
        (f"a.JPEG 0\nb.JPEG {'9' * 5000}\nc.JPEG 0\nB.JPEG 1\n", (), []),
        (f"a.JPEG 0\nb.JPEG {'9' * 5000}\nc.JPEG 0\nB.JPEG 1\n", ("x", "y"), ["whole number"]),
        ("-1\n1\n2\n1\n", (), ["line 1", "'-1'", "not negative"]),
        ("1\n3000000000\n2\n1\n", (), []),
        (f"1\n{'9' * 5000}\n2\n1\n", (), []),
        ("1\n1.5\n2\n1\n", (), ["line 2", "'1.5'"]),
        ("1\n²\n2\n1\n", (), ["line 2", "'²'"]),
    ],
)
def test_labels_that_cannot_be_classes_are_refused(
    flat: Path, tmp_path: Path, text: str, store_classes: tuple[str, ...], parts: list[str]
) -> None:
    """A huge label must be refused before the program makes a list with a class name for every smaller label."""
    test_labels_that_do_not_fit_are_one_line_with_the_fault(flat, tmp_path, text, store_classes, parts)


def test_a_class_of_the_store_may_be_named_minus_one(flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.JPEG -1\nb.JPEG x\nc.JPEG x\nB.JPEG -1\n")
    assert labels_of(list_labelled(flat, labels, None, ("-1", "x"))) == [0, 0, 1, 1]


def test_a_label_file_may_have_windows_line_ends(flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(b"a.JPEG 2\r\nB.JPEG 0\r\n\r\nc.JPEG 1\r\nval\\x 1\r\nb.JPEG 2")
    assert paths_and_labels(list_labelled(flat, path)) == list(zip(SORTED_NAMES, [0, 2, 2, 1], strict=True))
    for line_end in (b"\r\n", b"\r"):
        path.write_bytes(line_end.join([b"3", b"1", b"2", b"1", b""]))
        assert labels_of(list_labelled(flat, path, "sorted")) == [2, 0, 1, 0]


def test_a_label_file_may_hold_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    """File names and names in a label file are compared as bytes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"\xff.JPEG", b"b.JPEG"):
        open(os.fsencode(folder) + b"/" + name, "wb").close()
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xff.JPEG 1\nb.JPEG 0\n")
    assert paths_and_labels(list_labelled(folder, path)) == [(b"b.JPEG", 0), (b"\xff.JPEG", 1)]


def test_binary_files_are_refused_as_labels(flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    rng = np.random.default_rng(1)
    for content in (b"\0" * 100, "a.JPEG 1\nb.JPEG 0\n".encode("utf-16"), *(rng.bytes(3000) for _ in range(20))):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            list_labelled(flat, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_labels_of_a_tar_are_found_next_to_it_or_in_the_devkit(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (3, 1, 2):
            tar.addfile(tarfile.TarInfo(f"ILSVRC2012_val_{number:08d}.JPEG"))
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    label_file(data, "2\n1\n2\n", "ILSVRC2012_validation_ground_truth.txt")
    write_devkit(data / "meta.mat", {1: "n5", 2: "n3"})
    source = list_labelled(tmp_path / "ILSVRC2012_img_val.tar")
    assert (labels_of(source), source.classes) == ([0, 1, 0], ("n3", "n5"))
    label_file(tmp_path, "1\n1\n1\n", "ILSVRC2012_img_val.txt")
    with pytest.raises(UserError, match="2 files look like label files"):
        list_labelled(tmp_path / "ILSVRC2012_img_val.tar")


def test_the_same_name_in_two_folders_of_the_label_file_is_refused(flat: Path, tmp_path: Path) -> None:
    """The folders in a label file are ignored. Therefore x/a.JPEG and y/a.JPEG give the image a.JPEG two labels."""
    text = "x/a.JPEG 1\ny/a.JPEG 2\nb.JPEG 0\nc.JPEG 0\nB.JPEG 0\n"
    with pytest.raises(UserError, match=r"line 2: a\.JPEG has two labels, 1 \(line 1\) and 2"):
        list_labelled(flat, label_file(tmp_path, text))
