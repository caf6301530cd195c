"""Tests of extra fields in a store: build, resume, parts, finished stores, merge, verify, copy, inspect and export.

The values of each record are compared with the rows of the CSV file, by the path of the photograph.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from prep.check.export import export_split
from prep.check.verify import verify_split
from prep.cli import main
from prep.console import Progress, UserError
from prep.merge.stores import merge_stores
from prep.remote.copy_store import planned_copy, run_copy
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.extra import StoredColumns
from prep.store.manifest import Store, StoreError
from tests.helpers.building import InlineRunner, StoppingRunner, UnusedRunner
from tests.helpers.damaged_stores import canonical_digest
from tests.prep.extra.tables import FIELDS, TYPES, build_with, make_photos, write_table
from tools.edits.record_edits import sign_column

Values = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 photographs, which make two shards, and a broken file."""
    return make_photos(tmp_path_factory.mktemp("photos") / "train")


@pytest.fixture(scope="module")
def table(photos: Path) -> tuple[Path, Values]:
    path = photos.parent / "extra.csv"
    return path, write_table(path, photos)


@pytest.fixture(scope="module")
def built(photos: Path, table: tuple[Path, Values], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("built") / "store"
    build_with(photos, store, [f"{name}={table[0]}" for name in FIELDS])
    return store


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make commands run their tasks in the process of the test."""
    monkeypatch.setattr("prep.cli.build.make_runner", lambda *args, **options: nullcontext(InlineRunner()))


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "copied")
    return tmp_path / "copied"


def sources(store: Store, split: str = "train") -> list[str]:
    """Return the paths of the photographs of all records, in record order."""
    shards = [lmdb_shard.read(Path(path)) for path in store.shard_paths(split)]
    return [Datum.decode(value).source.decode() for shard in shards for _, value in shard]


def assert_values(store: Store, values: Values, fields: tuple[str, ...] = FIELDS) -> None:
    """Assert that each record has the values of its photograph."""
    names = sources(store)
    with closing(StoredColumns(store, "train")) as columns:
        taken = columns.take(np.arange(len(names)))
    assert sorted(taken) == sorted(fields)
    for name in fields:
        for row, source in enumerate(names):
            assert np.array_equal(taken[name].value(row), values[source][name]), (name, source)


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert len(text.splitlines()) == 1
    for part in parts:
        assert part in text, text


def test_each_record_has_the_values_of_its_photograph(built: Path, table: tuple[Path, Values]) -> None:
    store = Store.open(built)
    assert store.split("train").records == 70 and store.split("train").account["inputs"] == 71
    assert {name: field.type for name, field in store.split("train").extra.items()} == TYPES
    assert_values(store, table[1])
    assert np.load(built / "train/extra/age.npy").dtype == "<i8"
    assert np.load(built / "train/extra/box.npy").shape == (70, 3)
    texts, offsets = np.load(built / "train/extra/caption.npy"), np.load(built / "train/extra/caption.offsets.npy")
    first = table[1][sources(store)[0]]["caption"]
    assert (texts.dtype, offsets.dtype, bytes(texts[: offsets[1]]).decode()) == ("u1", "<i8", first)
    assert verify_split(store, "train", InlineRunner(), Progress(1, "records")) == []


def test_the_fingerprint_covers_the_fields_and_a_store_without_fields_stays_as_it_was(
    built: Path, photos: Path, tmp_path: Path
) -> None:
    """The test computes the fingerprint as docs/store-format.md defines it."""
    data = json.loads((built / "manifest.json").read_bytes())
    split = data["splits"]["train"]
    shards = [shard["digest"] for shard in split["shards"]]
    files = split["account"]["files"]
    extra = {
        "age": {"type": "int", "width": 1, "files": [files["extra/age.npy"]]},
        "box": {"type": "vector", "width": 3, "files": [files["extra/box.npy"]]},
        "caption": {
            "type": "text",
            "width": 1,
            "files": [files["extra/caption.npy"], files["extra/caption.offsets.npy"]],
        },
        "weight": {"type": "float", "width": 1, "files": [files["extra/weight.npy"]]},
    }
    expected = canonical_digest({"classes": data["classes"], "shards": shards, "extra": extra})
    assert split["fingerprint"] == expected
    plain = build_with(photos, tmp_path / "plain")
    assert plain.split("train").fingerprint == canonical_digest({"classes": data["classes"], "shards": shards})
    assert "extra" not in (tmp_path / "plain" / "manifest.json").read_text()
    assert not (tmp_path / "plain" / "train" / "extra").exists()


def test_a_build_goes_on_after_a_kill_and_refuses_other_values(
    built: Path, photos: Path, table: tuple[Path, Values], tmp_path: Path
) -> None:
    store, extra = tmp_path / "store", [f"{name}={table[0]}" for name in FIELDS]
    with pytest.raises(Exception, match=r"^$"):  # StoppingRunner(1) stops the build after one shard
        build_with(photos, store, extra, runner=StoppingRunner(1))
    other = tmp_path / "other.csv"
    write_table(other, photos, seed=1)
    refused(lambda: build_with(photos, store, [*extra[:3], f"caption:text={other}", f"age2:text={other}"]), "age2")
    changed = [f"age={other}", *extra[1:]]
    refused(lambda: build_with(photos, store, changed), "unfinished build", "--extra age", "digest", "--restart")
    refused(lambda: build_with(photos, store, []), "age, box, caption, weight", "none")
    resumed = build_with(photos, store, extra)
    assert resumed.fingerprint == Store.open(built).fingerprint
    assert build_with(photos, store, extra, runner=UnusedRunner()).fingerprint == resumed.fingerprint
    assert not (store / "train" / ".build").exists()


def test_a_finished_store_gets_fields_without_another_build(
    built: Path, photos: Path, table: tuple[Path, Values], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    build_with(photos, store)
    build_with(photos, store, [f"age={table[0]}"], runner=UnusedRunner())
    assert_values(Store.open(store), table[1], ("age",))
    added = build_with(photos, store, [f"{name}={table[0]}" for name in FIELDS], runner=UnusedRunner())
    assert added.fingerprint == Store.open(built).fingerprint == Store.open(store).fingerprint
    assert_values(Store.open(store), table[1])
    other = tmp_path / "other.csv"
    write_table(other, photos, seed=1)
    refused(
        lambda: build_with(photos, store, [f"age={other}"], runner=UnusedRunner()),
        "in this command differ in 70 records",
    )
    refused(lambda: build_with(photos, store, [f"age:text={other}"], runner=UnusedRunner()), "age", "int", "text")
    assert build_with(photos, store, runner=UnusedRunner()).fingerprint == added.fingerprint


@pytest.mark.usefixtures("inline")
def test_parts_and_join(built: Path, photos: Path, table: tuple[Path, Values], tmp_path: Path) -> None:
    store = tmp_path / "store"
    words = ["build-lmdb", str(photos), "--split", "train", "--store", str(store), "--side", "32", "--format", "ppm"]
    words += [
        "--on-bad",
        "skip",
        "--jobs",
        "1",
        *(word for name in FIELDS for word in ("--extra", f"{name}={table[0]}")),
    ]
    for part in ("1/2", "2/2"):
        result = CliRunner().invoke(main, [*words, "--part", part, "--no-lock"])
        assert result.exit_code == 0, result.output
    assert not (store / "manifest.json").exists()
    damaged = store / "train/.build/extra/age.npy"
    intact = damaged.read_bytes()
    damaged.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    result = CliRunner().invoke(main, ["join", "--store", str(store)])
    assert result.exit_code == 1 and "the field age" in result.output and "digest" in result.output
    damaged.write_bytes(intact)
    result = CliRunner().invoke(main, ["join", "--store", str(store)])
    assert result.exit_code == 0, result.output
    assert Store.open(store).fingerprint == Store.open(built).fingerprint


def test_all_splits_have_the_same_type(built: Path, copied: Path, table: tuple[Path, Values], tmp_path: Path) -> None:
    val = make_photos(tmp_path / "val", 12)
    path = tmp_path / "val.csv"
    write_table(path, val, seed=3)
    refused(lambda: build_with(val, copied, [f"age:float={path}"], "val"), "--extra age", "float in val, int in train")
    build_with(val, copied, [f"age={path}"], "val")
    data = json.loads((copied / "manifest.json").read_bytes())
    data["splits"]["val"]["extra"]["age"].update(type="float")
    (copied / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(StoreError, match=r"extra\.age"):
        Store.open(copied)


def test_merged_stores_have_the_values_of_both(
    built: Path, photos: Path, table: tuple[Path, Values], tmp_path: Path
) -> None:
    more = make_photos(tmp_path / "more" / "train", 20)
    path, other = tmp_path / "more.csv", tmp_path / "other"
    values = write_table(path, more, seed=5)
    build_with(more, other, [f"{name}={path}" for name in FIELDS[:3]])
    merge = lambda target: merge_stores([built, other], tmp_path / target, InlineRunner(), Progress(1, "records"))  # noqa: E731
    refused(lambda: merge("none"), "other", "caption", "extra fields")
    build_with(more, other, [f"{name}={path}" for name in FIELDS], runner=UnusedRunner())
    merged = merge("merged")
    assert merged.split("train").records == 90
    both = {f"{name}": [value] for name, value in table[1].items()}
    for name, value in values.items():
        both.setdefault(name, []).append(value)
    with closing(StoredColumns(merged, "train")) as columns:
        taken = columns.take(np.arange(90))
    for row, source in enumerate(sources(merged)):
        found = {name: taken[name].value(row) for name in FIELDS}
        assert any(all(np.array_equal(found[n], value[n]) for n in FIELDS) for value in both[source]), source
    assert verify_split(merged, "train", InlineRunner(), Progress(1, "records")) == []


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def _signed(store: Path, file: str, change: Callable[[Any], Any]) -> None:
    """Change the array in a column file, and update the file's digest and the fingerprints in the manifest."""
    array = np.load(store / "train" / file)
    np.save(store / "train" / file, change(array))
    sign_column(store / "train" / file)


def _descending(offsets: Any) -> Any:
    offsets[3] = offsets[-1] + 1
    return offsets


def _not_utf8(texts: Any) -> Any:
    texts[-1] = 0xFF
    return texts


def _infinite(numbers: Any) -> Any:
    numbers[7] = np.inf
    return numbers


@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        (lambda store: _flip(store / "train/extra/age.npy"), "train/extra/age.npy", "digest"),
        (lambda store: _flip(store / "train/extra/caption.offsets.npy"), "train/extra/caption.offsets.npy", "digest"),
        (lambda store: (store / "train/extra/box.npy").unlink(), "train/extra/box.npy", "cannot be read"),
        (lambda store: (store / "train/extra/old.npy").write_bytes(b""), "train/extra/old.npy", "does not name"),
        (lambda store: _signed(store, "extra/caption.offsets.npy", _descending), "train/extra", "do not ascend"),
        (lambda store: _signed(store, "extra/caption.npy", _not_utf8), "train/extra", "is not UTF-8"),
        (lambda store: _signed(store, "extra/box.npy", _infinite), "train/extra", "box of record 7"),
        (lambda store: _signed(store, "extra/age.npy", lambda array: array.astype("<i4")), "train/extra", "int32"),
        (lambda store: _signed(store, "extra/weight.npy", lambda array: array[:-1]), "train/extra", "(69,)"),
    ],
)
def test_verify_finds_damaged_columns(copied: Path, damage: Callable[[Path], object], where: str, what: str) -> None:
    damage(copied)
    faults = verify_split(Store.open(copied), "train", InlineRunner(), Progress(1, "records"))
    assert [fault.where for fault in faults] == [where]
    assert what in faults[0].what and len(faults[0].text().splitlines()) == 1, faults[0].text()


