"""Tests of `alexprep join`, and of wrong uses of `build-lmdb --part`."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from prep.build import parts
from prep.build.parts import PartResult
from prep.store.manifest import Store
from tests.helpers.building import SKIP, build
from tests.prep.build.parts.part_builds import WORDS, alexprep, assert_same, run_part


def test_join_names_the_missing_shards_and_commands_that_build_them(photos: Path, whole: Store, tmp_path: Path) -> None:
    store = tmp_path / "a store"
    words = ("build-lmdb", photos, "--store", store, *WORDS, "--jobs", "1")
    assert alexprep(*words, "--part", "2/3").exit_code == 0
    shutil.rmtree(store / "train" / "00004")  # one shard of part 2 is missing
    result = alexprep("join", "--store", store)
    assert result.exit_code == 1 and "train cannot be completed" in result.stderr
    first, second, third = result.stdout.splitlines()
    assert first.startswith("train: part 1/3 lacks 3 shards (00000, 00003, 00006). Build with: alexprep build-lmdb")
    assert second.startswith("train: part 2/3 lacks 1 shard (00004).")
    rows = json.loads(alexprep("join", "--store", store, "--json").stdout)
    assert [row["shards"] for row in rows["missing"]] == [[0, 3, 6], [4], [2, 5]]
    for line in (first, second, third):
        command = shlex.split(line.partition("Build with: alexprep ")[2])
        assert alexprep(*command).exit_code == 0
    assert_same(store, whole)


def test_join_completes_a_store_whose_shards_are_all_finished(all_shards: Path, whole: Store) -> None:
    result = alexprep("join", "--store", all_shards)
    assert result.exit_code == 0, result.stderr
    assert whole.split("train").fingerprint[:16] in result.stdout
    assert_same(all_shards, whole)
    again = alexprep("join", "--store", all_shards)
    assert again.exit_code == 0 and "the split is complete; nothing to do" in again.stdout
    assert_same(all_shards, whole)


def test_join_counts_the_bad_inputs_of_all_parts(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(photos, tmp_path / "photos")
    for path in sorted(copy.glob("*/*"))[::150]:
        path.write_bytes(b"no image")
    reference = build(copy, tmp_path / "whole", policy=SKIP)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "_finish", lambda plan, store, part, policy: PartResult(0, None, {}))
        for number in (1, 2):
            run_part(copy, tmp_path / "store", number, 2, SKIP)
    refused = alexprep("join", "--store", tmp_path / "store", "--max-bad", "2")
    assert refused.exit_code == 1 and "3 inputs are not images, more than --max-bad 2 allows" in refused.stderr
    assert alexprep("join", "--store", tmp_path / "store", "--max-bad", "3").exit_code == 0
    assert Store.open(tmp_path / "store").splits == reference.splits


def test_join_of_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    result = alexprep("join", "--store", tmp_path / "nothing")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--part", "0/3"), "--part 0/3: expected I/N"),
        (("--part", "4/3"), "--part 4/3: expected I/N"),
        (("--part", "3"), "--part 3: expected I/N"),
        (("--part", "1/2", "--cluster", "local"), "--cluster divides the shards"),
        (("--part", "1/2", "--dry-run"), "--dry-run estimates the whole build"),
        (("--part", "1/2", "--restart"), "--restart would discard the shards of all parts"),
    ],
)
def test_wrong_uses_of_part_are_refused_in_one_line(
    photos: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    result = alexprep("build-lmdb", photos, "--store", tmp_path / "store", *words)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "store").exists()
