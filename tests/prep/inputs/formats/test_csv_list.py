"""prep.inputs.formats.csv_list: headers, separators, names, splits and mistakes in CSV files of paths and labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from prep.console import UserError
from prep.inputs.reader import ListOptions
from prep.inputs.sources import find_splits, list_source
from tests.helpers.listings import paths_and_labels, touch


def csv_file(folder: Path, text: str, name: str = "list.csv") -> Path:
    touch(folder, "cat/1.jpg", "cat/2.jpg", "dog/a b, c.jpg")
    (folder / name).write_text(text, newline="")
    return folder / name


ROWS = [(b"cat/1.jpg", 0), (b"cat/2.jpg", 0), (b"dog/a b, c.jpg", 1)]


@pytest.mark.parametrize(
    "text",
    [
        'cat/1.jpg,cat\ncat/2.jpg,cat\n"dog/a b, c.jpg",dog\n',
        'path,label\r\n./cat/1.jpg,cat\r\ncat/2.jpg, cat\r\n"dog/a b, c.jpg",dog\r\n',
        '\ufeffid;Class;FileName\n1;cat;cat/1.jpg\n2;cat;cat/2.jpg\n\n3;dog;"dog/a b, c.jpg"\n',
        "cat/1.jpg\t0\ncat/2.jpg\t0\ndog/a b, c.jpg\t1\n",
    ],
    ids=["commas", "header, quotes, CRLF", "semicolons, BOM, other columns", "tabs, numbers"],
)
def test_separators_headers_and_quotes(text: str, tmp_path: Path) -> None:
    source = list_source(csv_file(tmp_path, text), "train")
    assert paths_and_labels(source) == ROWS
    assert source.classes == (("0", "1") if "\t" in text else ("cat", "dog"))
    assert [source.reader.read(item) for item in source.inputs] == [b""] * 3 or source.reader.root == tmp_path


def test_names_begin_below_the_folder_of_all_images(tmp_path: Path) -> None:
    touch(tmp_path / "data" / "train", "cat/1.jpg", "dog/2.jpg")
    path = csv_file(tmp_path, f"data/train/cat/1.jpg,cat\n{tmp_path}/data/train/dog/2.jpg,dog\n")
    assert paths_and_labels(list_source(path, "train")) == [(b"cat/1.jpg", 0), (b"dog/2.jpg", 1)]


def test_a_column_names_the_splits(tmp_path: Path) -> None:
    rows = "cat/1.jpg,cat,train\ncat/2.jpg,cat,Validation\ndog/a.jpg,dog,test\n"
    path = csv_file(tmp_path, f"file,label,split\n{rows}")
    found = find_splits(path, None)
    assert list(found) == ["train", "val"]
    assert [item.path for name in found for item in list_source(found[name], name).inputs] == [b"1.jpg", b"2.jpg"]


def test_missing_files_and_labels_are_refused(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "cat/1.jpg,cat\ncat/9.jpg,cat\ncat,cat\ncat/\0.jpg,cat\ncat/2.jpg,\n")
    source = list_source(path, "train", ListOptions(allow_empty_classes=True))
    assert paths_and_labels(source) == [(b"cat/1.jpg", 0)]
    assert source.refused == (
        ("cat/9.jpg", "cannot be read: No such file or directory"),
        ("cat", "not a file"),
        ("cat/\0.jpg", "a NUL byte in its path"),
        ("cat/2.jpg", "no label"),
    )


@pytest.mark.parametrize("file", ["dog/a b, c.jpg", "dog/missing.jpg"])
def test_a_row_without_a_label_drops_no_class(file: str, tmp_path: Path) -> None:
    """The missing label may be a class that no other row has. Without an error, the store would lack this class."""
    path = csv_file(tmp_path, f'cat/1.jpg,cat\ncat/2.jpg,cat\n"{file}",\n')
    with pytest.raises(
        UserError, match=rf"1 image without a label \({file}\), so a class may be missing.*--classes FILE"
    ):
        list_source(path, "train")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="1 class has no photograph: dog"):
        list_source(path, "train", ListOptions(class_file=tmp_path / "classes.txt"))
    (tmp_path / "classes.txt").write_text("cat\n")
    source = list_source(path, "train", ListOptions(class_file=tmp_path / "classes.txt"))
    assert [name for name, _ in source.refused] == [file] and source.classes == ("cat",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat,cat/1.jpg\n", "the path comes after the label in the first row"),
        ("a,b\n1,2\n", r"the first row is 'a, b'\. Expected rows of `path,label`"),
        ("cat/1.jpg,cat\ncat/2.jpg\n", r"list\.csv, line 2: 1 columns"),
        ("cat/1.jpg,cat\ncat/1.jpg,cat\n", r"two images have the name 1\.jpg"),
        ("", "no image found"),
    ],
)
def test_mistakes_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list_source(csv_file(tmp_path, text), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat/1.jpg,cat\ncat/2.jpg,tench, Tinca\n", "line 2: 3 columns, but the first row has 2.*quotes"),
        (
            "path,label,split\ncat/1.jpg,cat,train\ncat/2.jpg,cat,\n",
            "line 3: no split in this row; expected train or val",
        ),
        ("path,label,fold\ncat/1.jpg,cat,0\n", "has the values 0; expected train and val"),
        ("cat/1.jpg,cat\nant/1.jpg,ant\n", r"1 class has no photograph: ant\. ant/1\.jpg: cannot be read"),
    ],
    ids=["unquoted comma", "row without split", "no train, no val", "class without files"],
)
def test_rows_whose_meaning_is_unclear_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        for name, where in find_splits(csv_file(tmp_path, text), None).items():
            list_source(where, name)


def test_rows_of_other_splits_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "cat/1.jpg,cat,train\ncat/2.jpg,cat,val\ndog/a.jpg,dog,test\ndog/b.jpg,dog,dev\n"
    folder = csv_file(tmp_path, f"file,label,split\n{rows}").parent
    assert list(find_splits(folder, None, "csv")) == ["train", "val"]
    assert "left out 2 rows of other splits (test, dev)" in capsys.readouterr().err


def test_a_label_that_is_not_utf_8_is_escaped(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "")
    path.write_bytes("cat/1.jpg,k\xe4tze\n".encode("latin-1"))
    assert list_source(path, "train").classes == (r"k\xe4tze",)
