"""Builds with backgrounds, limits and warnings: images that are stored, counted, named in an error, or built again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.build.limits import InputLimits
from prep.build.plan import BuildPlan, BuildPolicy
from prep.build.split import build_split
from prep.cli import main
from prep.console import Progress, UserError
from prep.inputs.folder import FolderReader
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from prep.workers import WorkerPool
from tests.helpers.building import (
    PPM,
    SKIP,
    InlineRunner,
    Records,
    Stopped,
    StoppingRunner,
    UnusedRunner,
    build,
    decoded,
    make_pictures,
)
from tests.prep.images.small_images import file_of, smooth

CUT = file_of(smooth(60, 83), "JPEG", quality=95)
CUT = CUT[: len(CUT) // 2] + b"\xff\xd9"  # libjpeg decodes this file and prints a warning


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 small JPEGs, which fill two shards."""
    return make_pictures(tmp_path_factory.mktemp("plain") / "photos", 128, (30, 70))


@pytest.fixture
def photos(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "photos"))


def limited(**limits: Any) -> BuildPolicy:
    return BuildPolicy(skip_bad=True, limits=InputLimits(**limits))


def outcomes(store: Path) -> dict[str, dict[str, Any]]:
    lines = (store / "train" / "inputs.jsonl").read_text().splitlines()
    return {line["source"]: line for line in map(json.loads, lines)}


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def source_shard(photos: Path, name: str) -> int:
    """Return the number of the shard that holds an input."""
    source = list_source(photos, "train")
    plan = BuildPlan(source, Path("unused"), PPM, True)
    (number,) = [n for n in range(plan.shard_count) if any(item.path == name.encode() for item in plan.task(n).inputs)]
    return number


# Background


def transparent_folder(folder: Path) -> Path:
    (folder / "a").mkdir(parents=True)
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[10:30, 10:30, 3] = 255  # a black square on a transparent background
    Image.fromarray(pixels).save(folder / "a" / "black.png")
    return folder


@pytest.mark.parametrize(
    ("words", "level"), [([], 255), (["--background", "grey"], 128), (["--background", "black"], 0)]
)
def test_the_background_is_stored_counted_and_kept(
    words: list[str], level: int, tmp_path: Path, records_of: Records
) -> None:
    """A split that is built without the option gets the background of the store. Another background is refused."""
    photos, store = transparent_folder(tmp_path / "photos"), tmp_path / "store"
    base = ["build-lmdb", photos, "--store", store, "--side", "40", "--format", "ppm", "--jobs", "1"]
    built = alexprep(*base, *words)
    assert built.exit_code == 0, built.stderr
    background = words[-1] if words else "white"
    assert f"converted: 1 alpha (over {background}), 1 png" in built.stdout
    (record,) = [datum for _, datum in records_of(store, "train")]
    pixels = decoded(record)
    assert (pixels[:10] == level).all() and (pixels[10:30, 10:30] == 0).all()
    assert Store.open(store).settings.background == background
    if background == "grey":
        again = alexprep(*base, "--split", "val")
        assert again.exit_code == 0 and f"over {background}" in again.stdout
        other = alexprep(*base, "--background", "white")
        assert other.exit_code == 1 and "begun with --background grey, this command has white" in other.stderr


