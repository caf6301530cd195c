"""Sources whose labels could be misread. Each source is refused, or is read in the only right way."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy.io import savemat

from prep.console import UserError
from prep.inputs.classes import read_class_file
from prep.inputs.reader import ListOptions
from prep.inputs.sources import find_splits, list_source
from tests.helpers.listings import label_file, list_labelled, paths_and_labels, touch, write_devkit

ABC = ("a.jpg", "b.jpg", "c.jpg")
CAT_DOG = [(b"a.jpg", 0), (b"b.jpg", 1), (b"c.jpg", 0)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return touch(tmp_path / "photos", *ABC)


@pytest.mark.parametrize(
    "text",
    [
        "# my labels of today\na.jpg cat\nb.jpg dog\nc.jpg cat\n",
        "a.jpg cat\n# and now the dogs\nb.jpg dog\nc.jpg cat\n",
        "# made by me\nfilename,label\na.jpg,cat\n#, dogs\nb.jpg,dog\nc.jpg,cat\n",
        "a.JPEG cat\nb.JPG dog\nc.jpeg cat\n",
        "val/a.jpg cat\ntrain/a.jpg dog\nval/b.jpg dog\nval/c.jpg cat\ntrain/c.jpg eel\n",
    ],
)
def test_comments_other_extensions_and_lines_of_another_split_are_understood(
    text: str, photos: Path, tmp_path: Path
) -> None:
    source = list_labelled(photos, label_file(tmp_path, text))
    assert (source.classes, paths_and_labels(source)) == (("cat", "dog"), CAT_DOG)


def test_letters_with_accents_are_found_in_another_unicode_form(tmp_path: Path) -> None:
    """A Mac stores the ä of a file name as two characters, and other systems store the ä as one character."""
    root = touch(tmp_path / "photos", "Ka\u0308fer.jpg", "b.jpg")
    source = list_labelled(root, label_file(tmp_path, "K\u00e4fer.jpg cat\nb.jpg dog\n"))
    assert dict(paths_and_labels(source)) == {"Ka\u0308fer.jpg".encode(): 0, b"b.jpg": 1}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a.jpg 0\nb.jpg nan\nc.jpg 1\n", r"label nan, which means that there is no label.*Line 2"),
        ("a.jpg 0\nb.jpg dog\nc.jpg 1\n", r"label dog is not a number, but other labels are.*such as 0.*--classes"),
        ("a.jpg 0.0e+00\nb.jpg 1.0e+00\nc.jpg 1.0e+01\n", r"label 0\.0e\+00, expected .* a whole number"),
        ("a.jpg +1\nb.jpg +2\nc.jpg +10\n", r"label \+1, expected .* a whole number"),
        ("a.jpg b.jpg\nb.jpg c.jpg\nc.jpg a.jpg\n", r"line 1: a\.jpg, b\.jpg: two names of images"),
        ("Datei;Klasse\na;Katze\nb;Hund\nc;Katze\n", r"line 1: no image is called Datei, .* label Klasse"),
        ("train/a.jpg cat\ntrain/b.jpg dog\ntrain/c.jpg cat\n", r"another split \(train/a\.jpg\), expected .*val"),
    ],
)
@pytest.mark.parametrize("allow", [False, True])
def test_labels_that_are_no_labels_are_refused(text: str, part: str, allow: bool, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        list_source(photos, "val", ListOptions(label_file(tmp_path, text), allow_empty_classes=allow))


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg cat dog\nb.jpg cat\nc.jpg dog\n",
        "a.jpg cat dog\nb.jpg bird\nc.jpg bird\n",
        "a.jpg cat old\nb.jpg cat old\nc.jpg cat\n",
        "a.jpg wild cat\nb.jpg cat\nc.jpg grey wolf\n",
        "a.jpg cat train\nb.jpg dog train\nc.jpg cat val\n",
        "a.jpg cat 0.93\nb.jpg dog 1e-3\nc.jpg cat 1\n",
        "a.jpg\tcat dog\nb.jpg cat\nc.jpg dog\n",
        "filename label\na.jpg cat dog\nb.jpg cat\nc.jpg dog\n",
        '"a.jpg" cat dog\nb.jpg "cat"\nc.jpg dog\n',
    ],
)
def test_a_third_word_may_be_a_further_column(text: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line \d: '(cat|wild) \S+' follows the name a\.jpg.*quotes .*tabs or commas"):
        list_labelled(photos, label_file(tmp_path, text))


def test_words_that_follow_every_class_are_a_further_column(tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", *(f"{k}.jpg" for k in range(4)))
    text = "0.jpg cat True\n1.jpg cat False\n2.jpg dog True\n3.jpg dog False\n"
    with pytest.raises(UserError, match=r"'cat True' follows the name 0\.jpg"):
        list_labelled(root, label_file(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ('a.jpg "cat dog"\nb.jpg cat\nc.jpg dog\n', ("cat", "cat dog", "dog")),
        ("a.jpg,cat dog\nb.jpg,cat\nc.jpg,dog\n", ("cat", "cat dog", "dog")),
        ("a.jpg\tcat dog\nb.jpg\tcat\nc.jpg\tdog\n", ("cat", "cat dog", "dog")),
        ("a.jpg grey wolf\nb.jpg grey wolf\nc.jpg dog\n", ("dog", "grey wolf")),
        ("a.jpg wild cat\nb.jpg wild cat\nc.jpg cat\n", ("cat", "wild cat")),
        ("a.jpg golden retriever\nb.jpg golden eagle\nc.jpg tabby cat\n", None),
        ("a.jpg class 1\nb.jpg class 2\nc.jpg class 1\n", ("class 1", "class 2")),
    ],
)
def test_classes_of_several_words_are_read(
    text: str, classes: tuple[str, ...] | None, photos: Path, tmp_path: Path
) -> None:
    classes = classes or ("golden eagle", "golden retriever", "tabby cat")
    assert list_labelled(photos, label_file(tmp_path, text)).classes == classes


def test_a_class_of_the_store_may_have_several_words(photos: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.jpg cat dog\nb.jpg cat\nc.jpg dog\n")
    assert [k for _, k in paths_and_labels(list_labelled(photos, labels, None, ("dog", "cat dog", "cat")))] == [1, 2, 0]
    with pytest.raises(UserError, match=r"1 label \(cat dog\) is not among the 2 classes"):
        list_labelled(photos, labels, None, ("cat", "dog"))


def test_numbers_and_words_together_are_names_if_the_user_says_so(photos: Path, tmp_path: Path) -> None:
    labels = label_file(tmp_path, "a.jpg 0\nb.jpg dog\nc.jpg 0\n")
    assert list_labelled(photos, labels, "name").classes == ("0", "dog")


def test_a_class_of_the_store_without_a_photograph_is_refused(tmp_path: Path) -> None:
    """The labels count from 1, but the store has the classes 0 to 2. Only the empty class 0 shows the mistake."""
    root = touch(tmp_path / "photos", "a.jpg", "b.jpg")
    labels = label_file(tmp_path, "a.jpg 1\nb.jpg 2\n")
    with pytest.raises(UserError, match=r"1 class has no photograph: 0\..*--allow-empty-classes"):
        list_source(root, "val", ListOptions(labels), ("0", "1", "2"))


@pytest.mark.parametrize(
    ("name", "file", "part"),
    [
        ("{}.jpg", "numbers.txt", r"order of the images is ambiguous: 10\.jpg comes before 2\.jpg as text"),
        ("ILSVRC2012_test_{:08d}.JPEG", "ILSVRC2012_validation_ground_truth.txt", "has test images"),
        ("ILSVRC2010_val_{:08d}.JPEG", "numbers.txt", "those of ILSVRC2010, but the devkit is that of"),
        ("ILSVRC2012_val_{:08d}.JPEG", "ILSVRC2010_validation_ground_truth.txt", "those of ILSVRC2010"),
    ],
)
def test_ground_truth_of_other_images_is_refused(name: str, file: str, part: str, tmp_path: Path) -> None:
    root = touch(tmp_path / "photos", *(name.format(k) for k in range(1, 12)))
    write_devkit(tmp_path / "meta.mat", {1: "n2", 2: "n1"})
    with pytest.raises(UserError, match=part):
        list_labelled(root, label_file(tmp_path, "1\n2\n" * 5 + "1\n", file))


def test_a_devkit_in_which_a_synset_occurs_twice_is_refused(photos: Path, tmp_path: Path) -> None:
    write_devkit(tmp_path / "meta.mat", {1: "n1", 2: "n1", 3: "n2"})
    with pytest.raises(UserError, match=r"meta\.mat is not the devkit's meta\.mat \(.* twice\)"):
        list_labelled(photos, label_file(tmp_path, "1\n2\n3\n"))
    savemat(tmp_path / "meta.mat", {"other": 1})
    with pytest.raises(UserError, match=r"meta\.mat is not the devkit's meta\.mat"):
        list_labelled(photos, label_file(tmp_path, "1\n2\n3\n"))


@pytest.mark.parametrize("text", ["# the order\ndog\ncat\n", "class\ndog\ncat\n", "\ufeffdog\r\ncat\r\n"])
def test_comments_and_headers_of_class_files_are_no_classes(text: str, tmp_path: Path) -> None:
    assert read_class_file(label_file(tmp_path, text), {"cat", "dog"}) == ("dog", "cat")


@pytest.mark.parametrize("text", ["dog, cat\n", "dog cat\n", "dog;cat\n"])
def test_several_classes_on_a_line_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a line names several classes, dog and cat"):
        read_class_file(label_file(tmp_path, text), {"cat", "dog"})
    assert read_class_file(label_file(tmp_path, "dog dog\ncat 1\n"), {"cat", "dog", "1"}) == ("dog", "cat")


CSV_FILES = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("cat/1.jpg,person,640,cat\ndog/1.jpg,person,640,dog\n", "4 columns without a header"),
        ("cat/1.jpg,dog/1.jpg\ndog/1.jpg,cat/1.jpg\n", r"two paths in each row, such as cat/1\.jpg, dog/1\.jpg"),
        ("cat/1.jpg,0\ndog/1.jpg,nan\n", "label nan"),
        ("cat/1.jpg,cat\ndog/9.jpg,dog\n", r"1 class has no photograph: dog\. "),
    ],
)
def test_a_list_of_paths_that_is_not_clear_is_refused(text: str, part: str, tmp_path: Path) -> None:
    touch(tmp_path, *CSV_FILES)
    with pytest.raises(UserError, match=part):
        list_source(label_file(tmp_path, text, "list.csv"), "train")


def test_rows_of_no_split_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, *CSV_FILES)
    text = "#path,label,split\n# the cats\ncat/1.jpg,cat,train\ndog/1.jpg,dog,train\ncat/2.jpg,cat,trian\n"
    splits = find_splits(label_file(tmp_path, text, "list.csv"), None)
    assert paths_and_labels(list_source(splits["train"], "train")) == [(b"cat/1.jpg", 0), (b"dog/1.jpg", 1)]
    assert "left out 1 row outside train and val (column split: trian)" in capsys.readouterr().err


def tiny(root: Path, annotations: str, *images: str) -> Path:
    """Write a folder val like that of Tiny ImageNet, and return `root`."""
    touch(root / "images", *images)
    label_file(root, annotations, "val_annotations.txt")
    return root


def test_numbers_in_tiny_imagenet_are_names_of_classes(tmp_path: Path) -> None:
    root = tiny(tmp_path / "val", "\ufeffa.JPEG\t1\t0\nb.JPEG\t2\t0\nz.JPEG\t2\t0\n", "a.JPEG", "b.JPEG", "notes.txt")
    source = list_source(root, "val", ListOptions(allow_empty_classes=True), ("1", "2", "3"))
    assert paths_and_labels(source) == [(b"a.JPEG", 0), (b"b.JPEG", 1)]
    assert [name for name, _ in source.ignored] == ["notes.txt"]


def test_two_labels_of_an_image_of_tiny_imagenet_are_refused(tmp_path: Path) -> None:
    root = tiny(tmp_path / "val", "a.JPEG\tn1\nb.JPEG\tn2\na.JPEG\tn2\n", "a.JPEG", "b.JPEG")
    with pytest.raises(UserError, match=r"line 3: a\.JPEG has two labels, n1 and n2"):
        list_source(root, "val")
