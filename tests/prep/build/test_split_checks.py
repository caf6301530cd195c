"""A build and --dry-run check all splits before the first split is built, and refuse classes without photographs."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from prep.build.plan import BuildPolicy
from prep.build.resume import begun_classes
from prep.build.split import build_split, estimate_build
from prep.build.split_checks import check_splits, compare_splits, refuse_estimates
from prep.cli import main
from prep.console import DiskFull, Progress, UserError
from prep.files import hold_lock
from prep.inputs.reader import ListOptions, Source
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from tests.helpers.building import (
    PPM,
    SKIP,
    STRICT,
    InlineRunner,
    Stopped,
    StoppingRunner,
    build,
    make_pictures,
)
from tests.helpers.listings import paths_and_labels, touch

Usage = namedtuple("Usage", ["total", "used", "free"])
ALLOW = BuildPolicy(skip_bad=True, allow_empty_classes=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 3 classes."""
    return make_pictures(tmp_path_factory.mktemp("pictures") / "p", 24, (40, 60), distinct=2)


@pytest.fixture
def source(pictures: Path, tmp_path: Path) -> Path:
    """The splits train and val, with the same images."""
    for split in ("train", "val"):
        shutil.copytree(pictures, tmp_path / "source" / split)
    return tmp_path / "source"


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def list_splits(source: Path) -> list[Source]:
    sources: list[Source] = []
    for split in ("train", "val"):
        classes = sources[0].classes if sources else ()
        sources.append(list_source(source / split, split, store_classes=classes))
    return sources


def check(source: Path, store: Path, policy: BuildPolicy = STRICT) -> None:
    """Run the checks of the build and of --dry-run. Both must raise the same type of error, or both must raise none.

    Raises the error of the build.
    """
    sources, found = list_splits(source), []
    for attempt in (_check_build, _check_dry_run):
        try:
            attempt(sources, store, policy)
        except UserError as error:
            found.append(error)
    assert len(found) != 1, found
    assert not store.exists() or not (store / "train").exists()
    if found:
        assert type(found[0]) is type(found[1])
        raise found[0]


def _check_build(sources: Sequence[Source], store: Path, policy: BuildPolicy) -> None:
    check_splits(sources, store, PPM, InlineRunner(), policy, with_space=True)


def _check_dry_run(sources: Sequence[Source], store: Path, policy: BuildPolicy) -> None:
    estimates = [estimate_build(each, store, PPM, InlineRunner(), policy) for each in sources]
    refuse_estimates(sources, estimates, store, 1, policy)


def test_sound_splits_pass(source: Path, tmp_path: Path) -> None:
    check(source, tmp_path / "store")


