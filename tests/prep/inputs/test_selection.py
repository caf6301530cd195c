"""prep.inputs.selection: --exclude leaves files out, --classes selects classes, and numbers name class folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from prep.cli import main
from prep.console import UserError
from prep.inputs.reader import ListOptions
from prep.inputs.selection import ExclusionList
from prep.inputs.sources import find_splits, list_source
from tests.helpers.listings import paths_and_labels, touch

VAL = [b"ILSVRC2012_val_%08d.JPEG" % number for number in (1, 2, 36, 1762)]
TRAIN = [b"n01/n01_36.JPEG", b"n01/n01_4.JPEG", b"n02/n02_36.JPEG", b"n02/x.y.png"]


def exclusions(tmp_path: Path, *lines: str) -> ExclusionList:
    (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
    return ExclusionList(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("36", VAL[2]),
        ("00000036", VAL[2]),
        ("ILSVRC2012_val_00000036", VAL[2]),
        ("ILSVRC2012_val_00000036.JPEG ", VAL[2]),
        ("n01_36.JPEG", TRAIN[0]),
        ("n01_36", TRAIN[0]),
        ("n02/n02_36.JPEG", TRAIN[2]),
        ("./n02/n02_36", TRAIN[2]),
        ("x.y", TRAIN[3]),
    ],
)
def test_a_line_is_a_path_a_name_or_a_number(line: str, path: bytes, tmp_path: Path) -> None:
    found = exclusions(tmp_path, "# a comment", "", line)
    paths = VAL if path in VAL else TRAIN
    assert found.find(paths, "val") == {path}
    found.report_unused()


def test_numbers_are_for_files_that_are_numbered_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers in the blacklist of the validation images exclude no training image.

    The names of training images end in numbers, too.
    """
    found = exclusions(tmp_path, "36", "1762", "999999")
    assert found.find(TRAIN, "train") == set()
    assert found.find(VAL, "val") == {VAL[2], VAL[3]}
    found.report_unused()
    messages = capsys.readouterr().err
    assert "val: --exclude" in messages and "leaves out 2 files." in messages
    assert "1 of 3 lines fit no file (first: 999999)" in messages


def test_a_line_that_fits_several_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1\.jpg fits 2 files of train, such as cat/1\.jpg and dog/1\.jpg"):
        exclusions(tmp_path, "1.jpg").find([b"cat/1.jpg", b"dog/1.jpg"], "train")
    with pytest.raises(UserError, match=r"1 fits 2 files of train"):
        exclusions(tmp_path, "1").find([b"cat/a_01.jpg", b"dog/a_001.jpg"], "train")
    found = exclusions(tmp_path, "7")
    found.find([b"07.jpg"], "train")
    with pytest.raises(UserError, match=r"7 fits a file of train and a file of val \(007\.jpg\)"):
        found.find([b"007.jpg"], "val")


def test_a_list_that_names_nothing_is_an_error(tmp_path: Path) -> None:
    found = exclusions(tmp_path, "a.jpg", "b.jpg")
    assert found.find(VAL, "val") == set()
    with pytest.raises(UserError, match=r"2 of 2 lines fit no file \(first line: a\.jpg\)"):
        found.report_unused()
    with pytest.raises(UserError, match="the file has no lines"):
        exclusions(tmp_path, "# nothing")
    with pytest.raises(UserError, match="No such file"):
        ExclusionList(tmp_path / "nowhere")


