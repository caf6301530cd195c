"""prep.build.preflight and --dry-run: estimates are compared with a real build, and --dry-run writes nothing."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from prep.build.plan import BuildPolicy
from prep.build.preflight import free_bytes
from prep.build.split import BuildEstimate, estimate_build
from prep.cli import main
from prep.console import DiskFull, UserError
from prep.images.formats import unknown_format
from prep.inputs.sources import list_source
from prep.store.manifest import Settings
from prep.workers import Runner
from tests.helpers.building import (
    PPM,
    SKIP,
    STRICT,
    InlineRunner,
    Stopped,
    StoppingRunner,
    UnusedRunner,
    build,
    make_pictures,
    snapshot,
)

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 images of many sizes, which fill seven shards."""
    return make_pictures(tmp_path_factory.mktemp("estimate") / "photos", 400, (60, 200))


def estimate(
    photos: Path, store: Path, settings: Settings = PPM, policy: BuildPolicy = STRICT, runner: Runner | None = None
) -> BuildEstimate:
    return estimate_build(list_source(photos, "train"), store, settings, runner or InlineRunner(), policy)


def dry_run(photos: Path, store: Path, *words: str) -> Result:
    base = ["build-lmdb", str(photos), "--store", str(store), "--jobs", "1", "--dry-run", "--decode", "sample"]
    return CliRunner().invoke(main, [*base, *words])


def bytes_on_disk(store: Path) -> int:
    return sum(path.stat().st_size for path in store.glob("train/0*/data.mdb"))


@pytest.mark.parametrize(
    "settings",
    [
        Settings(32, False, "ppm", 90, "area", 0),
        Settings(64, True, "ppm", 90, "area", 0),
        Settings(128, False, "jpeg", 90, "area", 0),
        Settings(128, True, "jpeg", 99, "area", 0),
    ],
)
def test_the_estimate_of_disk_space_is_close_to_the_build(settings: Settings, photos: Path, tmp_path: Path) -> None:
    """The estimated size may differ from the size of the LMDBs by up to a quarter.

    The test does not check the estimated time precisely. The time must be between 0.01 s and 60 s.
    """
    resources = estimate(photos, tmp_path / "store", settings).resources
    assert resources is not None
    build(photos, tmp_path / "store", settings)
    assert resources.bytes == pytest.approx(bytes_on_disk(tmp_path / "store"), rel=0.25)
    assert 0 < resources.sampled <= 32
    assert 0.01 < resources.seconds < 60


def test_the_estimated_time_is_shorter_with_more_jobs(photos: Path, tmp_path: Path) -> None:
    class HundredJobs(InlineRunner):
        jobs = 100

    one, many = estimate(photos, tmp_path).resources, estimate(photos, tmp_path, runner=HundredJobs()).resources
    assert one is not None and many is not None
    assert one.seconds / many.seconds > 20


def test_an_estimate_writes_nothing(photos: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(photos, tmp_path / "photos"))
    (source / "n1" / "bad.JPEG").write_bytes(b"no picture")
    store = tmp_path / "deep" / "store"
    before = snapshot(tmp_path)
    result = estimate(source, store)
    assert (result.inputs, result.classes, result.done, result.is_built) == (401, 3, 0, False)
    assert result.bad == (("n1/bad.JPEG", unknown_format()),)
    assert snapshot(tmp_path) == before
    with pytest.raises(Stopped):
        build(source, store, policy=SKIP, runner=StoppingRunner(2))
    (source / "n1" / "bad.JPEG").write_bytes(b"")
    before = snapshot(tmp_path)
    for policy in (SKIP, BuildPolicy(restart=True)):
        estimate(source, store, policy=policy)
    assert snapshot(tmp_path) == before