def test_a_bad_input_of_val_is_found_before_train_is_built(source: Path, tmp_path: Path) -> None:
    (source / "val" / "n1" / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 input of 25 is not an image.*n1/bad\.jpg"):
        check(source, tmp_path / "store")
    check(source, tmp_path / "store", SKIP)
    with pytest.raises(UserError, match="more than --max-bad 0 allows"):
        _check_dry_run(list_splits(source), tmp_path / "store", BuildPolicy(True, 0))


def test_linked_photographs_of_val_name_the_option(source: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    (source / "val" / "n1" / "link.jpg").symlink_to(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="Pass --follow-links to follow 1 link"):
        check(source, tmp_path / "store")


def test_a_class_of_bad_inputs_alone_is_refused_before_the_build(source: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(source / split / "n2")
        (source / split / "n2").mkdir()
        (source / split / "n2" / "README.md").write_text("about")
        for k in range(7):
            (source / split / "n2" / f"{k}.txt").write_text("text")
        with pytest.raises(UserError, match=r"1 class has no photograph: n2\. n2/.*--allow-empty-classes"):
            check(source, tmp_path / "store", SKIP)
        check(source, tmp_path / "store", ALLOW)
        (source / split / "n2" / "z.jpg").write_bytes(next((source / split / "n1").iterdir()).read_bytes())
        check(source, tmp_path / "store", SKIP)  # a class may have eight bad inputs, if it has one photograph


def test_a_class_that_loses_its_photographs_is_refused_at_the_end(source: Path, tmp_path: Path) -> None:
    """The first bytes of the photographs are those of a JPEG, so only decoding shows that the photographs are bad."""
    for path in (source / "train" / "n2").iterdir():
        path.write_bytes(b"\xff\xd8\xff\xe0 cut off")
    bad = len(list((source / "train" / "n2").iterdir()))
    store = tmp_path / "store"
    with pytest.raises(UserError, match=rf"1 class would have no photographs.*n2 \({bad} inputs\).*allow-empty"):
        build(source / "train", store, policy=SKIP)
    assert not (store / "manifest.json").exists()
    built = build(source / "train", store, policy=ALLOW)
    assert built.classes == ("n1", "n2", "n3")
    assert built.split("train").label_counts[1] == 0 < built.split("train").label_counts[0]


def test_both_splits_must_fit_on_the_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two splits needs 98 KB: 24 records, each of one page of 4096 bytes."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 0, 120_000))
    with pytest.raises(DiskFull, match=r"196\.6 KB needed for 48 images of all splits, 120\.0 KB free"):
        check(source, tmp_path / "store")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 0, 180_000))
    check(source, tmp_path / "store")


def test_an_unfinished_val_of_other_inputs_is_found_before_train_is_built(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    val = list_splits(source)[1]
    with pytest.raises(Stopped):
        build_split(val, store, PPM, StoppingRunner(), Progress(24, "pictures"), STRICT)
    assert begun_classes(store) == ("n1", "n2", "n3")
    next((source / "val" / "n1").iterdir()).rename(source / "val" / "n1" / "new.jpg")
    with pytest.raises(UserError, match="holds an unfinished build of other inputs"):
        check(source, store)


def test_an_unfinished_build_keeps_the_order_of_its_classes(pictures: Path, tmp_path: Path) -> None:
    """An earlier version of alexprep, which sorted numbers in class names as text, began the build."""
    photos, store, text_order = tmp_path / "photos", tmp_path / "store", ("1", "10", "2")
    shutil.copytree(pictures, photos)
    for old, new in zip(("n1", "n2", "n3"), ("2", "1", "10"), strict=True):
        (photos / old).rename(photos / new)
    begun = list_source(photos, "train", store_classes=text_order)
    with pytest.raises(Stopped):
        build_split(begun, store, PPM, StoppingRunner(), Progress(24, "pictures"), STRICT)
    words = ("build-lmdb", photos, "--store", store, "--side", "32", "--format", "ppm", "--jobs", "1")
    (photos / "3").mkdir()
    shutil.copy(next((photos / "1").iterdir()), photos / "3" / "x.jpg")
    result = alexprep(*words, "--dry-run")
    assert result.exit_code == 1 and "Only in this split: 3." in result.stderr and "--restart" in result.stderr
    assert "labels: 0 1, 1 2, 2 3, 3 10" in alexprep(*words, "--dry-run", "--restart").stdout
    shutil.rmtree(photos / "3")
    result = alexprep(*words)
    assert result.exit_code == 0, result.output
    assert "keep the labels of the store: label 1 is 10" in result.stderr
    assert Store.open(store).classes == text_order


def test_two_splits_of_the_same_files_are_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(source, tmp_path / "store")
    assert "train and val have the same files" in capsys.readouterr().err


def test_a_build_at_work_is_found_by_a_dry_run(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with hold_lock(store, "build"), pytest.raises(UserError, match="another build is at work"):
        _check_dry_run(list_splits(source), store, STRICT)
    _check_dry_run(list_splits(source), store, STRICT)


def test_a_store_that_cannot_be_written_is_found_by_a_dry_run(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for store in (tmp_path / "file", tmp_path / "file" / "store"):
        result = alexprep("build-lmdb", source, "--store", store, "--dry-run")
        assert result.exit_code == 2 and "file is a file, not a folder" in result.stderr


def test_the_command_compares_the_splits_before_it_builds(source: Path, tmp_path: Path) -> None:
    (source / "val" / "n3").rename(source / "val" / "n4")
    for words in ([], ["--dry-run"]):
        result = alexprep("build-lmdb", source, "--store", tmp_path / "store", *words)
        assert result.exit_code == 1
        assert "Only in this split: n4. Only in the store: n3." in result.stderr
        assert not (tmp_path / "store").exists()


def test_a_label_file_that_nothing_uses_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a.jpg 0\n")
    result = alexprep("build-lmdb", source, "--store", tmp_path / "s", "--labels", tmp_path / "labels.txt", "--dry-run")
    assert result.exit_code == 2 and "give the labels of train and val" in result.stderr


def test_what_is_left_out_is_in_the_account_and_classes_are_listed_with_labels(source: Path, tmp_path: Path) -> None:
    (source / "train" / "README.md").write_text("about")
    (source / "train" / "lost+found").mkdir()
    store, split = tmp_path / "store", ["--split", "train", "--side", "32", "--jobs", "1"]
    for words in (["--dry-run"], []):
        result = alexprep("build-lmdb", source, "--store", store, *split, *words)
        assert result.exit_code == 0, result.output
        assert "labels: 0 n1, 1 n2, 2 n3\n" in result.stdout
        assert "not part of the data set: 2 entries" in result.stdout or "README.md" in result.stdout
    account = Store.open(store).split("train").account
    assert account["inputs"] == account["kept"] == 24 and account["bad"] == {}
    assert account["ignored"] == {
        "a file beside the class folders": 1,
        "a folder of the system or of a program, not a class": 1,
    }
    lines = [json.loads(line) for line in (store / "train" / "inputs.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines if line["fate"] == "ignored"} == {"README.md", "lost+found"}
    described = alexprep("inspect", "--store", store).stdout
    assert "3 classes, by label: 0 n1, 1 n2, 2 n3" in described
    assert "not part of the data set: a file beside the class folders (1)" in described
    assert alexprep("verify", "--store", store, "--jobs", "1").exit_code == 0


def test_a_class_that_loses_its_inputs_only_when_decoded_is_found_by_a_dry_run(source: Path, tmp_path: Path) -> None:
    """The inputs begin like JPEGs, so only decoding shows that they are bad.

    The sample that --dry-run decodes contains all inputs of the class.
    """
    for folder in (source / "train").iterdir():
        for path in sorted(folder.iterdir())[5:]:
            path.unlink()
    for path in (source / "train" / "n2").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    listed = list_splits(source)[:1]
    with pytest.raises(UserError, match=r"1 class has no photograph: n2\. n2/.*cannot be decoded"):
        _check_dry_run(listed, tmp_path / "store", SKIP)
    for _ in range(2):  # after the first attempt, all shards are finished
        with pytest.raises(UserError, match=r"1 class would have no photographs.*bad input is n2/"):
            build_split(listed[0], tmp_path / "store", PPM, InlineRunner(), Progress("", 24), SKIP)
        with pytest.raises(UserError, match=r"1 class has no photograph: n2"):
            _check_dry_run(listed, tmp_path / "store", SKIP)
    _check_dry_run(listed, tmp_path / "store", ALLOW)


def test_a_line_that_labels_images_of_both_splits_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        touch(tmp_path / "in" / split, "1.jpg", "2.jpg")
    labels = tmp_path / "labels.csv"
    labels.write_text("1.jpg,cat\n2.jpg,dog\n")
    for option in ((), ("--dry-run",)):
        result = alexprep("build-lmdb", tmp_path / "in", "--store", tmp_path / "s", "--labels", labels, *option)
        assert result.exit_code == 1
        assert "2 lines would label images of both splits (first: 1.jpg, line 1)" in result.output
    labels.write_text("train/1.jpg,cat\ntrain/2.jpg,dog\nval/1.jpg,dog\nval/2.jpg,cat\n")
    splits = {split: list_source(tmp_path / "in" / split, split, ListOptions(labels)) for split in ("train", "val")}
    compare_splits(list(splits.values()))
    assert [[item.label for item in source.inputs] for source in splits.values()] == [[0, 1], [1, 0]]


def test_one_label_file_may_label_images_of_both_splits_on_lines_of_their_own(tmp_path: Path) -> None:
    """cat.0.jpg and cat.1.jpg are different images, as in Kaggle's data set of cats and dogs."""
    touch(tmp_path / "in" / "train", "cat.0.jpg", "dog.0.jpg", "dog.0.1.jpg")
    touch(tmp_path / "in" / "val", "cat.1.jpg", "dog.1.jpg")
    labels = tmp_path / "labels.csv"

    def read(content: str) -> dict[str, list[tuple[bytes, int]]]:
        labels.write_text(content)
        splits = [list_source(tmp_path / "in" / split, split, ListOptions(labels)) for split in ("train", "val")]
        compare_splits(splits)
        return {source.split: paths_and_labels(source) for source in splits}

    lines = "cat.0.jpg,cat\ncat.1.jpg,cat\ndog.0.jpg,dog\ndog.1.jpg,dog\ndog.0.1.jpg,dog\n"
    expected = {
        "train": [(b"cat.0.jpg", 0), (b"dog.0.1.jpg", 1), (b"dog.0.jpg", 1)],
        "val": [(b"cat.1.jpg", 0), (b"dog.1.jpg", 1)],
    }
    assert read(lines) == read(lines.replace(".jpg", "")) == expected
    shutil.copy(tmp_path / "in" / "val" / "cat.1.jpg", tmp_path / "in" / "train" / "cat.1.jpg")
    with pytest.raises(UserError, match=r"1 line would label images of both splits \(first: cat\.1\.jpg, line 2\)"):
        read(lines)
    assert read(lines + "cat.1.jpg,cat\n")["val"] == expected["val"]  # the file has one line for each split


def test_numbers_alone_are_not_read_for_both_splits(tmp_path: Path) -> None:
    """In a file of numbers, line k is the label of the k-th image of a split. The two splits have different images."""
    for split, prefix in (("train", "a"), ("val", "b")):
        touch(tmp_path / "in" / split, f"{prefix}1.jpg", f"{prefix}2.jpg")
    (tmp_path / "labels.txt").write_text("0\n1\n")
    options = ListOptions(tmp_path / "labels.txt", "sorted-from-0")
    with pytest.raises(UserError, match=r"2 lines would label images of both splits \(first: line 1\)\. Build each"):
        compare_splits([list_source(tmp_path / "in" / split, split, options) for split in ("train", "val")])
