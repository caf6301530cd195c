"""Tests of CSV files with extra values: types, columns, paths of images, and an error of one line for each fault."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.check.export import write_extra
from prep.console import UserError
from prep.extra.csv_values import ValueTable, parse_extra
from prep.extra.match import with_extra
from prep.inputs.folder import FolderReader
from prep.inputs.listing import Listing
from prep.inputs.reader import Source
from prep.store.extra import Column, joined
from tests.fuzzing import changed_bytes, examples, try_files

NAMES = ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/é.JPEG")


def source(names: tuple[str, ...] = NAMES, split: str = "train", root: str = "photos") -> Source:
    inputs = Listing()
    for name in names:
        inputs.add(name.encode(), 0)
    return Source(FolderReader(Path(root)), split, ("a",), inputs)


def values(folder: Path, text: str | bytes, option: str = "age", *sources: Source) -> list[list[Any]]:
    """Return the values of all inputs that a CSV file with the content `text` gives."""
    path = folder / "values.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = with_extra(sources or (source(),), parse_extra((f"{option}={path}",)))
    columns = [each.extra[option.partition(":")[0]] for each in found]
    return [[column.value(row) for row in range(len(column))] for column in columns]


def table(*cells: object, head: str = "path,age") -> str:
    return "\n".join([head, *(f"{name},{cell}" for name, cell in zip(NAMES, cells, strict=True))]) + "\n"


@pytest.mark.parametrize(
    ("cells", "expected", "kind"),
    [
        ((1, -2, "+3", "007"), [1, -2, 3, 7], "int"),
        ((2**63 - 1, -(2**63), 0, 0), [2**63 - 1, -(2**63), 0, 0], "int"),
        ((1, 2.5, ".5", "1e-3"), [float(np.float32(x)) for x in (1, 2.5, 0.5, 1e-3)], "float"),
        ((1, "two", 3, ""), ["1", "two", "3", ""], "text"),
        (("x", '"a, ""b"""', '"  y "', '"z\n"'), ["x", 'a, "b"', "  y ", "z\n"], "text"),
    ],
)
def test_the_values_decide_the_type(tmp_path: Path, cells: tuple[Any, ...], expected: list[Any], kind: str) -> None:
    found = values(tmp_path, table(*cells))[0]
    assert found == expected
    assert ValueTable.read(parse_extra((f"age={tmp_path / 'values.csv'}",))[0]).column.type == kind


def test_several_columns_of_numbers_are_a_vector(tmp_path: Path) -> None:
    rows = "\n".join(f"{name},{k},{k / 3}" for k, name in enumerate(NAMES))
    found = values(tmp_path, f"file,x,y\n{rows}\n", "box")[0]
    assert np.array_equal(found, np.array([[k, k / 3] for k in range(4)], np.float32))
    found = values(tmp_path, f"y,file,split,x\n{chr(10).join(f'{k},{n},train,1' for k, n in enumerate(NAMES))}", "box")[
        0
    ]
    assert np.array_equal(found, np.array([[k, 1] for k in range(4)], np.float32))


def test_columns_with_the_name_of_the_field_and_other_separators(tmp_path: Path) -> None:
    rows = "\n".join(f"{k}\t{name}\tlabel\t{k + 5}\t0.5\t-1" for k, name in enumerate(NAMES))
    text = f"id\tpath\tclass\tage\tbox.1\tbox.0\n# a comment\n\n{rows}\n"
    assert values(tmp_path, text)[0] == [5, 6, 7, 8]
    assert np.array_equal(values(tmp_path, text, "box")[0], [[-1, 0.5]] * 4)
    assert values(tmp_path, text, "age:text")[0] == ["5", "6", "7", "8"]
    assert values(tmp_path, text, "age:float")[0] == [5, 6, 7, 8]
    assert np.array_equal(values(tmp_path, text, "age:vector")[0], [[5], [6], [7], [8]])


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (NAMES, ("./cat/1.jpg", "data/train/cat/2.jpg", "/abs/dog/1.jpg", "dog/e\u0301.jpg")),
        (NAMES, ("cat\\1.jpg", "photos\\cat\\2.jpg", "dog/1.jpg", "é")),
        (("1.jpg", "2.jpg", "3.PNG"), ("images/1.jpg", "2", "3.png")),
        (("a/b/1.jpg", "a/c/2.jpg"), ("b/1.jpg", "2.jpg")),
    ],
)
def test_paths_name_images_as_in_label_files(tmp_path: Path, names: tuple[str, ...], rows: tuple[str, ...]) -> None:
    text = "\n".join(["path,age", *(f"{row},{k}" for k, row in enumerate(rows))])
    assert values(tmp_path, text, "age", source(names)) == [list(range(len(rows)))]