def test_an_estimate_counts_finished_shards(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    fresh = estimate(photos, store)
    with pytest.raises(Stopped):
        build(photos, store, runner=StoppingRunner(3))
    result = estimate(photos, store)
    assert (result.inputs, result.done, result.is_built) == (400, 171, False)
    assert result.resources is not None and fresh.resources is not None
    assert result.resources.bytes == pytest.approx(fresh.resources.bytes * 229 / 400, rel=0.05)
    assert estimate(photos, store, policy=BuildPolicy(restart=True)).done == 0
    build(photos, store)
    result = estimate(photos, store, runner=UnusedRunner())
    assert (result.inputs, result.done, result.is_built, result.resources) == (400, 400, True, None)


def test_an_estimate_refuses_what_the_build_would_refuse(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    other = Settings(**{**vars(PPM), "seed": 3})
    with pytest.raises(Stopped):
        build(photos, store, runner=StoppingRunner())
    with pytest.raises(UserError, match="--seed 0, this command has 3"):
        estimate(photos, store, other)
    build(photos, store)
    with pytest.raises(UserError, match="--seed 0, this command has 3"):
        estimate(photos, store, other)
    (tmp_path / "theirs" / "train").mkdir(parents=True)
    (tmp_path / "theirs" / "train" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="was not begun by alexprep"):
        estimate(photos, tmp_path / "theirs")


def test_inputs_without_an_image_give_no_estimate(tmp_path: Path) -> None:
    (tmp_path / "photos" / "n1").mkdir(parents=True)
    (tmp_path / "photos" / "n1" / "cut.JPEG").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    assert estimate(tmp_path / "photos", tmp_path / "store").resources is None
    result = dry_run(tmp_path / "photos", tmp_path / "store")
    assert "no estimate" in result.stdout
    # The error is the same as that of the build.
    assert result.exit_code == 1 and "1 input of 1 is not an image" in result.stderr


def test_dry_run_reports_as_text_and_as_json(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    result = dry_run(photos, store, "--side", "128", "--json")
    assert result.exit_code == 0, result.stderr
    assert not store.exists()
    answer = json.loads(result.stdout)
    assert (answer["inputs"], answer["classes"], answer["bad"], answer["done"]) == (400, 3, [], 0)
    assert answer["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    build(photos, store, Settings(128, False, "jpeg", 90, "area", 0))
    assert answer["bytes"] == pytest.approx(bytes_on_disk(store), rel=0.25)
    again = dry_run(photos, store, "--side", "128")
    assert "nothing to do" in again.stdout
    fresh = dry_run(photos, tmp_path / "other", "--side", "128")
    assert "400 inputs of 3 classes" in fresh.stdout
    assert "fits" in fresh.stdout and "NOT" not in fresh.stdout


def test_free_bytes_of_a_folder_that_does_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: paths.append(Path(path)) or Usage(9, 2, 7))
    assert free_bytes(tmp_path / "a" / "b" / "c") == 7
    assert paths == [tmp_path]
    monkeypatch.chdir(tmp_path)
    assert free_bytes(Path("nowhere") / "store") == 7


# Too little disk space


def set_free_bytes(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**12, 10**12 - n, n))


def test_a_build_that_does_not_fit_is_refused_before_it_starts(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        set_free_bytes(patch, 500_000)
        with pytest.raises(DiskFull, match=r"1\.6 MB needed for 400 images.*500\.0 KB free"):
            build(photos, store, runner=StoppingRunner(0))
        assert not list((store / "train").glob("0*"))
        result = CliRunner().invoke(
            main, ["build-lmdb", str(photos), "--store", str(store), "--side", "32", "--format", "ppm", "--jobs", "1"]
        )
        assert result.exit_code == 3
        assert result.stderr.count("\n") == 1
        result = dry_run(photos, store, "--side", "32", "--format", "ppm")
        assert "does NOT fit" in result.stdout
    build(photos, store)


def test_a_build_that_may_just_fit_is_started(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The build prints a warning instead of an error, since the estimate may be too high."""
    set_free_bytes(monkeypatch, 1_500_000)
    assert build(photos, tmp_path / "store").split("train").records == 400
    assert "1.5 MB free. The build starts anyway" in capsys.readouterr().err


def test_only_the_unfinished_shards_must_fit(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped):
        build(photos, tmp_path / "store", runner=StoppingRunner(6))
    set_free_bytes(monkeypatch, 500_000)
    assert build(photos, tmp_path / "store").split("train").records == 400
