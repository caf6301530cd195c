"""prep.build.resume: which changes of the source make a build refuse to continue, and which do not.

A build of four shards of 50 images is stopped after the first shard. Then the source is changed, and the same build
runs again. There are two correct results: the build is refused, or every record has the content that its file had when
the file was read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prep.build.plan import BuildPlan, BuildPolicy
from prep.build.split import build_split, estimate_build
from prep.console import Progress, UserError
from prep.inputs.listing import Listing
from prep.inputs.reader import ListOptions, Source
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from tests.helpers.building import (
    PPM,
    SKIP,
    STRICT,
    Records,
    Stopped,
    StoppingRunner,
    build,
    image_paths,
    make_pictures,
    modification_times,
    record_sources,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures") / "photos", 200, (30, 40))


@pytest.fixture(scope="module")
def half(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished store, in which one of four shards is finished."""
    store = tmp_path_factory.mktemp("half") / "store"
    with pytest.raises(Stopped):
        build(pictures, store, runner=StoppingRunner())
    return store


@pytest.fixture
def photos(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "photos"))


@pytest.fixture
def store(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "store"))


@pytest.fixture
def used(store: Path, records_of: Records) -> list[str]:
    """Paths of the inputs of the finished shard."""
    sources = record_sources(records_of(store, "train"))
    assert len(sources) == 50
    return sources


