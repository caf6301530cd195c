"""prep.inputs.classes: folders that are classes, the order of the classes, nested class folders, and other files.

Most images are empty files, since the listing opens no file. The expected classes and labels are written by hand.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from prep.console import UserError
from prep.inputs.classes import NO_CLASS, STRAY_FILE, SYSTEM_FILE, order_classes, read_class_file
from prep.inputs.reader import ListOptions
from prep.inputs.sources import list_source
from tests.helpers.listings import list_images, paths_and_labels, touch
from tests.helpers.tars import tar_of


def test_an_empty_class_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n3/c.JPEG")
    (root / "n2").mkdir()
    with pytest.raises(UserError, match=r"1 class has no photograph: n2\..*--allow-empty-classes"):
        list_images(root)
    source = list_source(root, "train", ListOptions(allow_empty_classes=True))
    assert source.classes == ("n1", "n2", "n3")
    assert dict(paths_and_labels(source)) == {b"n1/a.JPEG": 0, b"n3/c.JPEG": 2}


NO_CLASSES = (
    "lost+found",
    "@eaDir",
    "__MACOSX",
    "__pycache__",
    ".ipynb_checkpoints",
    ".git",
    "#recycle",
    "$RECYCLE.BIN",
)


@pytest.mark.parametrize("name", [*NO_CLASSES, "System Volume Information", "LOST+FOUND", "FOUND.000", "@Recycle"])
@pytest.mark.parametrize("content", ["", "x.jpg", "n1/a.JPEG"])
def test_folders_that_are_no_classes_are_left_out_and_named(name: str, content: str, tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "a/1.jpg", "zebra/2.jpg", f"a/{name}/1.jpg")
    touch(root / name, content) if content else (root / name).mkdir()
    source = list_images(root)
    assert paths_and_labels(source) == [(b"a/1.jpg", 0), (b"zebra/2.jpg", 1)]
    assert source.classes == ("a", "zebra") and source.refused == ()
    assert sorted(source.ignored) == sorted((where, NO_CLASS) for where in (name, f"a/{name}"))


@pytest.mark.parametrize("name", ["$100 bill", "@home", "recycled", "__init__", "lost", "found", "trash", "macosx"])
def test_odd_names_of_classes_are_classes(name: str, tmp_path: Path) -> None:
    assert list_images(touch(tmp_path / "t", f"{name}/1.jpg", "zebra/2.jpg")).classes == tuple(sorted([name, "zebra"]))


def test_files_of_the_system_are_left_out_and_named(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "a/1.jpg", "a/Thumbs.db", "a/desktop.ini", "a/.DS_Store", "a/notes.txt", "Thumbs.db")
    source = list_images(root)
    # notes.txt is listed. Only the build finds that it is not an image.
    assert paths_and_labels(source) == [(b"a/1.jpg", 0), (b"a/notes.txt", 0)]
    assert dict(source.ignored) == dict.fromkeys(("a/Thumbs.db", "a/desktop.ini", "Thumbs.db"), SYSTEM_FILE)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["0", "1", "2", "10", "100"], ["0", "1", "2", "10", "100"]),
        (["1", "2", "9", "10", "11"], ["1", "2", "9", "10", "11"]),
        (["007", "01", "2"], ["01", "2", "007"]),
        (["2", "1", "other"], ["1", "2", "other"]),  # 1 and 2 have the same order as numbers and as text
        (["n2", "n10", "N3"], ["N3", "n10", "n2"]),
        (["a/2", "a/10", "b/x"], ["a/2", "a/10", "b/x"]),
    ],
)
def test_classes_that_are_numbers_are_sorted_as_numbers(names: list[str], classes: list[str], tmp_path: Path) -> None:
    source = list_images(touch(tmp_path / "t", *(f"{name}/x.jpg" for name in names)))
    assert source.classes == tuple(classes)
    assert {item.path.decode(): item.label for item in source.inputs} == {
        f"{name}/x.jpg": label for label, name in enumerate(classes)
    }


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["1", "10", "2", "other"], ["10", "2", "other", "ambiguous", "--classes FILE"]),
        (["1", "01", "2"], ["01", "1", "same number", "--classes FILE"]),
    ],
)
def test_an_ambiguous_order_of_numbers_is_refused(names: list[str], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        list_images(touch(tmp_path / "t", *(f"{name}/x.jpg" for name in names)))
    assert all(part in str(caught.value) for part in parts)


def test_class_folders_may_be_nested(tmp_path: Path) -> None:
    """Places365 has a folder for each letter. Below these folders, class folders have different depths."""
    names = ["a/airfield/1.jpg", "a/apartment_building/outdoor/1.jpg", "a/apartment/2.jpg", "b/bar/3.jpg"]
    root = touch(tmp_path / "t", *names, "a/README.md", "categories.txt", "b/__MACOSX/x.jpg")
    source = list_images(root)
    assert source.classes == ("a/airfield", "a/apartment", "a/apartment_building/outdoor", "b/bar")
    assert {path.decode().rpartition("/")[0]: label for path, label in paths_and_labels(source)} == {
        "a/airfield": 0,
        "a/apartment": 1,
        "a/apartment_building/outdoor": 2,
        "b/bar": 3,
    }
    assert dict(source.ignored) == {"a/README.md": STRAY_FILE, "categories.txt": STRAY_FILE, "b/__MACOSX": NO_CLASS}
    file = tmp_path / "categories_places365.txt"
    file.write_text("/b/bar 0\n/a/airfield 1\n/a/apartment 2\n/a/apartment_building/outdoor 3\n")
    ordered = list_source(root, "train", ListOptions(class_file=file))
    assert ordered.classes == ("b/bar", "a/airfield", "a/apartment", "a/apartment_building/outdoor")
    assert {path: ordered.classes[label] for path, label in paths_and_labels(ordered)} == {
        path: source.classes[label] for path, label in paths_and_labels(source)
    }


def test_a_folder_around_the_class_folders_is_entered(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "deep/er/cat/1.jpg", "deep/er/dog/2.jpg", "deep/README")
    source = list_images(root)
    assert (source.classes, source.reader.root) == (("cat", "dog"), root / "deep" / "er")
    assert paths_and_labels(source) == [(b"cat/1.jpg", 0), (b"dog/2.jpg", 1)]
    assert list_images(touch(tmp_path / "one", "cat/1.jpg")).classes == ("cat",)


def test_a_last_folder_that_all_classes_share_is_no_part_of_their_names(tmp_path: Path) -> None:
    source = list_images(touch(tmp_path / "t", "n1/images/1.jpg", "n2/images/2.jpg", "n1/about.txt"))
    assert source.classes == ("n1", "n2")
    assert paths_and_labels(source) == [(b"n1/images/1.jpg", 0), (b"n2/images/2.jpg", 1)]


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (
            ["cat/train/1.jpg", "cat/val/2.jpg", "dog/train/3.jpg"],
            "class folder cat/train contains the name of a split",
        ),
        (["a/train/cat/1.jpg", "b/train/cat/1.jpg"], "class folder a/train/cat contains the name of a split"),
        (["cat/1.jpg", "copy/cat/1.jpg", "copy/dog/1.jpg"], "photographs in cat, and deeper in copy/cat"),
    ],
)
def test_it_must_be_clear_which_folders_are_classes(names: list[str], part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        list_images(touch(tmp_path / "t", *names))


def test_files_beside_class_folders_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG", "README.txt", "Thumbs.db", "LOC_synset_mapping.txt")
    source = list_images(root)
    assert paths_and_labels(source) == [(b"n1/a.JPEG", 0), (b"n2/a.JPEG", 1)] and source.refused == ()
    assert dict(source.ignored) == {
        "README.txt": STRAY_FILE,
        "LOC_synset_mapping.txt": STRAY_FILE,
        "Thumbs.db": SYSTEM_FILE,
    }
    assert "photograph" not in capsys.readouterr().err
    touch(root, "beside.jpg")
    assert ("beside.jpg", STRAY_FILE) in list_images(root).ignored
    assert "left out 1 photograph beside the class folders (first: beside.jpg)" in capsys.readouterr().err


def test_a_label_file_of_val_does_not_make_train_flat(tmp_path: Path) -> None:
    """--labels is for the photographs of val. One photograph beside the class folders of train is left out."""
    root = touch(tmp_path / "train", "n1/a.JPEG", "n2/b.JPEG", "stray.JPEG")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(root, ".")
    (tmp_path / "labels.txt").write_text("x.jpg n1\n")
    for where in (root, tmp_path / "train.tar"):
        source = list_source(where, "train", ListOptions(tmp_path / "labels.txt"))
        assert paths_and_labels(source) == [(b"n1/a.JPEG", 0), (b"n2/b.JPEG", 1)]
        assert source.ignored == (("stray.JPEG", STRAY_FILE),)


def test_many_photographs_beside_folders_are_refused_without_a_label_file(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", *(f"{k}.jpg" for k in range(11)), "thumbs/0.jpg")
    with pytest.raises(UserError, match=r"1 folder and 11 photographs side by side \(first: 0\.jpg\).*--labels FILE"):
        list_images(root)
    (tmp_path / "labels.txt").write_text("".join(f"{k}.jpg {'ab'[k % 2]}\n" for k in range(11)))
    source = list_source(root, "train", ListOptions(tmp_path / "labels.txt"))
    assert dict(paths_and_labels(source)) == {f"{k}.jpg".encode(): k % 2 for k in range(11)}
    assert source.ignored == (("thumbs", "a folder beside the photographs"),)


@pytest.mark.parametrize(
    ("text", "known", "names"),
    [
        ("n01 tench, Tinca tinca\nn02 goldfish\n", (), ["n01", "n02"]),
        ("cat\r\nmy dog\r\n", ("cat", "my dog"), ["cat", "my dog"]),
        ("\ufeffcat,0\ndog,1\n", (), ["cat", "dog"]),
        ("/a/airfield 0\n/b/bar 1\n", (), ["a/airfield", "b/bar"]),
        ("cat 1300\ndog 900\n", (), ["cat", "dog"]),  # 1300 and 900 are numbers of photographs, not labels
        ('"my dog" 1\ncat 2\n', ("cat", "my dog"), ["my dog", "cat"]),
    ],
)
def test_a_file_of_classes_is_read(text: str, known: tuple[str, ...], names: list[str], tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text, "utf-8")
    assert read_class_file(tmp_path / "classes.txt", known) == tuple(names)


@pytest.mark.parametrize(
    ("text", "part"),
    [("", "is empty"), ("cat\ncat\n", "cat occurs twice"), ("cat 1\ndog 0\n", "line 1: number 1 follows cat")],
)
def test_a_wrong_file_of_classes_is_one_line(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=rf"--classes .*classes\.txt.*{part}"):
        read_class_file(tmp_path / "classes.txt")
    with pytest.raises(UserError, match=r"nowhere\.txt: No such file"):
        read_class_file(tmp_path / "nowhere.txt")


def test_classes_that_look_the_same_are_refused_and_other_cases_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for twins in (("Ka\u0308fer", "K\u00e4fer"), ("cat", "cat\u200b")):
        with pytest.raises(UserError, match=r"the classes '.*' and '.*' look the same"):
            order_classes(twins, "photos")
    assert order_classes(("cat", "Cat"), "photos") == ("Cat", "cat")
    assert "photos: the classes Cat and cat differ only in upper and lower case" in capsys.readouterr().err


def test_accents_in_another_unicode_form_name_the_same_class(tmp_path: Path) -> None:
    root = touch(tmp_path / "val", "Ka\u0308fer/1.jpg", "cat/2.jpg")
    source = list_images(root, ("cat", "K\u00e4fer"), "val")
    assert source.classes == ("cat", "K\u00e4fer")
    assert dict(paths_and_labels(source)) == {"Ka\u0308fer/1.jpg".encode(): 1, b"cat/2.jpg": 0}


# {names of the photographs: names of the classes, which the test gives with --classes or as the classes of the store}
NESTED = {
    ("b/bar/1.jpg", "b/bar/indoor.jpg", "b/bar/indoor/2.jpg", "c/cafe/3.jpg"): ("b/bar", "b/bar/indoor", "c/cafe"),
    ("cat/1.jpg", "cat/old/new/2.jpg", "cat/old/new/deep/3.jpg", "dog/4.jpg"): (
        *("cat", "cat/old/new", "cat/old/new/deep", "dog"),
    ),
    ("cat/1.jpg", "more/dog/2.jpg"): ("cat", "more/dog"),
    ("images/1.jpg", "a/images/2.jpg"): ("a/images", "images"),
}


def _in_folder(root: Path, names: Sequence[str]) -> Path:
    return touch(root, *names)


def _in_tar(root: Path, names: Sequence[str]) -> Path:
    root.with_suffix(".tar").write_bytes(tar_of([(name, b"\xff\xd8\xff") for name in names]))
    return root.with_suffix(".tar")


def _in_zip(root: Path, names: Sequence[str]) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for name in names:
            archive.writestr(name, b"\xff\xd8\xff")
    return root.with_suffix(".zip")


@pytest.mark.parametrize("make", [_in_folder, _in_tar, _in_zip])
@pytest.mark.parametrize("names", NESTED, ids=" ".join)
def test_class_folders_inside_class_folders_are_classes_if_the_classes_are_given(
    make: Callable[[Path, Sequence[str]], Path], names: tuple[str, ...], tmp_path: Path
) -> None:
    """Without the names of the classes, there is an error: `cat/old` can be a class, or a part of the class `cat`."""
    source, classes = make(tmp_path / "x", names), NESTED[names]
    with pytest.raises(UserError, match=r"photographs in .*so it is unclear .*--classes FILE"):
        list_source(source, "train")
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(reversed(classes)))
    expected = {name.encode(): name.rpartition("/")[0] for name in names}
    for options, store_classes in ((ListOptions(class_file=file), ()), (ListOptions(), classes[::-1])):
        listed = list_source(source, "train", options, store_classes)
        assert listed.classes == classes[::-1] and not listed.refused
        assert {item.path: listed.classes[item.label] for item in listed.inputs} == expected
    # If the file names one class, photographs in all other folders are left out.
    file.write_text("\n".join(classes[:1]))
    listed = list_source(source, "train", ListOptions(class_file=file))
    assert {item.path for item in listed.inputs} == {path for path, name in expected.items() if name == classes[0]}
    with pytest.raises(UserError, match="Only in this split: "):
        list_source(source, "val", ListOptions(), classes[:1])


@pytest.mark.parametrize("make", [_in_folder, _in_tar, _in_zip])
def test_folders_without_photographs_in_class_folders_are_left_out(
    make: Callable[[Path, Sequence[str]], Path], tmp_path: Path
) -> None:
    source = list_source(make(tmp_path / "x", ("cat/1.jpg", "cat/boxes/more/1.xml", "dog/2.jpg")), "train")
    assert source.classes == ("cat", "dog") and len(source.inputs) == 2 and not source.refused
    assert [reason for _, reason in source.ignored] == ["a folder inside a class folder, without photographs"]