def test_an_older_store_and_an_older_build_keep_dropping_alpha(tmp_path: Path, records_of: Records) -> None:
    """In older versions, plan.json and manifest.json had neither the background nor the limits."""
    photos, store = transparent_folder(tmp_path / "photos"), tmp_path / "store"
    (photos / "a" / "white.png").write_bytes(b"not an image")
    base = ["build-lmdb", photos, "--store", store, "--side", "40", "--format", "ppm", "--jobs", "1"]
    older = replace(PPM, side_px=40, background="dropped")
    with pytest.raises(Stopped):
        build(photos, store, older, SKIP, runner=StoppingRunner())
    plan = json.loads((store / "train" / ".build" / "plan.json").read_bytes())
    assert "background" not in plan["settings"]
    resumed = alexprep(*base, "--on-bad", "skip")
    assert resumed.exit_code == 0 and "1 alpha (dropped)" in resumed.stdout
    assert "background" not in json.loads((store / "manifest.json").read_bytes())["settings"]
    assert alexprep(*base, "--on-bad", "skip").stdout.splitlines()[-1].strip().startswith("already built")
    (photos / "a" / "white.png").unlink()
    assert alexprep(*base, "--split", "val").exit_code == 0
    for split in ("train", "val"):
        (record,) = [datum for _, datum in records_of(store, split)]
        assert (decoded(record) == 0).all()
    refused = alexprep(*base, "--split", "val", "--background", "white")
    assert refused.exit_code == 1 and "dropped the alpha channel" in refused.stderr


# Limits that change between two runs


def test_raising_max_pixels_builds_only_the_shard_of_the_large_picture_again(photos: Path, tmp_path: Path) -> None:
    (photos / "n1" / "large.png").write_bytes(file_of(Image.new("L", (300, 200), 9), "PNG"))
    store = tmp_path / "store"
    with pytest.raises(Stopped):
        build(photos, store, policy=limited(max_pixels=50_000), runner=StoppingRunner(2))
    assert not (store / "manifest.json").exists()
    large = source_shard(photos, "n1/large.png")
    others = [number for number in range(2) if number != large]
    before = {n: (store / "train" / f"{n:05d}" / "data.mdb").stat().st_mtime_ns for n in range(2)}
    built = build(photos, store, policy=limited(max_pixels=70_000))
    after = {n: (store / "train" / f"{n:05d}" / "data.mdb").stat().st_mtime_ns for n in range(2)}
    assert [n for n in range(2) if before[n] == after[n]] == others
    assert built.split("train").records == 129
    assert built.split("train").account["largest_px"] == 60_000
    whole = build(photos, tmp_path / "whole")
    assert built.splits == whole.splits


def test_lowering_max_pixels_leaves_out_what_is_too_large_now(photos: Path, tmp_path: Path) -> None:
    (photos / "n1" / "large.png").write_bytes(file_of(Image.new("L", (300, 200), 9), "PNG"))
    store = tmp_path / "store"
    with pytest.raises(Stopped):
        build(photos, store, policy=limited(), runner=StoppingRunner(2))
    built = build(photos, store, policy=limited(max_pixels=59_999))
    assert built.split("train").records == 128
    assert outcomes(store)["n1/large.png"] == {
        "source": "n1/large.png",
        "fate": "bad",
        "why": "300×200: more than 59,999 pixels; --max-pixels sets this limit",
        "limit": "max_pixels",
        "pixels": 60_000,
    }
    assert build(photos, store, policy=limited(max_pixels=50_000), runner=UnusedRunner()).splits == built.splits
    for limits in (InputLimits(), InputLimits(max_pixels=60_000)):
        with pytest.raises(UserError, match=r"--max-pixels.*treatment of n1/large\.png"):
            build(photos, store, policy=BuildPolicy(skip_bad=True, limits=limits))


def test_a_picture_with_warnings_is_kept_counted_and_named_or_bad(photos: Path, tmp_path: Path) -> None:
    (photos / "n1" / "cut.JPEG").write_bytes(CUT)
    (photos / "n2" / "cut-grey.JPEG").write_bytes(CUT)
    store = tmp_path / "store"
    text = "Corrupt JPEG data: premature end of data segment"
    kept = build(photos, store)
    account = kept.split("train").account
    assert (account["kept"], account["warnings"], account["bad"]) == (130, {text: 2}, {})
    assert outcomes(store)["n1/cut.JPEG"] == {
        "source": "n1/cut.JPEG",
        "fate": "kept, with warnings",
        "warnings": [text],
    }
    with pytest.raises(UserError, match="--on-warning"):
        build(photos, store, policy=limited(keep_warned=False))
    with pytest.raises(UserError, match=r"cut.*\.JPEG: decoded with warnings: Corrupt JPEG data.*--on-bad skip"):
        build(photos, tmp_path / "strict", policy=BuildPolicy(limits=InputLimits(keep_warned=False)))
    refused = build(photos, tmp_path / "bad", policy=limited(keep_warned=False))
    account = refused.split("train").account
    assert account["kept"] == 128 and "warnings" not in account
    assert account["bad"] == {f"decoded with warnings: {text}": 2}
    line = outcomes(tmp_path / "bad")["n1/cut.JPEG"]
    assert (line["fate"], line["limit"], line["warnings"]) == ("bad", "on_warning", [text])


