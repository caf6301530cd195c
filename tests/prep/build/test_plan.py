"""prep.build.plan: how inputs are cut into shards, and what of them may change while a build is unfinished.

A build is stopped after one of its shards (four, of 50 pictures each), something in the source is changed, and the same
command is given again. What was built must hold what the source held when it was read, or the command must refuse.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prep.build.plan import MAX_SHARD_RECORDS, BuildPlan, BuildPolicy
from prep.build.split import build_split, estimate_build
from prep.console import Progress, UserError
from prep.inputs.folder import FolderReader
from prep.inputs.listing import Listing
from prep.inputs.reader import Source
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from tests.helpers.building import (
    PPM,
    SKIP,
    STRICT,
    Records,
    Stop,
    Stopped,
    build,
    files_of,
    make_pictures,
    sources_of,
    stamps,
)

# Cutting


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


def test_no_inputs_no_shards() -> None:
    assert plan_of(0).shard_count == 0


@pytest.mark.parametrize("count", [1, 63, 200, 5000])
def test_sample_is_spread_over_what_is_left(count: int) -> None:
    plan = plan_of(count)
    for todo in (range(plan.shard_count), range(plan.shard_count // 2, plan.shard_count), [plan.shard_count - 1]):
        theirs = {item for number in todo for item in plan.task(number).inputs}
        sample = [item for task in plan.sample(todo) for item in task.inputs]
        assert set(sample) <= theirs
        assert min(len(theirs), 8) <= len(sample) == len(set(sample)) <= 32
        assert len(plan.sample(todo)) == min(16, len(todo))
    assert plan.sample([]) == []


# What changed while a build was unfinished


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures") / "photos", 200, (30, 40))


@pytest.fixture(scope="module")
def half(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one shard of four."""
    store = tmp_path_factory.mktemp("half") / "store"
    with pytest.raises(Stopped):
        build(pictures, store, runner=Stop())
    return store


@pytest.fixture
def photos(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "photos"))


@pytest.fixture
def store(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "store"))


@pytest.fixture
def used(store: Path, records_of: Records) -> list[str]:
    """The inputs of the finished shard."""
    found = sources_of(records_of(store, "train"))
    assert len(found) == 50
    return found


