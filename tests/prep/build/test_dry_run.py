"""Tests of --dry-run that decode all inputs. --dry-run must find what the build finds, and write nothing."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.build.limits import InputLimits
from prep.build.plan import BuildPolicy
from prep.build.split import build_split, estimate_build
from prep.build.split_checks import refuse_estimates
from prep.cli import main
from prep.console import Progress, UserError
from prep.inputs.formats import parquet
from prep.inputs.reader import ListOptions
from prep.inputs.sources import find_splits, list_source
from prep.workers import WorkerDied
from tests.helpers.building import PPM, STRICT, InlineRunner, Stopped, StoppingRunner, make_pictures, snapshot
from tests.prep.inputs.formats import sample_data


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


class CrashingRunner(InlineRunner):
    """Simulates a crash at inputs with `crash` in their names, and an exceeded CPU time limit at inputs with `slow`."""

    def map(self, work: Any, tasks: Iterable[Any], on_progress: Any) -> Iterator[tuple[Any, Any]]:
        for task in tasks:
            paths = [item.path for item in task.inputs if item.path.decode() not in task.unreadable]
            bad = next((path for path in paths if b"crash" in path or b"slow" in path), None)
            if bad is None:
                yield from super().map(work, [task], on_progress)
            else:
                index = [item.path for item in task.inputs].index(bad)
                yield task, WorkerDied(index, -9, is_too_slow=b"slow" in bad)


@pytest.fixture
def odd_pictures(tmp_path: Path) -> Path:
    """100 good images, and many kinds of bad inputs, conversions and warnings. Most faults appear only in decoding."""
    root = make_pictures(tmp_path / "odd", 100, (40, 60), distinct=2)
    jpeg = next((root / "n1").iterdir()).read_bytes()
    contents = {
        "n1/cut.jpg": jpeg[:200],
        "n1/closed.jpg": jpeg[:-40] + b"\xff\xd9",  # libjpeg fills the missing pixels, and prints a warning
        "n2/text.jpg": b"no picture",
        "n2/empty.jpg": b"",
        "n2/crash.jpg": jpeg,
        "n3/slow.jpg": jpeg,
        "n3/alpha.png": _png(Image.new("RGBA", (40, 50), (1, 2, 3, 4))),
        "n3/grey.png": _png(Image.new("L", (40, 50))),
        "n3/wide.png": _png(Image.new("L", (9000, 1))),
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
    os.mkfifo(root / "n1" / "fifo.jpg")
    return root


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("is_warning_bad", [False, True])
@pytest.mark.parametrize("is_begun", [False, True])
def test_a_dry_run_that_decodes_all_gives_the_account_of_the_build(
    is_warning_bad: bool, is_begun: bool, odd_pictures: Path, tmp_path: Path
) -> None:
    """--dry-run finds the same bad inputs as the build.

    This also holds after an interrupted build, and if workers crash or exceed the limit of CPU time.
    """
    limits = InputLimits(max_pixels=5000, keep_warned=not is_warning_bad)
    policy = BuildPolicy(skip_bad=True, limits=limits)
    store, settings = tmp_path / "store", replace(PPM, keep_aspect=True)
    (odd_pictures / "n1" / "late.jpg").touch()
    source = list_source(odd_pictures, "train")
    if is_begun:
        with pytest.raises(Stopped):
            build_split(source, store, settings, StoppingRunner(), Progress(1, "pictures"), policy)
    progress = Progress(len(source.inputs), "pictures")
    before = snapshot(tmp_path)
    estimate = estimate_build(source, store, settings, CrashingRunner(), policy, progress)
    assert snapshot(tmp_path) == before and progress.done == progress.total == len(source.inputs)
    refuse_estimates([source], [estimate], store, 1, policy)
    built = build_split(source, store, settings, CrashingRunner(), Progress(1, "pictures"), policy)
    log = [json.loads(line) for line in (store / "train" / "inputs.jsonl").read_text().splitlines()]
    assert sorted(estimate.bad) == sorted((row["source"], row["why"]) for row in log if row["fate"] == "bad")
    assert len(estimate.bad) >= 6 and estimate.decoded == len(source.inputs) - estimate.done
    refused = {name for name, _ in source.refused}
    key = lambda row: str(row["source"])  # noqa: E731
    assert sorted(estimate.outcomes, key=key) == sorted((r for r in log if r["source"] not in refused), key=key)
    assert estimate.inputs - len(estimate.bad) == built.split("train").records
    strict = BuildPolicy(limits=limits)
    with pytest.raises(UserError, match=f"{len(estimate.bad)} inputs of {estimate.inputs} are not images"):
        refuse_estimates([source], [estimate], store, 1, strict)
    with pytest.raises(UserError, match="more than --max-bad 5 allows"):
        refuse_estimates([source], [estimate], store, 1, BuildPolicy(True, 5, limits=limits))


def test_a_dry_run_of_bad_inputs_alone_ends_like_the_build(odd_pictures: Path, tmp_path: Path) -> None:
    for path in odd_pictures.glob("*/*"):
        path.unlink() if path.name != "cut.jpg" else None
    allow = BuildPolicy(skip_bad=True, allow_empty_classes=True)
    source, store = list_source(odd_pictures, "train", ListOptions(allow_empty_classes=True)), tmp_path / "store"
    estimate = estimate_build(source, store, PPM, InlineRunner(), allow, Progress(1, "pictures"))
    with pytest.raises(UserError, match="not one of 1 inputs is an image") as found:
        refuse_estimates([source], [estimate], store, 1, allow)
    with pytest.raises(UserError, match="not one of 1 inputs is an image") as ended:
        build_split(source, store, PPM, InlineRunner(), Progress(1, "pictures"), allow)
    assert str(found.value) == str(ended.value)


def test_the_option_decode_says_what_a_dry_run_decodes(
    odd_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, --dry-run decodes all photographs of a small source, and a sample of a large source."""
    for name in ("text.jpg", "empty.jpg", "cut.jpg", "fifo.jpg", "wide.png"):
        next(odd_pictures.glob(f"*/{name}")).unlink()
    for name in ("crash.jpg", "slow.jpg"):
        next(odd_pictures.glob(f"*/{name}")).rename(odd_pictures / "n1" / f"{name[0]}.jpg")
    words = ("build-lmdb", odd_pictures, "--store", tmp_path / "s", "--side", "32", "--jobs", "1")
    monkeypatch.setattr("prep.cli.build.make_runner", lambda *args, **options: nullcontext(InlineRunner()))
    whole = alexprep(*words, "--dry-run")
    assert whole.exit_code == 0 and "sample" not in whole.stdout
    assert "  converted: 1 alpha (over white), 1 grey, 2 png\n" in whole.stdout
    assert "  kept, with warnings: 1 input. The first:\n    n1/closed.jpg: " in whole.stdout
    assert alexprep(*words, "--dry-run", "--decode", "all").stdout.splitlines()[:-1] == whole.stdout.splitlines()[:-1]
    answer = json.loads(alexprep(*words, "--dry-run", "--json").stdout)
    assert answer["decoded"] == answer["inputs"] == 105 and answer["converted"] == {"alpha": 1, "grey": 1, "png": 2}
    assert [row["source"] for row in answer["warned"]] == ["n1/closed.jpg"]
    monkeypatch.setattr("prep.cli.build.MAX_DECODED", 104)
    monkeypatch.setattr("prep.build.plan.BuildPlan.sample", lambda plan, numbers: [replace(plan.task(0), inputs=())])
    for option in ((), ("--decode", "sample")):
        assert "decoded: a sample of 0 of 105 inputs" in alexprep(*words, "--dry-run", *option).stdout
    assert "sample" not in alexprep(*words, "--dry-run", "--decode", "all").stdout
    result = alexprep(*words, "--decode", "all")
    assert result.exit_code == 2 and "--decode all is for --dry-run" in result.stderr


def test_parquet_rows_are_decoded_without_writing(tmp_path: Path) -> None:
    """Row groups are read in order, so no row group is read twice."""
    pictures = sample_data.make_pictures()
    source = list_source(find_splits(sample_data.parquet(pictures, tmp_path / "in"), None)["train"], "train")
    before = snapshot(tmp_path)
    parquet._row_group.cache_clear()
    estimate = estimate_build(source, tmp_path / "s", PPM, InlineRunner(), STRICT, Progress(1, "pictures"))
    assert estimate.decoded == 6 and not estimate.bad and snapshot(tmp_path) == before
    # Each of the two files has a row group of two rows and a row group of one row.
    assert parquet._row_group.cache_info().misses == 4