def test_a_warning_is_printed_with_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "cut.JPEG").write_bytes(CUT)
    base = ["build-lmdb", tmp_path / "photos", "--store", tmp_path / "store", "--side", "32", "--jobs", "1"]
    result = alexprep(*base)
    assert result.exit_code == 0, result.stderr
    assert "kept, with warnings: 1 input, listed in" in result.stdout
    assert "    a/cut.JPEG: Corrupt JPEG data: premature end of data segment" in result.stdout
    assert alexprep("verify", "--store", tmp_path / "store", "--jobs", "1").exit_code == 0
    inspected = alexprep("inspect", "--store", tmp_path / "store").stdout
    assert "kept, with warnings: 1 Corrupt JPEG data" in inspected and "transparent pixels over white" in inspected


# Exceptions, slow inputs, memory


class BrokenReader(FolderReader):
    """A reader that raises an exception for some images, as libraries do for damaged archives."""

    def read(self, item: Any) -> bytes:
        for error in (KeyError("a bug"), MemoryError(), RuntimeError("damaged\nblock"), OverflowError("too large")):
            if type(error).__name__.encode() in item.path:
                raise error
        return super().read(item)


def test_any_exception_of_a_reader_or_a_decoder_makes_its_input_bad(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["KeyError", "MemoryError", "RuntimeError", "OverflowError"]
    for name in names:
        (photos / "n1" / f"{name}.JPEG").write_bytes(CUT)
    for name in ("ZeroDivisionError", "SystemError"):
        (photos / "n2" / f"{name}.png").write_bytes(file_of(smooth(40, 40), "PNG") + name.encode())
    load = Image.Image.load

    def failing_load(image: Any) -> Any:
        content = image.fp.getvalue() if getattr(image, "fp", None) is not None else b""
        for error in (ZeroDivisionError, SystemError):
            if content.endswith(error.__name__.encode()):
                raise error("inside the decoder")
        return load(image)

    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", failing_load)
    source = list_source(photos, "train")
    broken = type(source)(BrokenReader(photos), "train", source.classes, source.inputs)
    built = build_split(broken, tmp_path / "store", PPM, InlineRunner(), Progress(0, ""), SKIP)
    assert built.split("train").records == 128
    bad = outcomes(tmp_path / "store")
    for name in names:
        assert bad[f"n1/{name}.JPEG"]["fate"] == "bad" and bad[f"n1/{name}.JPEG"]["why"].startswith("cannot be read: ")
    assert bad["n1/RuntimeError.JPEG"]["why"] == r"cannot be read: damaged\nblock"
    for name in ("ZeroDivisionError", "SystemError"):
        assert bad[f"n2/{name}.png"]["why"] == "cannot be decoded: inside the decoder"


def rle_bitmap(width: int, height: int) -> bytes:
    """Return a BMP of 0.8 MB with run-length code, which Pillow decodes in slow Python code."""
    data = b"\x01\x01" * 400_000 + b"\0\1"
    head = (
        b"BM" + (14 + 40 + 1024 + len(data)).to_bytes(4, "little") + bytes(4) + (14 + 40 + 1024).to_bytes(4, "little")
    )
    info = (40).to_bytes(4, "little") + width.to_bytes(4, "little") + height.to_bytes(4, "little")
    info += (1).to_bytes(2, "little") + (8).to_bytes(2, "little") + (1).to_bytes(4, "little")
    info += len(data).to_bytes(4, "little") + bytes(8) + (256).to_bytes(4, "little") + bytes(4)
    return head + info + bytes(1024) + data


def test_a_slow_input_is_bad_with_its_name(photos: Path, tmp_path: Path) -> None:
    (photos / "n1" / "slow.bmp").write_bytes(rle_bitmap(400_000, 1))
    store = tmp_path / "store"
    built = build(photos, store, policy=limited(time_limit_s=0.02))
    assert built.split("train").records == 128
    assert outcomes(store)["n1/slow.bmp"] == {
        "source": "n1/slow.bmp",
        "fate": "bad",
        "why": "decoding took more than 0.02 s of CPU time; --time-limit sets this limit",
        "limit": "time_limit",
        "seconds": 0.02,
    }
    with pytest.raises(UserError, match=r"--time-limit.*treatment of n1/slow\.bmp"):
        build(photos, store, policy=limited(time_limit_s=50.0))
    assert build(photos, tmp_path / "patient", policy=limited(time_limit_s=0)).split("train").records == 129


class EndlessReader(FolderReader):
    """A reader that keeps the process busy in C code at one image. No Python exception can interrupt this code."""

    def read(self, item: Any) -> bytes:
        if item.path.endswith(b"endless.JPEG"):
            sum(range(10**12))
        return super().read(item)


def test_an_endless_input_is_left_out_and_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prep.workers._CHECK_CPU_S", 0.1)
    monkeypatch.setattr("prep.workers._CPU_GRACE_S", 0.1)
    (photos / "n1" / "endless.JPEG").write_bytes(CUT)
    source = list_source(photos, "train")
    endless = type(source)(EndlessReader(photos), "train", source.classes, source.inputs)
    with WorkerPool(1) as workers:
        strict = BuildPolicy(limits=InputLimits(time_limit_s=0.3))
        with pytest.raises(UserError, match=r"^n1/endless\.JPEG: decoding took more than 0\.3 s .*--on-bad skip"):
            build_split(endless, tmp_path / "store", PPM, workers, Progress(129, ""), strict)
        built = build_split(endless, tmp_path / "store", PPM, workers, Progress(129, ""), limited(time_limit_s=0.3))
    assert built.split("train").records == 128
    assert outcomes(tmp_path / "store")["n1/endless.JPEG"]["limit"] == "time_limit"


def test_large_jpegs_are_decoded_smaller_only_where_asked_for(tmp_path: Path, records_of: Records) -> None:
    """For smooth images, decoding at a reduced scale gives nearly the same pixels. Such images count as reduced."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for name, mode in (("rgb", "RGB"), ("grey", "L"), ("cmyk", "CMYK")):
        smooth(300, 411).convert(mode).save(tmp_path / "photos" / "a" / f"{name}.jpg", quality=95)
    stores = {}
    for above in (0, 50_000, 200_000):
        store = tmp_path / f"store-{above}"
        built = build(tmp_path / "photos", store, replace(PPM, reduce_above=above))
        stores[above] = {datum.source: decoded(datum).astype(int) for _, datum in records_of(store, "train")}
        count = built.split("train").account["converted"].get("reduced", 0)
        assert count == (3 if above == 50_000 else 0)
    for source, whole in stores[0].items():
        difference = np.abs(stores[50_000][source] - whole)
        assert 0 < difference.mean() < 2 and np.array_equal(stores[200_000][source], whole), source


def test_no_lock_builds_without_a_lock_file(tmp_path: Path) -> None:
    photos = transparent_folder(tmp_path / "photos")
    base = ["build-lmdb", photos, "--store", tmp_path / "store", "--side", "40", "--jobs", "1"]
    assert alexprep(*base, "--no-lock").exit_code == 0
    assert ".lock" not in os.listdir(tmp_path / "store")
    assert alexprep(*base).exit_code == 0  # without --no-lock, the next command locks the folder
    assert ".lock" in os.listdir(tmp_path / "store")