def test_a_truncated_column_is_found_while_it_is_read(copied: Path) -> None:
    with closing(StoredColumns(Store.open(copied), "train")) as columns:
        path = copied / "train/extra/box.npy"
        path.write_bytes(path.read_bytes()[:200])
        from prep.store import kernels

        if kernels.native is None:  # without the C kernel, the column was read into memory earlier
            return
        with pytest.raises(StoreError, match=r"box\.npy: truncated or unreadable"):
            columns.take(np.arange(70))


def test_a_copy_has_all_columns_and_notices_a_changed_column(built: Path, copied: Path, tmp_path: Path) -> None:
    with planned_copy(str(built), str(tmp_path / "target")) as plan:
        run_copy(plan, InlineRunner(), Progress(1, "MB"))
    for file in (built / "train/extra").iterdir():
        assert (tmp_path / "target/train/extra" / file.name).read_bytes() == file.read_bytes()
    _flip(copied / "train/extra/weight.npy")
    with planned_copy(str(copied), str(tmp_path / "second")) as plan, pytest.raises(UserError, match=r"weight\.npy"):
        run_copy(plan, InlineRunner(), Progress(1, "MB"))


def test_inspect_prints_fields_and_the_values_of_a_record(
    built: Path, table: tuple[Path, Values], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(main, ["inspect", "--store", str(built)])
    assert "extra fields: age (int), box (vector of 3), caption (text), weight (float)" in result.output
    key, value = next(lmdb_shard.read(Path(Store.open(built).shard_paths("train")[1])))
    monkeypatch.setattr("prep.workers.WorkerPool", lambda jobs: nullcontext(InlineRunner()))
    result = CliRunner().invoke(main, ["inspect", "--store", str(built), "--key", key.decode(), "--json"])
    found, expected = json.loads(result.output)["extra"], table[1][Datum.decode(value).source.decode()]
    assert np.array_equal(found.pop("box"), expected["box"])
    assert found == {name: expected[name] for name in ("age", "weight", "caption")}
    assert "extra age" in CliRunner().invoke(main, ["inspect", "--store", str(built), "--key", key.decode()]).output


def test_an_export_can_be_built_again(built: Path, table: tuple[Path, Values], tmp_path: Path) -> None:
    for _ in range(2):  # the second call resumes
        export_split(Store.open(built), "train", tmp_path / "files", InlineRunner(), Progress(1, "files"))
    again = build_with(tmp_path / "files", tmp_path / "again", [f"{n}={tmp_path / 'files/extra.csv'}" for n in FIELDS])
    fields = again.split("train").extra
    assert {name: field.type for name, field in fields.items()} == TYPES
    values = {f"{source}.ppm": value for source, value in table[1].items()}
    assert_values(again, values)


@pytest.mark.usefixtures("inline")
def test_a_dry_run_checks_the_values_and_prints_types(photos: Path, table: tuple[Path, Values], tmp_path: Path) -> None:
    words = ["build-lmdb", str(photos), "--split", "train", "--store", str(tmp_path / "store"), "--on-bad", "skip"]
    words += ["--jobs", "1", "--dry-run", "--decode", "sample"]
    result = CliRunner().invoke(main, [*words, "--extra", f"box={table[0]}"])
    assert result.exit_code == 0 and "vector of 3 numbers for 71 images" in result.output, result.output
    result = CliRunner().invoke(main, [*words, "--extra", f"caption:int={table[0]}"])
    assert result.exit_code == 1 and "expected a whole number" in result.output
    assert not (tmp_path / "store").exists()