def change_content(path: Path) -> None:
    """Change the length of a file and keep its modification time."""
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"\0" * 7)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_time(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def test_a_changed_input_of_a_finished_shard_is_refused(photos: Path, store: Path, used: list[str]) -> None:
    """The error has the name of the file, the old value and the new value. The unfinished build is not changed."""
    before = modification_times(store)
    path = photos / used[17]
    mtime_ns, length = path.stat().st_mtime_ns, path.stat().st_size
    change_time(path)
    both = rf"modified at {mtime_ns / 1e9:.3f}, now {mtime_ns / 1e9 + 1:.3f}"
    with pytest.raises(UserError, match=rf"unfinished build in which {used[17]} was different: {both}.*--restart"):
        build(photos, store)
    os.utime(path, ns=(0, mtime_ns))
    change_content(path)
    with pytest.raises(UserError, match=f"{used[17]} was different: bytes {length:,}, now {length + 7:,}"):
        build(photos, store)
    with pytest.raises(UserError, match=f"{used[17]} was different"):
        estimate_build(list_source(photos, "train"), store, PPM, StoppingRunner())
    assert modification_times(store) == before
    path.write_bytes(path.read_bytes()[:-7])
    os.utime(path, ns=(0, mtime_ns))
    assert build(photos, store).split("train").records == 200


@pytest.mark.parametrize("change", [change_content, change_time])
def test_a_changed_input_that_is_not_stored_yet_is_read_as_it_is_now(
    change: Callable[[Path], None], photos: Path, store: Path, used: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first build after the change reports the change, and saves the new list of inputs.

    The second build after the change therefore reports nothing.
    """
    unused = sorted(set(image_paths(photos)) - set(used))
    for name in unused[:3]:
        change(photos / name)
    with pytest.raises(Stopped):
        build(photos, store, runner=StoppingRunner())
    assert "3 inputs changed since this build began; none of them is stored yet" in capsys.readouterr().err
    progress = Progress(200, "pictures")
    built = build(photos, store, progress=progress)
    assert progress.skipped == 100
    assert "changed" not in capsys.readouterr().err
    assert built.fingerprint == build(photos, store.parent / "fresh").fingerprint


def test_an_input_that_changed_after_a_second_run_built_its_shard_is_refused(
    photos: Path, store: Path, records_of: Records
) -> None:
    with pytest.raises(Stopped):
        build(photos, store, runner=StoppingRunner())
    second = record_sources(records_of(store, "train"))[50:]
    change_content(photos / second[0])
    with pytest.raises(UserError, match=f"{second[0]} was different"):
        build(photos, store)


def test_the_changed_content_is_stored(photos: Path, store: Path, used: list[str], records_of: Records) -> None:
    unused = sorted(set(image_paths(photos)) - set(used))[0]
    donor = used[0]
    shutil.copyfile(photos / donor, photos / unused)
    build(photos, store)
    data = {datum.source.decode(): datum.data for _, datum in records_of(store, "train")}
    assert data[unused] == data[donor]


def test_a_missing_or_a_new_input_is_refused(photos: Path, store: Path, used: list[str]) -> None:
    before = modification_times(store)
    unused = sorted(set(image_paths(photos)) - set(used))[0]
    for name in (used[0], unused):
        content, status = (photos / name).read_bytes(), (photos / name).stat()
        (photos / name).unlink()
        with pytest.raises(UserError, match=rf"{name} has gone \(200 inputs then, 199 now\).*--restart"):
            build(photos, store)
        (photos / name).write_bytes(content)
        os.utime(photos / name, ns=(0, status.st_mtime_ns))
    shutil.copy2(photos / unused, photos / "n2" / "new.JPEG")
    with pytest.raises(UserError, match=r"n2/new.JPEG is new \(200 inputs then, 201 now\)"):
        build(photos, store)
    assert modification_times(store) == before
    progress = Progress(201, "pictures")
    assert build(photos, store, policy=BuildPolicy(restart=True), progress=progress).split("train").records == 201
    assert progress.skipped == 0


def test_a_new_class_is_refused(photos: Path, store: Path) -> None:
    shutil.copytree(photos / "n1", photos / "n4")
    with pytest.raises(UserError, match=r"unfinished build of other classes \(3 classes then, 4 now\)"):
        build(photos, store)


def test_a_changed_label_of_a_stored_input_is_refused(pictures: Path, tmp_path: Path) -> None:
    """The source is a folder without class folders. The test changes one label in the label file of the source."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in pictures.glob("*/*"):
        shutil.copy2(path, flat / path.name)
    labels = tmp_path / "labels.txt"

    def with_labels(shift: dict[str, int]) -> Source:
        names = sorted(path.name for path in flat.iterdir())
        lines = [f"{name} {(k + shift.get(name, 0)) % 3}\n" for k, name in enumerate(names)]
        labels.write_text("".join(lines))
        return list_source(flat, "train", ListOptions(labels))

    source = with_labels({})
    store = tmp_path / "store"
    with pytest.raises(Stopped):
        build_split(source, store, PPM, StoppingRunner(), Progress(200, "pictures"))
    first = BuildPlan(source, store / "train", PPM, False).task(0).inputs[0]
    name = first.path.decode()
    with pytest.raises(UserError, match=f"{name} was different: label {first.label}, now {(first.label + 1) % 3}"):
        build_split(with_labels({name: 1}), store, PPM, StoppingRunner(), Progress(200, "pictures"))
    assert (
        build_split(with_labels({}), store, PPM, StoppingRunner(9), Progress(200, "pictures")).split("train").records
        == 200
    )


def test_a_listing_in_another_order_resumes_the_build(photos: Path, store: Path) -> None:
    """Another kind of source may list the same inputs in another order. The fingerprint must not change."""
    source = list_source(photos, "train")
    reversed_listing = Listing()
    for index in reversed(range(200)):
        item = source.inputs[index]
        reversed_listing.add(item.path, item.label, item.size, item.mtime_ns, item.location)
    progress = Progress(200, "pictures")
    other = Source(source.reader, "train", source.classes, reversed_listing)
    built = build_split(other, store, PPM, StoppingRunner(9), progress)
    assert progress.skipped == 50
    assert built.fingerprint == build(photos, store.parent / "fresh").fingerprint


def test_a_corrected_input_has_its_shard_built_again(photos: Path, tmp_path: Path, used: list[str]) -> None:
    """A build with --on-bad skip leaves a bad input out. Then the input is corrected.

    The next build, with --on-bad fail or skip, stores the corrected input.
    """
    content = (photos / used[3]).read_bytes()
    (photos / used[3]).write_bytes(b"no picture")
    for policy in (STRICT, SKIP):
        store = tmp_path / str(policy.skip_bad)
        (photos / used[3]).write_bytes(b"no picture")
        with pytest.raises(Stopped):
            build(photos, store, policy=SKIP, runner=StoppingRunner(2))
        stamp = (store / "train" / "00001" / "data.mdb").stat().st_mtime_ns
        (photos / used[3]).write_bytes(content)
        estimate = estimate_build(list_source(photos, "train"), store, PPM, StoppingRunner(), policy)
        progress = Progress(200, "pictures")
        built = build(photos, store, policy=policy, progress=progress)
        assert estimate.done == progress.skipped == 50
        assert built.split("train").account["bad"] == {}
        assert built.split("train").records == 200
        assert (store / "train" / "00001" / "data.mdb").stat().st_mtime_ns == stamp
        assert built.fingerprint == build(photos, tmp_path / "fresh").fingerprint


def test_a_file_that_changed_after_the_listing_is_named(photos: Path, tmp_path: Path, used: list[str]) -> None:
    for change in (change_content, change_time):
        store = tmp_path / change.__name__
        source = list_source(photos, "train")
        listed = source.inputs[image_paths(photos).index(used[5])]
        change(photos / used[5])
        with pytest.raises(
            UserError, match=rf"{used[5]} was changed after it was listed: {listed.size:,} bytes"
        ) as raised:
            build_split(source, store, PPM, StoppingRunner(9), Progress(200, "pictures"))
        values = re.search(r"listed: ([\d,]+) bytes then, ([\d,]+) now", str(raised.value))
        assert "modified" in str(raised.value) or (values is not None and values[1] != values[2])
        assert not (store / "manifest.json").exists()
        assert build(photos, store).split("train").records == 200


def test_anything_may_change_before_the_first_shard_is_finished(photos: Path, tmp_path: Path) -> None:
    """If a build was refused or stopped before its first shard was finished, settings and inputs can still change."""
    store = tmp_path / "store"
    (photos / "n1" / "bad.JPEG").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not an image"):
        build(photos, store)
    (photos / "n1" / "bad.JPEG").unlink()
    assert build(photos, store).split("train").records == 200
    with pytest.raises(UserError, match="--side 32"):
        build(photos, store, PPM.__class__(**{**vars(PPM), "side_px": 48}))


def test_a_finished_split_refuses_other_inputs(photos: Path, tmp_path: Path) -> None:
    """The manifest has a digest of the build plan. The modification times of the files are not part of this digest."""
    store = tmp_path / "store"
    build(photos, store)
    change_time(photos / image_paths(photos)[0])
    assert build(photos, store).split("train").records == 200
    change_content(photos / image_paths(photos)[0])
    with pytest.raises(UserError, match="a split train of other inputs"):
        build(photos, store)
    digest = json.loads((store / "manifest.json").read_bytes())["splits"]["train"]["account"]["plan"]
    assert Store.open(store).split("train").account["plan"] == digest


@pytest.mark.parametrize("what", ["nothing", "", "no JSON", "[]", "{}", "cut"])
@pytest.mark.parametrize("name", ["plan.json", "inputs.npz"])
def test_an_unfinished_build_that_cannot_be_read_must_be_discarded(
    photos: Path, store: Path, name: str, what: str
) -> None:
    path = store / "train" / ".build" / name
    content = path.read_bytes()
    path.unlink()
    if what != "nothing":
        path.write_bytes(content[: len(content) // 2] if what == "cut" else what.encode())
    with pytest.raises(UserError, match=r"--restart to discard|not begun by alexprep"):
        build(photos, store)
    if (store / "train" / ".build" / "plan.json").exists():
        assert build(photos, store, policy=BuildPolicy(restart=True)).split("train").records == 200
