"""prep.build and prep.runners: the store against the photographs, interrupted builds against a whole one.

Records are read by lmdb and protobuf; labels are compared with the folders and the ground truth, pixels with Pillow's
resize in floating point, sums with NumPy. A build that was stopped, by a signal, by kill -9, before any one of its
steps on the disk, must be finished by the same command with the fingerprint of a build that ran through.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from PIL import Image
from threadpoolctl import threadpool_limits

from prep import shard
from prep.build import Runner, ShardTask, build_shard, build_split
from prep.cli import main
from prep.console import Progress, UserError
from prep.manifest import Settings, Store, StoreError
from prep.runners import run_local
from prep.sources import read_source

Records = Callable[[Path, str], list[tuple[bytes, Any]]]

PPM = Settings(32, False, "ppm", 90, "area", 0)
CLASSES = ("n1", "n2", "n3")
DEADLINE_S = 60.0


def run_here(tasks: Sequence[ShardTask], jobs: int, report: Progress) -> None:
    """The runner of most tests: no other process, and one BLAS thread as a worker has."""
    with threadpool_limits(1, "blas"):
        for task in tasks:
            build_shard(task, report.advance)


class Stopped(Exception):
    """What a runner of a test raises to leave a build unfinished."""


def run_one_then_stop(tasks: Sequence[ShardTask], jobs: int, report: Progress) -> None:
    run_here(tasks[:1], jobs, report)
    raise Stopped


def build(
    folder: Path,
    store: Path,
    settings: Settings = PPM,
    *,
    split: str = "train",
    jobs: int = 1,
    skip_bad: bool = False,
    run: Runner = run_here,
    report: Progress | None = None,
) -> Store:
    known = Store.open(store).classes if (store / "manifest.json").exists() else ()
    source = read_source(folder, split, None, None, known)
    report = report or Progress(len(source.inputs), "pictures")
    return build_split(source, store, settings, jobs, skip_bad, run, report)


def make_pictures(folder: Path, count: int, sizes: tuple[int, int], distinct: int = 24) -> Path:
    """`count` JPEGs in three class folders; every `distinct`-th has the same content, which is quick to make."""
    rng = np.random.default_rng(count)
    contents = []
    for _ in range(distinct):
        height, width = (int(n) for n in rng.integers(*sizes, size=2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG")
        contents.append(out.getvalue())
    for number in range(count):
        name = CLASSES[int(rng.integers(3))]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{name}_{number}.JPEG").write_bytes(contents[number % distinct])
    return folder


def files_of(folder: Path) -> list[str]:
    """Every file's path below `folder`, by bytes."""
    return sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("*/*"))


def sources_of(records: Sequence[tuple[bytes, Any]]) -> list[str]:
    return [datum.source.decode() for _, datum in records]


