"""Formats of label files: the same four labels in many formats, headers, swapped columns, and Kaggle's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from prep.console import UserError
from tests.helpers.listings import label_file, list_labelled, paths_and_labels, touch

IMAGES = ("a, b.jpg", "cat 1.jpg", "d.JPEG", "x.tar.png")
CLASSES = ("ape", "big cat", "dog")
EXPECTED = [(b"a, b.jpg", 2), (b"cat 1.jpg", 1), (b"d.JPEG", 0), (b"x.tar.png", 1)]

FORMATS = {
    "blanks": "d.JPEG ape\nx.tar.png   big cat\na, b.jpg\tdog\ncat 1.jpg big cat\n",
    "tabs": "d.JPEG\tape\nx.tar.png\tbig cat\na, b.jpg\tdog\ncat 1.jpg\tbig cat\n",
    "commas": 'd.JPEG,ape\nx.tar.png, big cat\n"a, b.jpg",dog\ncat 1.jpg,"big cat"\n',
    "semicolons": "d.JPEG;ape\nx.tar.png;big cat\na, b.jpg;dog\ncat 1.jpg;big cat\n",
    "quoted, blanks": '"d.JPEG" ape\n"x.tar.png" "big cat"\n"a, b.jpg" "dog"\n"cat 1.jpg" "big cat"\n',
    "quoted, commas": '"d.JPEG","ape"\n"x.tar.png","big cat"\n"a, b.jpg","dog"\n"cat 1.jpg","big cat"\n',
    "no extension": "d\tape\nx.tar\tbig cat\na, b\tdog\ncat 1\tbig cat\n",
    "no extension, blanks": "d ape\nx.tar big cat\na, b dog\ncat 1 big cat\n",
    "folders": "val/d.JPEG ape\n./x.tar.png big cat\n/data/my val/a, b.jpg dog\nval/cat 1.jpg big cat\n",
    "folders of Windows": 'v\\d.JPEG,ape\nC:\\x.tar.png,big cat\nv\\cat 1.jpg,big cat\n"v\\a, b.jpg",dog\n',
    "bars": "d.JPEG|ape\nx.tar.png|big cat\na, b.jpg|dog\ncat 1.jpg | big cat\n",
    "empty columns": 'd.JPEG,,ape,\nx.tar.png,,big cat,\n"a, b.jpg",,dog,\ncat 1.jpg,,big cat,\n',
    "byte order mark": "\ufeffd.JPEG\tape\nx.tar.png\tbig cat\na, b.jpg\tdog\ncat 1.jpg\tbig cat\n",
    "three columns": 'no,label,filename\n7,ape,d.JPEG\n8,big cat,x.tar.png\n9,dog,"a, b.jpg"\n3,big cat,cat 1.jpg\n',
}

HEADERS = {
    "blanks": "filename label",
    "tabs": "Image\tClass",
    "commas": "file_name,category",
    "semicolons": "name;target",
    "quoted, commas": '"image_id","label"',
    "no extension": "id\tbreed",
    "no extension, blanks": "filename kind",
    "folders": "Foo Bar",
}


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return touch(tmp_path / "photos", *IMAGES)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_labels_in_all_formats(format: str, flat: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, FORMATS[format])
    source = list_labelled(flat, labels)
    assert (source.classes, paths_and_labels(source)) == (CLASSES, EXPECTED)
    with_store = list_labelled(flat, labels, None, ("dog", "ape", "big cat"))
    assert [label for _, label in paths_and_labels(with_store)] == [0, 2, 1, 2]


@pytest.mark.parametrize("format", HEADERS)
def test_a_header_is_recognized_and_told(
    format: str, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = list_labelled(flat, label_file(tmp_path, HEADERS[format] + "\n" + FORMATS[format]))
    assert (source.classes, paths_and_labels(source)) == (CLASSES, EXPECTED)
    assert "line 1 is taken as a header" in capsys.readouterr().err


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
@pytest.mark.parametrize("header", ["filename label", "image class_id", "photo kind", "#name number"])
def test_numbers_after_a_header_stay_numbers(separator: str, header: str, tmp_path: Path) -> None:
    """The twelve images have the labels 0 to 11. If the labels were sorted as text, 10 and 11 would come before 2."""
    root = touch(tmp_path / "photos", *(f"{k:02d}.jpg" for k in range(12)))
    rows = [header.replace(" ", separator), *(f"{k:02d}.jpg{separator}{k}" for k in range(12))]
    source = list_labelled(root, label_file(tmp_path, "\n".join(rows)))
    assert source.classes == tuple(str(k) for k in range(12))
    assert paths_and_labels(source) == [(f"{k:02d}.jpg".encode(), k) for k in range(12)]


def test_a_first_line_for_a_missing_image_is_no_header(flat: Path, tmp_path: Path) -> None:
    """The first line is `gone.jpg eel`. Although gone.jpg does not exist, the line must not be taken for a header."""
    with pytest.raises(UserError, match="eel"):
        list_labelled(flat, label_file(tmp_path, "gone.jpg\teel\n" + FORMATS["tabs"]), None, CLASSES)


def test_a_header_of_numbers_alone_is_recognized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(tmp_path / "photos", "a.jpg", "b.jpg")
    source = list_labelled(root, label_file(tmp_path, "label\n2\n1\n"), "sorted")
    assert paths_and_labels(source) == [(b"a.jpg", 1), (b"b.jpg", 0)]
    assert "line 1 is taken as a header: label" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{1} {0}", "{1},{0}", "{1}\t{0}", '"{1}","{0}"'])
@pytest.mark.parametrize("classes", [("ape", "cat", "dog"), ("0", "1", "2"), ("n01", "n02", "n03")])
def test_the_label_before_the_name_is_refused(text: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", *(f"{k}.jpg" for k in range(6)))
    rows = [text.format(f"{k}.jpg", classes[k % 3]) for k in range(6)]
    for lines in (rows, [text.format("number", "kind"), *rows]):
        for store_classes in ((), classes):
            with pytest.raises(UserError, match=r"label stands before the name.*exchange the two columns"):
                list_labelled(root, label_file(tmp_path, "\n".join(lines)), None, store_classes)


def test_a_header_may_put_the_label_before_the_name(tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", "a.jpg", "b.jpg")
    source = list_labelled(root, label_file(tmp_path, "label,filename\ndog,a.jpg\ncat,b.jpg\n"))
    assert (source.classes, paths_and_labels(source)) == (("cat", "dog"), [(b"a.jpg", 1), (b"b.jpg", 0)])


KAGGLE = (
    "ImageId,PredictionString\n"
    "ILSVRC2012_val_00000002,n01440764 85 1 499 272 \n"
    "ILSVRC2012_val_00000003,n01440764 1 1 499 272 n01440764 30 40 50 60 \n"
    "ILSVRC2012_val_00000001,n01443537 1 1 9 9 n01443537 2 2 8 8 \n"
)


def test_kaggles_solution_gives_the_class_without_boxes(tmp_path: Path) -> None:
    root = touch(tmp_path / "val", *(f"ILSVRC2012_val_{k:08d}.JPEG" for k in (1, 2, 3)))
    labels = label_file(tmp_path, KAGGLE, "LOC_val_solution.csv")
    for store_classes in ((), ("n01440764", "n01443537")):
        source = list_labelled(root, labels, None, store_classes)
        assert source.classes == ("n01440764", "n01443537")
        assert [label for _, label in paths_and_labels(source)] == [1, 0, 0]
    labels.write_text(KAGGLE.replace("n01443537 2 2 8 8", "n01440764 2 2 8 8"))
    with pytest.raises(UserError, match=r"line 4: ILSVRC2012_val_00000001 has the classes n01440764, n01443537"):
        list_labelled(root, labels)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("d.JPEG ape\nx.tar.png dog\ne.jpg dog\n", ["2 of 4 images", "a, b.jpg", "cat 1.jpg", "e.jpg"]),
        ("q.jpg ape\nr.jpg dog\n", ["no line names an image", "q.jpg", "r.jpg", "a, b.jpg"]),
        ("d.JPEG\nx.tar.png\na, b.jpg\ncat 1.jpg\n", ["labels.txt"]),
        ("d.JPEG\nx.tar.png\nd.JPEG\nx.tar.png\n", ["names of images without labels", "name label"]),
        ("d.JPEG,1,2\nx.tar.png,1,3\n", ["3 columns", "header"]),
        ("d.JPEG 3 0.98\nx.tar.png 2 0.7\ncat 1.jpg 1 1\na, b.jpg 1 1\n", ["'3 0.98'", "without further columns"]),
        ("d.JPEG,ape\nx.tar.png,\ncat 1.jpg,ape\n", ["line 2", "x.tar.png", "has no label"]),
        ("d.JPEG ape\nx.tar.png dog\nd dog\n", ["line 3", "d.JPEG has two labels, ape (line 1) and dog"]),
    ],
)
def test_what_is_wrong_is_told_with_examples(text: str, parts: list[str], flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        list_labelled(flat, label_file(tmp_path, text))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stem_that_two_images_share_needs_its_extension(tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", "a.jpg", "a.png", "b.jpg")
    assert len(list_labelled(root, label_file(tmp_path, "a.jpg x\na.png y\nb x\n")).inputs) == 3
    with pytest.raises(UserError, match=r"no label for 2 of 3 images: a\.jpg, a\.png"):
        list_labelled(root, label_file(tmp_path, "a x\nb x\n"))


def test_an_index_of_the_images_is_no_label_file(tmp_path: Path) -> None:
    """ImageSets/CLS-LOC/val.txt of ILSVRC has the number of each image, not its label: `ILSVRC2012_val_00000001 1`."""
    root = touch(tmp_path / "val", *(f"ILSVRC2012_val_{k:08d}.JPEG" for k in range(1, 101)))
    text = "".join(f"ILSVRC2012_val_{k:08d} {k}\n" for k in range(1, 101))
    with pytest.raises(UserError, match="an index of the images, not a list of labels"):
        list_labelled(root, label_file(tmp_path, text))


def test_a_file_beside_the_photographs_needs_no_label(tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", "a.jpg", "b.jpg", "README.md", "Thumbs.db")
    label_file(root, "a.jpg 1\nb.jpg 0\n")
    source = list_labelled(root, root / "labels.txt")
    assert paths_and_labels(source) == [(b"a.jpg", 1), (b"b.jpg", 0)]
    assert sorted(name for name, _ in source.ignored) == ["README.md", "Thumbs.db", "labels.txt"]