def test_one_file_for_both_splits(tmp_path: Path) -> None:
    names, val = ("cat/1.jpg", "cat/2.jpg"), source(("cat/1.jpg", "cat/9.jpg"), "val")
    text = "path,age\ntrain/cat/1.jpg,1\ntrain/cat/2.jpg,2\nval/cat/1.jpg,3\nvalidation/cat/9.jpg,4\ntest/cat/1.jpg,5\n"
    assert values(tmp_path, text, "age", source(names), val) == [[1, 2], [3, 4]]
    text = "path,split,age\ncat/1.jpg,train,1\ncat/2.jpg,train,2\ncat/1.jpg,val,3\ncat/9.jpg,val,4\ncat/1.jpg,test,5\n"
    assert values(tmp_path, text, "age", source(names), val) == [[1, 2], [3, 4]]
    with pytest.raises(UserError, match="1 row would give values to images of both splits"):
        values(tmp_path, "path,age\ncat/1.jpg,1\ncat/2.jpg,2\ncat/9.jpg,3\n", "age", source(names), val)


def test_rows_may_repeat_and_name_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = table(1, 2, 3, 4) + "cat/1.jpg,1\nbird/7.jpg,9\n"
    assert values(tmp_path, text)[0] == [1, 2, 3, 4]
    printed = capsys.readouterr().err
    assert "int for 4 images; 1 row without an image of the split; 1 row repeated with the same value" in printed