def test_excluded_files_are_ignored_inputs(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n1/b.JPEG", "n2/c.JPEG")
    (root / "n1" / "broken.JPEG").symlink_to("nowhere")
    source = list_source(root, "train", ListOptions(exclude=exclusions(tmp_path, "b", "n1/broken.JPEG")))
    assert paths_and_labels(source) == [(b"n1/a.JPEG", 0), (b"n2/c.JPEG", 1)]
    assert source.refused == ()
    assert source.ignored == (("n1/b.JPEG", "named by --exclude"), ("n1/broken.JPEG", "named by --exclude"))
    with pytest.raises(UserError, match=r"after --exclude .* 1 class has no photograph: n2"):
        list_source(root, "train", ListOptions(exclude=exclusions(tmp_path, "c", "broken")))
    flat = touch(tmp_path / "val", "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "val.txt").write_text("1.jpg cat\n2.jpg dog\n3.jpg cat\n")
    source = list_source(flat, "val", ListOptions(exclude=exclusions(tmp_path, "3")))
    assert paths_and_labels(source) == [(b"1.jpg", 0), (b"2.jpg", 1)]


def test_the_command_tells_lines_that_fit_no_file(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/b.JPEG")
    exclusions(tmp_path, "c.JPEG", "36")
    words = ["build-lmdb", str(root), "--store", str(tmp_path / "s"), "--exclude", str(tmp_path / "list.txt")]
    result = CliRunner().invoke(main, [*words, "--jobs", "1", "--dry-run"])
    assert result.exit_code == 1 and "2 of 2 lines fit no file (first line: c.JPEG)" in result.stderr


def test_a_class_file_selects_some_of_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--classes names some of the training folders, as for ImageNet-100. The label file of val has all classes."""
    train = touch(tmp_path / "train", "n1/a.JPEG", "n2/b.JPEG", "n2/c.JPEG", "n3/d.JPEG")
    (tmp_path / "classes.txt").write_text("n3\nn1\n")
    options = ListOptions(class_file=tmp_path / "classes.txt")
    source = list_source(train, "train", options)
    assert source.classes == ("n3", "n1") and paths_and_labels(source) == [(b"n1/a.JPEG", 1), (b"n3/d.JPEG", 0)]
    assert source.ignored == (("n2", "a class that --classes does not name"),)
    assert "2 photographs of 1 other class (n2)" in capsys.readouterr().err
    val = touch(tmp_path / "val", "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "val.txt").write_text("1.jpg n1\n2.jpg n2\n3.jpg n3\n")
    for known in ((), source.classes):
        listed = list_source(val, "val", options, known)
        assert listed.classes == ("n3", "n1") and paths_and_labels(listed) == [(b"1.jpg", 1), (b"3.jpg", 0)]
        assert listed.labels_from == tmp_path / "val.txt"
    (tmp_path / "classes.txt").write_text("n3\nn4\n")
    with pytest.raises(UserError, match=r"Only in this split: n1, n2\. Only in .*classes\.txt: n4"):
        list_source(train, "train", options)


def test_numbered_folders_are_positions_only_if_the_order_is_given(tmp_path: Path) -> None:
    """ImageNetV2 has the folders 0 to 999."""
    root = touch(tmp_path / "v2", "0/a.jpeg", "1/b.jpeg", "2/c.jpeg")
    store = ("n3", "n1", "n2")  # in sorted order, position 0 is n1, although the label of n1 is 1
    with pytest.raises(UserError, match=r"pass --label-order sorted-from-0 \(the first class is 0, as in ImageNetV2\)"):
        list_source(root, "val", ListOptions(), store)
    source = list_source(root, "val", ListOptions(label_order="sorted-from-0"), store)
    assert source.classes == store
    assert paths_and_labels(source) == [(b"0/a.jpeg", 1), (b"1/b.jpeg", 2), (b"2/c.jpeg", 0)]
    with pytest.raises(UserError, match=r"class folder 0; with --label-order sorted expected 1 to 3"):
        list_source(root, "val", ListOptions(label_order="sorted"), store)
    assert list_source(root, "val").classes == ("0", "1", "2")


def test_kaggle_folders_and_labels_are_found(tmp_path: Path) -> None:
    base = "ILSVRC/Data/CLS-LOC"
    files = (f"{base}/train/n1/a.JPEG", f"{base}/train/n2/b.JPEG", f"{base}/val/1.JPEG", f"{base}/val/2.JPEG")
    root = touch(
        tmp_path / "kaggle", *files, f"{base}/test/3.JPEG", "ILSVRC/Annotations/x.xml", "LOC_synset_mapping.txt"
    )
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n2,n1 1 2 3 4\n1,n2 1 2 3 4 n2 1 2 3 4\n")
    for source in (root, root / "ILSVRC", root / base):
        for layout in (None, "kaggle"):
            found = find_splits(source, None, layout)
            assert {name: where.path for name, where in found.items()} == {
                name: root / base / name for name in ("train", "val")
            }
    train = list_source(found["train"], "train")
    val = list_source(found["val"], "val", store_classes=train.classes)
    assert paths_and_labels(train) == [(b"n1/a.JPEG", 0), (b"n2/b.JPEG", 1)]
    assert paths_and_labels(val) == [(b"1.JPEG", 1), (b"2.JPEG", 0)]
    with pytest.raises(UserError, match=r"has no ILSVRC/Data/CLS-LOC/train"):
        find_splits(touch(tmp_path / "x", "n1/a.JPEG"), None, "kaggle")