def decoded(datum: Any) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(datum.data)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 small pictures: four shards."""
    return make_pictures(tmp_path_factory.mktemp("small") / "photos", 200, (30, 70))


@pytest.fixture(scope="module")
def small_store(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("small_store") / "store"
    build(small, store)
    return store


@pytest.fixture
def copy_of_small(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "photos"))


# What is in the store


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_record_holds_its_own_picture(split: str, photo_folder: Path, tmp_path: Path, records_of: Records) -> None:
    """Whole pictures by the bilinear filter, which Pillow has too: each within rounding of its own source."""
    settings = Settings(48, True, "ppm", 90, "bilinear", 5)
    build(photo_folder / split, tmp_path / "store", settings, split=split)
    for _, datum in records_of(tmp_path / "store", split):
        with Image.open(photo_folder / split / os.fsdecode(datum.source)) as image:
            planes = image.convert("RGB").split()
        got = decoded(datum)
        assert got.shape == (datum.height, datum.width, 3)
        assert min(got.shape[:2]) == 48
        size = (datum.width, datum.height)
        floats = [Image.fromarray(np.asarray(plane, np.float32)) for plane in planes]
        expected = np.dstack([np.asarray(plane.resize(size, Image.Resampling.BILINEAR)) for plane in floats])
        assert np.abs(got - np.clip(expected, 0, 255)).max() <= 0.51


def test_training_labels_are_the_folders(store: Path, photo_folder: Path, records_of: Records) -> None:
    records = records_of(store, "train")
    names = sorted(path.name for path in (photo_folder / "train").iterdir())
    assert sorted(sources_of(records)) == files_of(photo_folder / "train")
    for _, datum in records:
        assert datum.HasField("label")
        assert names[datum.label] == os.fsdecode(datum.source).split("/")[0]
    manifest = json.loads((store / "manifest.json").read_bytes())
    assert manifest["classes"] == names
    counts = Counter(path.split("/")[0] for path in files_of(photo_folder / "train"))
    assert manifest["splits"]["train"]["label_counts"] == [counts[name] for name in names]


def test_validation_labels_are_the_ground_truth(store: Path, photo_folder: Path, records_of: Records) -> None:
    truth = [int(line) for line in (photo_folder / "val_ground_truth.txt").read_text().split()]
    names = sorted(path.name for path in (photo_folder / "val").iterdir())
    expected = {name: number - 1 for name, number in zip(names, truth, strict=True)}
    assert {datum.source.decode(): datum.label for _, datum in records_of(store, "val")} == expected


def test_default_records_are_jpegs_of_the_central_square(store: Path, records_of: Records) -> None:
    for split in ("train", "val"):
        for _, datum in records_of(store, split):
            assert (datum.height, datum.width, datum.channels) == (256, 256, 3)
            with Image.open(io.BytesIO(datum.data)) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))


def test_keys_count_up_from_zero(small_store: Path, records_of: Records) -> None:
    keys = [key for key, _ in records_of(small_store, "train")]
    assert keys == [f"{i:08d}".encode() for i in range(200)]
    assert len(list((small_store / "train").glob("0*"))) == 4


def test_mean_image_is_the_mean_of_central_squares(small: Path, tmp_path: Path, records_of: Records) -> None:
    build(small, tmp_path / "store", replace(PPM, keep_aspect=True))
    squares = []
    for _, datum in records_of(tmp_path / "store", "train"):
        top, left = (datum.height - 32) // 2, (datum.width - 32) // 2
        squares.append(decoded(datum)[top : top + 32, left : left + 32].astype(np.float64))
    assert max(datum.width for _, datum in records_of(tmp_path / "store", "train")) > 32
    mean = np.load(tmp_path / "store" / "train" / "mean_image.npy")
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, np.mean(squares, axis=0), rtol=1e-6)


def test_account_adds_up(store: Path) -> None:
    """conftest.py makes in each split one grey, one CMYK file and one PNG, and one with orientation 6 in train."""
    splits = json.loads((store / "manifest.json").read_bytes())["splits"]
    odd = {"grey": 1, "cmyk": 1, "png": 1}
    for split, inputs, turned in (("train", 30, {"6": 1}), ("val", 12, {})):
        account = splits[split]["account"]
        assert account["inputs"] == account["kept"] == splits[split]["records"] == inputs
        assert account["converted"] == odd
        assert account["exif_orientation"] == turned
        assert account["bad"] == {}
        lines = [json.loads(line) for line in (store / split / "inputs.jsonl").read_text().splitlines()]
        assert Counter(how for line in lines for how in line.get("how", ())) == odd
        assert [line["exif_orientation"] for line in lines if "exif_orientation" in line] == [6] * len(turned)
        assert len(lines) == 3 + len(turned)


def test_bytes_and_pixels_are_counted(small_store: Path, records_of: Records) -> None:
    split = Store.open(small_store).split("train")
    assert split.pixels == 200 * 32 * 32
    assert split.records == sum(s.records for s in split.shards) == 200
    assert split.bytes == sum(s.bytes for s in split.shards)
    assert split.bytes == sum(len(value) for s in split.shards for _, value in shard.read(small_store / s.path))


# The order of the records


def test_order_is_a_permutation_that_depends_on_the_seed_alone(
    small: Path, small_store: Path, tmp_path: Path, records_of: Records
) -> None:
    order = sources_of(records_of(small_store, "train"))
    assert sorted(order) == files_of(small)
    assert order != sorted(order)
    for number, changed in enumerate((replace(PPM, side_px=40), replace(PPM, format="jpeg", quality=50))):
        build(small, tmp_path / str(number), changed)
        assert sources_of(records_of(tmp_path / str(number), "train")) == order
    build(small, tmp_path / "seed", replace(PPM, seed=1))
    other = sources_of(records_of(tmp_path / "seed", "train"))
    assert sorted(other) == sorted(order)
    assert sum(a == b for a, b in zip(order, other, strict=True)) < 10


def test_order_mixes_the_classes(small_store: Path, records_of: Records) -> None:
    """The mean place of each class is the middle, within five standard deviations of a random permutation."""
    labels = np.array([datum.label for _, datum in records_of(small_store, "train")])
    n = len(labels)
    for label in range(3):
        places = np.flatnonzero(labels == label)
        k = len(places)
        spread = np.sqrt((n + 1) * (n - k) / (12 * k))
        assert abs(places.mean() - (n - 1) / 2) < 5 * spread


def test_order_of_the_others_stays_when_one_is_taken_out(
    small_store: Path, copy_of_small: Path, tmp_path: Path, records_of: Records
) -> None:
    order = sources_of(records_of(small_store, "train"))
    (copy_of_small / order[17]).unlink()
    build(copy_of_small, tmp_path / "store")
    assert sources_of(records_of(tmp_path / "store", "train")) == order[:17] + order[18:]


# Workers


def test_any_number_of_jobs_gives_the_same_records(
    small: Path, small_store: Path, tmp_path: Path, records_of: Records
) -> None:
    expected = [(key, datum.SerializeToString()) for key, datum in records_of(small_store, "train")]
    whole = Store.open(small_store)
    for jobs in (1, 2, 3):
        path = tmp_path / str(jobs)
        report = Progress(200, "pictures")
        built = build(small, path, jobs=jobs, run=run_local, report=report)
        assert built.fingerprint == whole.fingerprint
        assert built.splits == whole.splits
        assert [(key, datum.SerializeToString()) for key, datum in records_of(path, "train")] == expected
        assert (path / "train" / "mean_image.npy").read_bytes() == (
            small_store / "train" / "mean_image.npy"
        ).read_bytes()
        assert report.done == 200
        assert not (path / "train" / ".build").exists()


def test_runner_leaves_the_environment_as_it_was(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before = dict(os.environ)
    run_local([], 2, Progress(0, "pictures"))
    with pytest.raises(UserError):  # a shard whose source is not there
        build(small, tmp_path / "store", run=lambda tasks, jobs, report: run_local([lost(tasks[0])], jobs, report))
    assert dict(os.environ) == before


def lost(task: ShardTask) -> ShardTask:
    return replace(task, source=task.source / "nowhere")


# Bad files


BAD = {
    "n1/bad_empty.JPEG": b"",
    "n1/bad_text.JPEG": b"no picture\n",
    "n2/bad_too.JPEG": b"neither\n",
    "n3/bad_cut.JPEG": b"\xff\xd8\xff\xe0 cut off",
}


@pytest.fixture
def with_bad(copy_of_small: Path) -> Path:
    for name, content in BAD.items():
        (copy_of_small / name).write_bytes(content)
    return copy_of_small


def test_skipped_files_are_counted_and_named(with_bad: Path, tmp_path: Path, records_of: Records) -> None:
    built = build(with_bad, tmp_path / "store", skip_bad=True)
    account = built.split("train").account
    assert account["inputs"] == 204
    assert account["kept"] == built.split("train").records == 200
    assert sum(account["bad"].values()) == 4
    assert account["bad"]["empty file"] == 1
    assert account["bad"]["not a picture in a format that is known"] >= 2
    assert set(sources_of(records_of(tmp_path / "store", "train"))) == set(files_of(with_bad)) - set(BAD)
    lines = [json.loads(line) for line in (tmp_path / "store" / "train" / "inputs.jsonl").read_text().splitlines()]
    assert {line["source"]: line["fate"] for line in lines} == dict.fromkeys(BAD, "bad")
    assert all(line["why"] for line in lines)


def test_bad_file_stops_the_command_which_names_it(with_bad: Path, tmp_path: Path) -> None:
    words = ["build-lmdb", str(with_bad), "--store", str(tmp_path / "store"), "--side", "32", "--jobs", "1"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert any(name in result.stderr for name in BAD)
    assert "--on-bad skip" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_mended_file_lets_the_same_command_finish(with_bad: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad_"):
        build(with_bad, tmp_path / "store")
    good = (with_bad / "n1" / min(p.name for p in (with_bad / "n1").iterdir() if p.name.startswith("n1"))).read_bytes()
    for name in BAD:
        (with_bad / name).write_bytes(good)
    assert build(with_bad, tmp_path / "store").fingerprint == build(with_bad, tmp_path / "other").fingerprint


def test_bad_file_that_an_earlier_run_skipped(with_bad: Path, tmp_path: Path) -> None:
    """Shards that a run with --on-bad skip finished: the strict command looks at them again, the other finishes."""

    def all_but_the_end(tasks: Sequence[ShardTask], jobs: int, report: Progress) -> None:
        run_here(tasks, jobs, report)
        raise Stopped

    with pytest.raises(Stopped):
        build(with_bad, tmp_path / "store", skip_bad=True, run=all_but_the_end)
    with pytest.raises(UserError, match=r"bad_.*Mend it"):
        build(with_bad, tmp_path / "store")
    assert not (tmp_path / "store" / "manifest.json").exists()
    shutil.copytree(tmp_path / "store", tmp_path / "mended")
    assert build(with_bad, tmp_path / "store", skip_bad=True).split("train").records == 200
    good = next(path for path in sorted(with_bad.glob("*/*")) if "bad_" not in path.name)
    for name in BAD:
        shutil.copy(good, with_bad / name)
    assert build(with_bad, tmp_path / "mended").split("train").records == 200 + len(BAD)


def test_shard_without_a_picture_is_left_out(
    small_store: Path, copy_of_small: Path, tmp_path: Path, records_of: Records
) -> None:
    for path in sources_of(records_of(small_store, "train"))[50:100]:
        (copy_of_small / path).write_bytes(b"no picture")
    built = build(copy_of_small, tmp_path / "store", skip_bad=True)
    assert [s.path for s in built.split("train").shards] == ["train/00000", "train/00002", "train/00003"]
    assert all(s.records == 50 for s in built.split("train").shards)
    assert built.split("train").records == 150


def test_not_one_picture(tmp_path: Path) -> None:
    (tmp_path / "photos" / "n1").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "photos" / "n1" / f"{number}.JPEG").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not one of 3 inputs is a picture"):
        build(tmp_path / "photos", tmp_path / "store", skip_bad=True)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_file_that_vanished_is_a_bad_one(copy_of_small: Path, tmp_path: Path) -> None:
    def after_removal(tasks: Sequence[ShardTask], jobs: int, report: Progress) -> None:
        (copy_of_small / files_of(copy_of_small)[3]).unlink()
        run_here(tasks, jobs, report)

    gone = files_of(copy_of_small)[3]
    with pytest.raises(UserError, match=f"{gone}: cannot be read: No such file"):
        build(copy_of_small, tmp_path / "store", run=after_removal)


# Again, otherwise, at the same time


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_second_run_does_nothing(small: Path, small_store: Path) -> None:
    def never(tasks: Sequence[ShardTask], jobs: int, report: Progress) -> None:
        raise AssertionError("there is nothing to run")

    before, fingerprint = stamps(small_store), Store.open(small_store).fingerprint
    report = Progress(200, "pictures")
    assert build(small, small_store, run=never, report=report).fingerprint == fingerprint
    assert stamps(small_store) == before
    assert report.done == report.skipped == 200


CHANGES = [
    ({"side_px": 40}, "--side 32", "40"),
    ({"keep_aspect": True}, "--keep-aspect False", "True"),
    ({"format": "jpeg"}, "--format ppm", "jpeg"),
    ({"quality": 75}, "--quality 90", "75"),
    ({"filter": "lanczos"}, "--filter area", "lanczos"),
    ({"seed": 9}, "--seed 0", "9"),
]


@pytest.mark.parametrize(("changes", "has", "asked"), CHANGES)
def test_other_settings_are_refused(
    changes: dict[str, Any], has: str, asked: str, small: Path, small_store: Path
) -> None:
    before = stamps(small_store)
    with pytest.raises(UserError, match=f"{has}, this command says {asked}"):
        build(small, small_store, replace(PPM, **changes))
    assert stamps(small_store) == before


def test_other_settings_are_refused_by_an_unfinished_build(small: Path, small_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(Stopped):
        build(small, store, run=run_one_then_stop)
    for changes, has, asked in CHANGES:
        with pytest.raises(UserError, match=f"{has}, this command says {asked}"):
            build(small, store, replace(PPM, **changes))
    assert build(small, store).fingerprint == Store.open(small_store).fingerprint


def test_other_inputs_are_refused(small: Path, copy_of_small: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        build(small, tmp_path / "unfinished", run=run_one_then_stop)
    build(small, tmp_path / "whole")
    (copy_of_small / files_of(copy_of_small)[0]).unlink()
    with pytest.raises(UserError, match="unfinished build of other inputs"):
        build(copy_of_small, tmp_path / "unfinished")
    with pytest.raises(UserError, match="a split train of other inputs"):
        build(copy_of_small, tmp_path / "whole")


def test_folder_of_someone_else_is_left_alone(small: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / "train").mkdir(parents=True)
    (tmp_path / "store" / "train" / "precious.txt").write_text("mine")
    with pytest.raises(StoreError, match="no build of ours began it"):
        build(small, tmp_path / "store")
    assert (tmp_path / "store" / "train" / "precious.txt").read_text() == "mine"


def test_the_other_split_joins_the_store(small: Path, tmp_path: Path, records_of: Records) -> None:
    store = tmp_path / "store"
    first = build(small, store)
    both = build(small, store, split="val")
    assert list(both.splits) == ["train", "val"]
    assert both.splits["train"] == first.splits["train"]
    assert both.fingerprint != first.fingerprint
    assert len(records_of(store, "train")) == len(records_of(store, "val")) == 200
    with pytest.raises(UserError, match="--side 32, this command says 64"):
        build(small, store, replace(PPM, side_px=64), split="val")


def test_second_builder_is_refused(small: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with open(store / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build is at work"):
            build(small, store)
        assert [path.name for path in store.iterdir()] == [".lock"]
    build(small, store)


def test_full_disk_is_said_and_the_build_goes_on_later(
    small: Path, small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = shard.write, []

    def full(folder: Path, records: Any) -> tuple[int, int, str]:
        calls.append(folder)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return write(folder, records)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "write", full)
        with pytest.raises(UserError, match=r"No space left on device.*free on that disk"):
            build(small, tmp_path / "store")
    report = Progress(200, "pictures")
    built = build(small, tmp_path / "store", report=report)
    assert built.fingerprint == Store.open(small_store).fingerprint
    assert report.skipped == 100


# Stopped and given again


STEPS = """
import json, os, sys
from pathlib import Path
from prep.build import build_shard, build_split
from prep.console import Progress
from prep.manifest import Settings
from prep.sources import read_source