@pytest.mark.parametrize(
    ("text", "option", "parts"),
    [
        ("path,age\ncat/1.jpg,1\ncat/2.jpg,2\n", "age", ["no row for 2 of 4 images of train (first: dog/1.jpg)"]),
        (table(1, 2, 3, 4) + "cat/2.jpg,5\n", "age", ["line 6", "cat/2.jpg has two values, 2 (line 3) and 5"]),
        (table("a", "b", "c", "d") + "cat/2.jpg,e\n", "age", ["line 6", "'b' (line 3) and 'e'"]),
        (table(1, "nan", 3, 4), "age", ["line 3", "'nan' for cat/2.jpg", "finite"]),
        (table(1, 2, 3, "-Infinity"), "age", ["line 5", "finite"]),
        (table(1, 2, 3, 1e39), "age", ["line 5", "float32"]),
        (table(1, 2**63, 3, 4), "age", ["line 3", "int64", "age:float="]),
        (table(1, "", 3, 4), "age", ["line 3", "no value for cat/2.jpg", "whole number"]),
        (table(1, "x", 3, 4), "age:int", ["line 3", "'x'", "whole number", "age:text="]),
        (table(1, "1_0", 3, 4), "age:float", ["line 3", "'1_0'", "a number"]),
        ("path,x,y\ncat/1.jpg,1,2\ncat/2.jpg,1\n", "box", ["line 3", "2 columns, but the first row has 3"]),
        ("path,x,y\ncat/1.jpg,1,2\ncat/2.jpg,1,2,3\n", "box", ["line 3", "4 columns, but the first row has 3"]),
        ("path,x,y\ncat/1.jpg,1,b\n", "box", ["line 2", "'b'", "2 columns of values", "name box"]),
        ("path,x,y\ncat/1.jpg,1,2\n", "box:int", ["type int with 2 columns of values (x, y)"]),
        (b"path,age\ncat/1.jpg,\xff\n", "age", ["line 2", "not UTF-8"]),
        ("cat/1.jpg,1\n", "age", ["first row is 'cat/1.jpg, 1'", "path,age"]),
        ("path\ncat/1.jpg\n", "age", ["no column of values"]),
        ("path,age,age\ncat/1.jpg,1,2\n", "age", ["2 columns have the name age"]),
        ("path,age\n", "age", ["no rows"]),
        ("", "age", ["the file is empty"]),
        (table(1, 2, 3, 4) + ",5\n", "age", ["line 6", "no path"]),
        ("path,split,age\ncat/1.jpg,,5\n", "age", ["line 2", "no split"]),
        ("path,age\n1.jpg,5\n", "age", ["line 2", "1.jpg fits several images", "cat/1.jpg and dog/1.jpg"]),
        ("path,age\ncat/1.jpg," + "x" * 200_000, "age", ["field larger than field limit"]),
    ],
)
def test_a_fault_is_an_error_of_one_line(tmp_path: Path, text: str | bytes, option: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        values(tmp_path, text, option)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for part in ["--extra", "values.csv", *parts]:
        assert part in message, message


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("age", "FIELD=CSV"),
        ("1st=a.csv", "identifier"),
        ("a-b=a.csv", "identifier"),
        ("age:double=a.csv", "expected one of int, float, vector, text"),
        ("path=a.csv", "another meaning"),
        ("age=missing.csv", "No such file"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, part: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=part):
        with_extra([source()], parse_extra((option,)))
    with pytest.raises(UserError, match="given twice"):
        parse_extra(("age=a.csv", "age:int=b.csv"))


_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
_TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=20, derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), _FLOATS, st.tuples(_FLOATS, _FLOATS), _TEXTS), min_size=1),
    st.randoms(use_true_random=False),
)
def test_exported_values_are_read_again(tmp_path_factory: pytest.TempPathFactory, rows: Any, shuffle: Any) -> None:
    """Columns are exported as a CSV file, whose values are read again for inputs in another order."""
    path = tmp_path_factory.getbasetemp() / "exported.csv"
    ints, floats, vectors, texts = zip(*rows, strict=True)
    columns = {
        "age": Column("int", np.array(ints, np.int64)),
        "weight": Column("float", np.array(floats, np.float32)),
        "box": Column("vector", np.array(vectors, np.float32)),
        "caption": Column.of_texts([text.encode() for text in texts]),
    }
    names = [f"c/{number}.jpg" for number in range(len(rows))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prep.check.export.StoredColumns", lambda store, split: FakeColumns(columns))
        write_extra(FakeStore(columns), "train", path, [name.encode() for name in names])  # type: ignore[arg-type]
    order = list(range(len(rows)))
    shuffle.shuffle(order)
    inputs = source(tuple(names[k] for k in order))
    options = [f"{name}:{column.type}={path}" for name, column in columns.items()]
    (found,) = with_extra([inputs], parse_extra(tuple(options)))
    for name, column in columns.items():
        assert not len(found.extra[name].differences(column.take(np.array(order)))), name


class FakeColumns:
    """Columns in memory, with the methods of StoredColumns."""

    def __init__(self, columns: dict[str, Column]) -> None:
        self._columns = columns

    def take(self, rows: Any) -> dict[str, Column]:
        return {name: column.take(rows) for name, column in self._columns.items()}

    def close(self) -> None:
        pass


class FakeStore:
    """A store whose split has the extra fields of `columns`."""

    def __init__(self, columns: dict[str, Column]) -> None:
        self.extra = {name: column.entry() for name, column in columns.items()}

    def split(self, name: str) -> FakeStore:
        return self


@examples(60, 3000)
def test_any_file_is_read_or_refused(tmp_path: Path, count: int) -> None:
    content = (table(1, 2.5, 3, 4) + 'dog/1.jpg,"x\ny"\ncat/1.jpg,1\n').encode()
    path = tmp_path / "values.csv"

    def read(content: bytes) -> object:
        path.write_bytes(content)
        return with_extra([source()], parse_extra((f"age={path}",)))

    try_files(changed_bytes(content), count, read)


def test_texts_are_taken_and_joined_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prep.store.extra._ROWS_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    texts = ["ä" * int(n) + str(k) for k, n in enumerate(rng.integers(0, 5, 20))]
    column = Column.of_texts([text.encode() for text in texts])
    rows = rng.integers(0, 20, 50)
    assert column.take(rows).texts() == [texts[row] for row in rows]
    assert joined([column, column.take(rows)]).texts() == texts + [texts[row] for row in rows]
    assert replace(column).take(np.empty(0, np.int64)).texts() == []
