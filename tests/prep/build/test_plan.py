"""prep.build.plan: division of the inputs of a split into shards, and sampling of inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from prep.build.plan import MAX_SHARD_RECORDS, BuildPlan
from prep.console import UserError
from prep.inputs.folder import FolderReader
from prep.inputs.listing import Listing
from prep.inputs.reader import Source
from tests.helpers.building import PPM


def plan_of(count: int) -> BuildPlan:
    listing = Listing()
    for number in range(count):
        listing.add(b"n1/%d.JPEG" % number, 0, number)
    return BuildPlan(Source(FolderReader(Path("/data")), "train", ("n1",), listing), Path("/store/train"), PPM, False)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 129, 200, 2048, 2049, 5000, 131_073])
def test_shards_are_cut_evenly(count: int) -> None:
    plan = plan_of(count)
    tasks = [plan.task(number) for number in range(plan.shard_count)]
    lengths = [len(task.inputs) for task in tasks]
    assert sum(lengths) == count
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= MAX_SHARD_RECORDS == 4096
    assert min(lengths) >= min(count, 32)
    if count > 32 * 64:
        assert len(tasks) >= 32
    assert [task.number for task in tasks] == list(range(plan.shard_count))
    assert [task.first_index for task in tasks] == [sum(lengths[:number]) for number in range(plan.shard_count)]
    assert [item for task in tasks for item in task.inputs] == [
        plan.source.inputs[k] for k in plan.permutation.tolist()
    ]
    assert [plan.count_inputs([number]) for number in range(plan.shard_count)] == lengths


def plan_with(*classes: str) -> BuildPlan:
    source = Source(FolderReader(Path("/data")), "train", classes, Listing())
    return BuildPlan(source, Path("/store/train"), PPM, False)


@pytest.mark.parametrize(("name", "characters"), [("", "0"), ("x" * 4097, "4,097")])
def test_class_names_that_no_store_may_have_are_refused_before_the_build(name: str, characters: str) -> None:
    plan_with("n1", "x" * 4096)
    with pytest.raises(UserError, match=f"has a name of {characters} characters, expected 1 to 4,096"):
        plan_with("n1", name)


def test_more_classes_than_a_store_may_have_are_refused_before_the_build() -> None:
    with pytest.raises(UserError, match="1,000,001 classes, expected at most 1,000,000"):
        plan_with(*map(str, range(1_000_001)))


def test_a_plan_without_inputs_has_no_shards() -> None:
    assert plan_of(0).shard_count == 0


@pytest.mark.parametrize("count", [1, 63, 200, 5000])
def test_a_sample_is_spread_over_the_unfinished_shards(count: int) -> None:
    plan = plan_of(count)
    for unfinished in (range(plan.shard_count), range(plan.shard_count // 2, plan.shard_count), [plan.shard_count - 1]):
        candidates = {item for number in unfinished for item in plan.task(number).inputs}
        sample = [item for task in plan.sample(unfinished) for item in task.inputs]
        assert set(sample) <= candidates
        assert min(len(candidates), 8) <= len(sample) == len(set(sample)) <= 32
        assert len(plan.sample(unfinished)) == min(16, len(unfinished))
    assert plan.sample([]) == []