photos, work = Path(sys.argv[1]), Path(sys.argv[2])
source = read_source(photos, "train", None, None, ())
settings = Settings(32, False, "ppm", 90, "area", 0)
left = None


def watch(event, args):
    global left
    writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
    if left is not None and (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")):
        if left == 0:
            os._exit(9)
        left -= 1


def run_here(tasks, jobs, report):
    for task in tasks:
        build_shard(task, report.advance)


def in_a_child(store, steps):
    global left
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        left = steps
        try:
            build_split(source, store, settings, 1, False, run_here, Progress(1, "pictures"))
        except Exception as error:
            print(json.dumps({"error": str(error)}), flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


sys.addaudithook(watch)
steps, code = 0, 9
while code == 9:
    store = work / f"{steps:03d}"
    code = in_a_child(store, steps)
    again = in_a_child(store, None)
    print(json.dumps({"steps": steps, "code": code, "again": again}), flush=True)
    steps += 1
"""


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Builds that died (os._exit: nothing is cleaned up) before their 1st, 2nd, 3rd… step on the disk, given again.

    A step is a folder made, a file opened to write, a rename or a removal. The last build of them ran through.
    """
    photos = make_pictures(tmp_path_factory.mktemp("stepped") / "photos", 66, (32, 34))  # two shards
    work = photos.parent
    ended = subprocess.run(
        [sys.executable, "-c", STEPS, str(photos), str(work)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 0, ended.stderr
    return work, [json.loads(line) for line in ended.stdout.splitlines()]


def test_killed_before_any_step_the_same_command_finishes(stepped: tuple[Path, list[dict[str, Any]]]) -> None:
    work, said = stepped
    ends = [line for line in said if "steps" in line]
    assert len(ends) > 20
    assert [line["code"] for line in ends] == [9] * (len(ends) - 1) + [0]
    failed = [line for line in said if "error" in line or line["again"] != 0]
    assert failed == []
    whole = Store.open(work / f"{ends[-1]['steps']:03d}")
    assert whole.split("train").records == 66
    for line in ends:
        again = Store.open(work / f"{line['steps']:03d}")
        assert again.fingerprint == whole.fingerprint
        assert again.splits == whole.splits


def test_killed_before_any_step_nothing_is_left_over(stepped: tuple[Path, list[dict[str, Any]]]) -> None:
    """The files of each store are those of the build that ran through."""
    work, said = stepped
    ends = [line for line in said if "steps" in line and line["again"] == 0]

    def tree(store: Path) -> list[Path]:
        return sorted(path.relative_to(store) for path in store.rglob("*"))

    whole = tree(work / f"{ends[-1]['steps']:03d}")
    left_over = {
        line["steps"]: extra
        for line in ends
        if (extra := [str(p) for p in tree(work / f"{line['steps']:03d}") if p not in whole])
    }
    assert left_over == {}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 pictures that take a worker a few milliseconds each: five shards."""
    return make_pictures(tmp_path_factory.mktemp("slow") / "photos", 320, (220, 260), distinct=6)


@pytest.fixture(scope="module")
def slow_fingerprint(slow: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(slow, tmp_path_factory.mktemp("slow_store") / "store").fingerprint


COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a script's background inherits that it is ignored
from prep.cli import main
main()
"""


class Command:
    """A build in two workers, as a process of its own, at the head of its own process group."""

    def __init__(self, photos: Path, store: Path) -> None:
        words = ["build-lmdb", str(photos), "--store", str(store), "--side", "32", "--format", "ppm", "--jobs", "2"]
        program = [sys.executable, "-c", COMMAND]
        self.work = store / "train" / ".build"
        self.process = subprocess.Popen(
            program + words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for(self, what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not reached():
            assert self.process.poll() is None, f"ended before {what}: {self.process.communicate()[1]}"
            assert time.monotonic() < deadline, f"no {what}"
            time.sleep(0.002)

    def wait_for_records(self, count: int) -> None:
        self.wait_for(f"{count} finished shards", lambda: len(self.finished()) >= count)

    def finished(self) -> list[Path]:
        return sorted(self.work.glob("[0-9]*.json"))

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, once the whole process group is gone."""
        stdout, stderr = self.process.communicate(timeout=DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while left := group(self.process.pid):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.01)
        return self.process.returncode, stdout, stderr


@pytest.fixture
def start() -> Iterator[Callable[[Path, Path], Command]]:
    """Starts commands, and kills what a test that failed left of them."""
    started: list[Command] = []

    def run(photos: Path, store: Path) -> Command:
        started.append(Command(photos, store))
        return started[-1]

    yield run
    for command in started:
        with suppress(ProcessLookupError):
            os.killpg(command.process.pid, signal.SIGKILL)
        command.process.communicate()


def group(leader: int) -> dict[int, str]:
    """The living processes of a process group and their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == leader and state not in "ZX":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_killed_again_and_again_the_same_command_finishes(
    start: Callable[[Path, Path], Command], slow: Path, slow_fingerprint: str, tmp_path: Path
) -> None:
    """kill -9 of the parent when the build begins, in the first shards, after one shard, after three."""
    store = tmp_path / "store"
    moments: list[tuple[str, Callable[[Command], bool]]] = [
        ("plan", lambda command: (command.work / "plan.json").exists()),
        ("shard under way", lambda command: any(command.work.glob("*.tmp/data.mdb"))),
        ("first shard", lambda command: len(command.finished()) >= 1),
        ("third shard", lambda command: len(command.finished()) >= 3),
    ]
    for what, reached in moments:
        command = start(slow, store)
        command.wait_for(what, lambda command=command, reached=reached: reached(command))
        command.process.send_signal(signal.SIGKILL)
        code, _, _ = command.end()
        assert code == -signal.SIGKILL
        assert not (store / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in command.finished()}
    databases = [store / "train" / path.stem / "data.mdb" for path in kept]
    written = [path.stat().st_mtime_ns for path in databases]
    assert 3 <= len(kept) <= 5
    command = start(slow, store)
    code, _, stderr = command.end()
    assert code == 0, stderr
    assert Store.open(store).fingerprint == slow_fingerprint
    assert [path.stat().st_mtime_ns for path in databases] == written  # finished shards were not built again
    assert not command.work.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_by_a_signal(
    start: Callable[[Path, Path], Command], slow: Path, slow_fingerprint: str, tmp_path: Path, number: int, code: int
) -> None:
    """SIGTERM to the parent, as `kill` sends it; SIGINT to the whole group, as a terminal sends Ctrl-C."""
    store = tmp_path / "store"
    command = start(slow, store)
    command.wait_for_records(1)
    if number == signal.SIGINT:
        os.killpg(command.process.pid, number)
    else:
        command.process.send_signal(number)
    returned, stdout, stderr = command.end()
    assert returned == code, stderr
    assert stdout == ""
    assert stderr.strip().splitlines()[-1] == "Interrupted. The same command goes on from here."
    assert "Traceback" not in stderr
    assert not (store / "manifest.json").exists()
    report = Progress(320, "pictures")
    assert build(slow, store, report=report).fingerprint == slow_fingerprint
    assert report.skipped >= 64


def test_ctrl_c_while_the_workers_start(start: Callable[[Path, Path], Command], slow: Path, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to the workers too, which must leave it to the parent from the beginning."""
    said = []
    for delay_s in (0.05, 0.15, 0.25, 0.35):
        command = start(slow, tmp_path / str(delay_s))
        command.wait_for("worker", lambda pid=command.process.pid: any("spawn_main" in w for w in group(pid).values()))
        time.sleep(delay_s)
        os.killpg(command.process.pid, signal.SIGINT)
        said.append(command.end())
    assert said == [(130, "", "Interrupted. The same command goes on from here.\n")] * len(said)


def test_signal_does_not_wait_for_shards_under_way(start: Callable[[Path, Path], Command], tmp_path: Path) -> None:
    """Shards of 64 large pictures take seconds: SIGTERM in the first of them ends the build with none finished."""
    photos = make_pictures(tmp_path / "photos", 128, (1700, 1800), distinct=1)
    command = start(photos, tmp_path / "store")
    command.wait_for("shard under way", lambda: any(command.work.glob("*.tmp/data.mdb")))
    command.process.send_signal(signal.SIGTERM)
    code, _, stderr = command.end()
    assert code == 143, stderr
    assert command.finished() == []
    assert list(command.work.glob("*.json")) == [command.work / "plan.json"]


def test_killed_worker_is_said_in_one_line(
    start: Callable[[Path, Path], Command], slow: Path, slow_fingerprint: str, tmp_path: Path
) -> None:
    """As the kernel does when memory runs out."""
    store = tmp_path / "store"
    command = start(slow, store)
    command.wait_for_records(1)
    workers = [pid for pid, line in group(command.process.pid).items() if "spawn_main" in line]
    assert 1 <= len(workers) <= 2
    os.kill(workers[0], signal.SIGKILL)
    code, _, stderr = command.end()
    assert code == 1, stderr
    assert stderr.startswith("Error: A worker process was killed")
    assert stderr.count("\n") == 1
    assert build(slow, store).fingerprint == slow_fingerprint