def other_content(path: Path) -> None:
    """Another picture of another length, and the old time."""
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"\0" * 7)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def other_time(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_changed_input_of_a_finished_shard_is_refused(photos: Path, store: Path, used: list[str]) -> None:
    """Naming the file and both values, and leaving everything as it was."""
    before = stamps(store)
    path = photos / used[17]
    then, length = path.stat().st_mtime_ns, path.stat().st_size
    other_time(path)
    both = rf"modified at {then / 1e9:.3f}, now {then / 1e9 + 1:.3f}"
    with pytest.raises(UserError, match=rf"unfinished build in which {used[17]} was different: {both}.*--restart"):
        build(photos, store)
    os.utime(path, ns=(0, then))
    other_content(path)
    with pytest.raises(UserError, match=f"{used[17]} was different: bytes {length:,}, now {length + 7:,}"):
        build(photos, store)
    with pytest.raises(UserError, match=f"{used[17]} was different"):
        estimate_build(list_source(photos, "train", None, None, ()), store, PPM, Stop())
    assert stamps(store) == before
    path.write_bytes(path.read_bytes()[:-7])
    os.utime(path, ns=(0, then))
    assert build(photos, store).split("train").records == 200


@pytest.mark.parametrize("change", [other_content, other_time])
def test_changed_input_that_is_not_in_use_is_read_as_it_is(
    change: Callable[[Path], None], photos: Path, store: Path, used: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once; what is changed again after that is held against the second listing."""
    free = sorted(set(files_of(photos)) - set(used))
    for name in free[:3]:
        change(photos / name)
    with pytest.raises(Stopped):
        build(photos, store, runner=Stop())
    assert "3 inputs changed since this build began; none is stored yet" in capsys.readouterr().err
    report = Progress(200, "pictures")
    built = build(photos, store, report=report)
    assert report.skipped == 100
    assert "changed" not in capsys.readouterr().err
    assert built.fingerprint == build(photos, store.parent / "fresh").fingerprint


def test_input_changed_after_its_shard_was_built_in_a_second_run(
    photos: Path, store: Path, records_of: Records
) -> None:
    with pytest.raises(Stopped):
        build(photos, store, runner=Stop())
    second = sources_of(records_of(store, "train"))[50:]
    other_content(photos / second[0])
    with pytest.raises(UserError, match=f"{second[0]} was different"):
        build(photos, store)


def test_content_that_changed_is_what_is_built(photos: Path, store: Path, used: list[str], records_of: Records) -> None:
    free = sorted(set(files_of(photos)) - set(used))[0]
    donor = used[0]
    shutil.copyfile(photos / donor, photos / free)
    build(photos, store)
    data = {datum.source.decode(): datum.data for _, datum in records_of(store, "train")}
    assert data[free] == data[donor]


def test_input_that_has_gone_or_is_new_is_refused(photos: Path, store: Path, used: list[str]) -> None:
    before = stamps(store)
    free = sorted(set(files_of(photos)) - set(used))[0]
    for name in (used[0], free):
        content, status = (photos / name).read_bytes(), (photos / name).stat()
        (photos / name).unlink()
        with pytest.raises(UserError, match=rf"{name} has gone \(200 inputs then, 199 now\).*--restart"):
            build(photos, store)
        (photos / name).write_bytes(content)
        os.utime(photos / name, ns=(0, status.st_mtime_ns))
    shutil.copy2(photos / free, photos / "n2" / "new.JPEG")
    with pytest.raises(UserError, match=r"n2/new.JPEG is new \(200 inputs then, 201 now\)"):
        build(photos, store)
    assert stamps(store) == before
    report = Progress(201, "pictures")
    assert build(photos, store, policy=BuildPolicy(restart=True), report=report).split("train").records == 201
    assert report.skipped == 0


def test_class_that_is_new_is_refused(photos: Path, store: Path) -> None:
    (photos / "n4").mkdir()
    with pytest.raises(UserError, match="unfinished build of 3 classes, this command has 4"):
        build(photos, store)


def test_other_label_is_refused(pictures: Path, tmp_path: Path) -> None:
    """Flat photographs with a label file, in which the label of a used one, and of all, becomes another."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in pictures.glob("*/*"):
        shutil.copy2(path, flat / path.name)
    labels = tmp_path / "labels.txt"

    def with_labels(shift: dict[str, int]) -> Source:
        names = sorted(path.name for path in flat.iterdir())
        lines = [f"{name} {(k + shift.get(name, 0)) % 3}\n" for k, name in enumerate(names)]
        labels.write_text("".join(lines))
        return list_source(flat, "train", labels, None, ())

    source = with_labels({})
    store = tmp_path / "store"
    with pytest.raises(Stopped):
        build_split(source, store, PPM, Stop(), Progress(200, "pictures"))
    first = BuildPlan(source, store / "train", PPM, False).task(0).inputs[0]
    name = first.path.decode()
    with pytest.raises(UserError, match=f"{name} was different: label {first.label}, now {(first.label + 1) % 3}"):
        build_split(with_labels({name: 1}), store, PPM, Stop(), Progress(200, "pictures"))
    assert build_split(with_labels({}), store, PPM, Stop(9), Progress(200, "pictures")).split("train").records == 200


def test_listing_in_another_order_goes_on(photos: Path, store: Path) -> None:
    """As another source may list the same inputs; the fingerprint is the same, too."""
    source = list_source(photos, "train", None, None, ())
    turned = Listing()
    for index in reversed(range(200)):
        item = source.inputs[index]
        turned.add(item.path, item.label, item.size, item.mtime_ns, item.location)
    report = Progress(200, "pictures")
    other = Source(source.reader, "train", source.classes, turned)
    built = build_split(other, store, PPM, Stop(9), report)
    assert report.skipped == 50
    assert built.fingerprint == build(photos, store.parent / "fresh").fingerprint


def test_mended_input_has_its_shard_built_again(photos: Path, tmp_path: Path, used: list[str]) -> None:
    """It was left out by a lenient build; strict or lenient, the build that follows takes it in."""
    content = (photos / used[3]).read_bytes()
    (photos / used[3]).write_bytes(b"no picture")
    for policy in (STRICT, SKIP):
        store = tmp_path / str(policy.skip_bad)
        (photos / used[3]).write_bytes(b"no picture")
        with pytest.raises(Stopped):
            build(photos, store, policy=SKIP, runner=Stop(2))
        stamp = (store / "train" / "00001" / "data.mdb").stat().st_mtime_ns
        (photos / used[3]).write_bytes(content)
        told = estimate_build(list_source(photos, "train", None, None, ()), store, PPM, Stop(), policy)
        report = Progress(200, "pictures")
        built = build(photos, store, policy=policy, report=report)
        assert told.done == report.skipped == 50
        assert built.split("train").account["bad"] == {}
        assert built.split("train").records == 200
        assert (store / "train" / "00001" / "data.mdb").stat().st_mtime_ns == stamp
        assert built.fingerprint == build(photos, tmp_path / "fresh").fingerprint


def test_file_changed_after_it_was_listed_is_named(photos: Path, tmp_path: Path, used: list[str]) -> None:
    for change in (other_content, other_time):
        store = tmp_path / change.__name__
        source = list_source(photos, "train", None, None, ())
        then = source.inputs[files_of(photos).index(used[5])]
        change(photos / used[5])
        with pytest.raises(UserError, match=rf"{used[5]} was changed after it was listed: {then.size:,} bytes") as told:
            build_split(source, store, PPM, Stop(9), Progress(200, "pictures"))
        values = re.search(r"listed: ([\d,]+) bytes then, ([\d,]+) now", str(told.value))
        assert "modified" in str(told.value) or (values is not None and values[1] != values[2])
        assert not (store / "manifest.json").exists()
        assert build(photos, store).split("train").records == 200


def test_nothing_is_finished_so_anything_may_change(photos: Path, tmp_path: Path) -> None:
    """A build that was refused or stopped before its first shard binds nobody to its settings and inputs."""
    store = tmp_path / "store"
    (photos / "n1" / "bad.JPEG").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not an image"):
        build(photos, store)
    (photos / "n1" / "bad.JPEG").unlink()
    assert build(photos, store).split("train").records == 200
    with pytest.raises(UserError, match="--side 32"):
        build(photos, store, PPM.__class__(**{**vars(PPM), "side_px": 48}))


def test_plan_is_in_the_account(photos: Path, tmp_path: Path) -> None:
    """Which is how a whole split knows its inputs again; times of change do not matter there."""
    store = tmp_path / "store"
    build(photos, store)
    other_time(photos / files_of(photos)[0])
    assert build(photos, store).split("train").records == 200
    other_content(photos / files_of(photos)[0])
    with pytest.raises(UserError, match="a split train of other inputs"):
        build(photos, store)
    digest = json.loads((store / "manifest.json").read_bytes())["splits"]["train"]["account"]["plan"]
    assert Store.open(store).split("train").account["plan"] == digest


@pytest.mark.parametrize("what", ["nothing", "", "no JSON", "[]", "{}", "cut"])
@pytest.mark.parametrize("name", ["plan.json", "inputs.npz"])
def test_unfinished_build_that_cannot_be_read(photos: Path, store: Path, name: str, what: str) -> None:
    path = store / "train" / ".build" / name
    content = path.read_bytes()
    path.unlink()
    if what != "nothing":
        path.write_bytes(content[: len(content) // 2] if what == "cut" else what.encode())
    with pytest.raises(UserError, match=r"--restart to discard|not begun by alexprep"):
        build(photos, store)
    if (store / "train" / ".build" / "plan.json").exists():
        assert build(photos, store, policy=BuildPolicy(restart=True)).split("train").records == 200
