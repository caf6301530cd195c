"""Builds with bad inputs, such as files that are not images. A build counts bad inputs, and refuses or skips them."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from prep.build import shard_task
from prep.build.plan import BuildPolicy
from prep.build.preflight import probe
from prep.build.split import build_split
from prep.cli import main
from prep.console import Progress, UserError
from prep.images.formats import unknown_format
from prep.images.limits import MAX_FILE_BYTES
from prep.inputs.folder import FolderReader
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from tests.helpers.building import (
    PPM,
    SKIP,
    InlineRunner,
    Records,
    Stopped,
    StoppingRunner,
    UnusedRunner,
    build,
    image_paths,
    make_pictures,
    no_root_rights,
    record_sources,
)

OBVIOUS = {  # files whose first bytes show that they are not images
    "n1/bad_empty.JPEG": b"",
    "n1/bad_text.JPEG": b"no picture\n",
    "n2/bad_too.JPEG": b"neither\n",
}
TRUNCATED = {"n3/bad_cut.JPEG": b"\xff\xd8\xff\xe0 cut off"}
BAD = OBVIOUS | TRUNCATED


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 small images, which fill four shards."""
    return make_pictures(tmp_path_factory.mktemp("small") / "photos", 200, (30, 70))


@pytest.fixture
def photos(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "photos"))


@pytest.fixture
def with_bad(photos: Path) -> Path:
    for name, content in BAD.items():
        (photos / name).write_bytes(content)
    return photos


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Before the build


def test_probe_names_obviously_bad_inputs(with_bad: Path) -> None:
    (with_bad / "n1" / "gone.JPEG").write_bytes(b"\xff\xd8\xff")
    with open(with_bad / "n1" / "huge.JPEG", "wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(MAX_FILE_BYTES + 1)
    source = list_source(with_bad, "train")
    (with_bad / "n1" / "gone.JPEG").unlink()
    bad = dict(probe(FolderReader(with_bad), source.inputs, 1))
    assert bad == {
        "n1/bad_empty.JPEG": "empty file",
        "n1/bad_text.JPEG": unknown_format(),
        "n2/bad_too.JPEG": unknown_format(),
        "n1/gone.JPEG": "cannot be read: No such file or directory",
        "n1/huge.JPEG": "256,000,001 bytes: more than 256,000,000",
    }


def test_probe_accepts_every_format_that_can_be_decoded(tmp_path: Path) -> None:
    (tmp_path / "n1").mkdir()
    picture = Image.fromarray(np.full((40, 40, 3), 7, np.uint8))
    for format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        picture.save(tmp_path / "n1" / format, format)
    source = list_source(tmp_path, "train")
    assert len(source.inputs) == 7
    assert probe(FolderReader(tmp_path), source.inputs, 1) == []


def test_all_obviously_bad_inputs_are_named_before_the_build(with_bad: Path, tmp_path: Path) -> None:
    """The error counts folder.JPEG, the link out of the source, and the bad files that the probe finds.

    The probe does not find the truncated file, because the probe reads only the first bytes of a file.
    """
    (with_bad / "n2" / "folder.JPEG").mkdir()
    (with_bad / "n2" / "link").symlink_to("/etc/hostname")
    store = tmp_path / "store"
    with pytest.raises(
        UserError, match=r"5 inputs of 206 are not images.*bad\.jsonl lists all.*--on-bad skip"
    ) as raised:
        build(with_bad, store, runner=UnusedRunner())
    assert not list((store / "train").glob("0*"))
    lines = lines_of(store / "train" / ".build" / "bad.jsonl")
    assert str(store / "train" / ".build" / "bad.jsonl") in str(raised.value)
    assert {line["source"] for line in lines} == {*OBVIOUS, "n2/folder.JPEG", "n2/link"}
    assert all(line["fate"] == "bad" and line["why"] for line in lines)
    assert f"first: {lines[0]['source']}: {lines[0]['why']}" in str(raised.value)


def test_a_bad_file_stops_the_command_which_names_it(with_bad: Path, tmp_path: Path) -> None:
    words = ["build-lmdb", str(with_bad), "--store", str(tmp_path / "store"), "--side", "32", "--jobs", "1"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert any(name in result.stderr for name in OBVIOUS)
    assert "--on-bad skip" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_truncated_file_stops_the_build_which_names_it(photos: Path, tmp_path: Path) -> None:
    (photos / "n3" / "bad_cut.JPEG").write_bytes(TRUNCATED["n3/bad_cut.JPEG"])
    with pytest.raises(UserError, match=r"n3/bad_cut\.JPEG: .*--on-bad skip.*finished shards are kept"):
        build(photos, tmp_path / "store")
    assert not (tmp_path / "store" / "manifest.json").exists()


# Left out


def test_skipped_files_are_counted_and_named(with_bad: Path, tmp_path: Path, records_of: Records) -> None:
    progress = Progress(204, "pictures")
    built = build(with_bad, tmp_path / "store", policy=SKIP, progress=progress)
    account = built.split("train").account
    assert account["inputs"] == 204 == account["kept"] + sum(account["bad"].values())
    assert account["kept"] == built.split("train").records == 200
    assert account["bad"]["empty file"] == 1
    assert account["bad"][unknown_format()] >= 2
    assert (progress.done, progress.bad) == (204, 4)
    assert set(record_sources(records_of(tmp_path / "store", "train"))) == set(image_paths(with_bad)) - set(BAD)
    lines = lines_of(tmp_path / "store" / "train" / "inputs.jsonl")
    assert {line["source"]: line["fate"] for line in lines} == dict.fromkeys(BAD, "bad")
    assert all(line["why"] for line in lines)


def test_entries_that_are_not_files_are_counted(with_bad: Path, tmp_path: Path) -> None:
    (with_bad / "n2" / "folder.JPEG").mkdir()
    (with_bad / "n2" / "link").symlink_to("/etc/hostname")
    account = build(with_bad, tmp_path / "store", policy=SKIP).split("train").account
    assert account["inputs"] == 206 == account["kept"] + sum(account["bad"].values())
    lines = lines_of(tmp_path / "store" / "train" / "inputs.jsonl")
    assert {line["source"] for line in lines} == {*BAD, "n2/folder.JPEG", "n2/link"}


def test_the_manifest_has_at_most_twenty_reasons_by_name(photos: Path, tmp_path: Path) -> None:
    head = io.BytesIO()
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(head, "PPM")
    for side in range(30):
        pixels = f"P6\n{20_000 + side} 20000\n255\n".encode()
        (photos / "n1" / f"bad_{side:02d}.JPEG").write_bytes(pixels)
    for number in range(5):
        (photos / "n2" / f"empty_{number}.JPEG").write_bytes(b"")
    account = build(photos, tmp_path / "store", policy=SKIP).split("train").account
    assert len(account["bad"]) <= 21
    assert account["bad"]["empty file"] == 5
    assert sum(account["bad"].values()) == 35 == account["inputs"] - account["kept"]
    assert len(lines_of(tmp_path / "store" / "train" / "inputs.jsonl")) == 35


def test_the_counts_of_inputs_add_up(store: Path, records_of: Records) -> None:
    """Each split of `photo_folder` has a grey, a CMYK and a PNG file. One file of train has EXIF orientation 6."""
    splits = json.loads((store / "manifest.json").read_bytes())["splits"]
    conversions = {"grey": 1, "cmyk": 1, "png": 1}
    for split, inputs, turned in (("train", 30, {"6": 1}), ("val", 12, {})):
        account = splits[split]["account"]
        assert account["inputs"] == account["kept"] == splits[split]["records"] == inputs
        assert account["converted"] == conversions
        assert account["exif_orientation"] == turned
        assert account["bad"] == {}
        lines = lines_of(store / split / "inputs.jsonl")
        assert Counter(how for line in lines for how in line.get("how", ())) == conversions
        assert [line["exif_orientation"] for line in lines if "exif_orientation" in line] == [6] * len(turned)
        assert len(lines) == 3 + len(turned)
        order = [datum.source.decode() for _, datum in records_of(store, split)]
        named = [line["source"] for line in lines]
        assert named == [path for path in order if path in named]


def test_a_build_in_several_runs_gives_the_same_counts_and_files(with_bad: Path, tmp_path: Path) -> None:
    Image.new("L", (40, 40)).save(with_bad / "n1" / "grey.JPEG")
    whole = build(with_bad, tmp_path / "whole", policy=SKIP)
    store = tmp_path / "store"
    for _ in range(whole.split("train").records // 64 + 1):
        with pytest.raises(Stopped):
            build(with_bad, store, policy=SKIP, runner=StoppingRunner())
    assert build(with_bad, store, policy=SKIP).splits == whole.splits
    for name in ("inputs.jsonl", "mean_image.npy", "colour.json"):
        assert (store / "train" / name).read_bytes() == (whole.root / "train" / name).read_bytes()


# At most --max-bad


@pytest.mark.parametrize("words", [["--max-bad", "3"], ["--on-bad", "skip", "--max-bad", "3"], ["--max-bad", "0"]])
def test_more_bad_inputs_than_max_bad_stop_the_command(words: list[str], with_bad: Path, tmp_path: Path) -> None:
    base = ["build-lmdb", str(with_bad), "--store", str(tmp_path / "store"), "--side", "32", "--jobs", "1"]
    result = CliRunner().invoke(main, [*base, *words])
    assert result.exit_code == 1
    assert f"more than --max-bad {words[-1]} allows" in result.stderr
    assert not (tmp_path / "store" / "manifest.json").exists()
    enough = CliRunner().invoke(main, [*base, "--max-bad", "4"])
    assert enough.exit_code == 0, enough.stderr
    assert Store.open(tmp_path / "store").split("train").records == 200


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_max_bad_counts_over_several_runs(most: int, with_bad: Path, tmp_path: Path) -> None:
    """Each run builds one shard. --max-bad limits the number of bad inputs of all runs together."""
    store, runs = tmp_path / "store", 0
    with pytest.raises(
        UserError, match=rf"^[1-4] inputs? (is|are) not (an image|images), more than --max-bad {most} allows"
    ):
        for _ in range(4):
            try:
                build(with_bad, store, policy=BuildPolicy(True, most), runner=StoppingRunner())
            except Stopped:
                runs += 1
    assert runs < 4
    assert not (store / "manifest.json").exists()
    assert build(with_bad, store, policy=BuildPolicy(True, 4)).split("train").records == 200


def test_max_bad_counts_finished_shards(with_bad: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        build(with_bad, tmp_path / "store", policy=SKIP, runner=StoppingRunner(4))
    with pytest.raises(UserError, match="4 inputs are not images, more than --max-bad 3 allows"):
        build(with_bad, tmp_path / "store", policy=BuildPolicy(True, 3))
    assert build(with_bad, tmp_path / "store", policy=BuildPolicy(True, 4)).split("train").records == 200


def test_entries_that_are_not_files_count_for_max_bad_before_the_build(photos: Path, tmp_path: Path) -> None:
    for name in "abc":
        (photos / "n1" / f"{name}.jpg").mkdir()
    with pytest.raises(UserError, match="more than --max-bad 2 allows"):
        build(photos, tmp_path / "store", policy=BuildPolicy(True, 2), runner=UnusedRunner())
    assert build(photos, tmp_path / "store", policy=BuildPolicy(True, 3)).split("train").account["inputs"] == 203


# Corrected, removed, empty


def test_a_corrected_file_lets_the_same_command_finish(with_bad: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad_"):
        build(with_bad, tmp_path / "store")
    good = next(path for path in sorted(with_bad.glob("*/*")) if "bad_" not in path.name)
    for name in BAD:
        shutil.copy(good, with_bad / name)
    assert build(with_bad, tmp_path / "store").fingerprint == build(with_bad, tmp_path / "other").fingerprint


def test_a_photograph_that_needs_too_much_memory_is_left_out(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this test, rescaling the third photograph raises MemoryError."""
    calls, rescale = iter(range(1000)), shard_task.rescale

    def rescale_twice(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError
        return rescale(*arguments)

    monkeypatch.setattr(shard_task, "rescale", rescale_twice)
    store = build(small, tmp_path / "store", PPM, SKIP)
    account = store.split("train").account
    assert store.split("train").records == 199 and list(account["bad"]) == ["too little memory to rescale it"]


def test_a_strict_build_reads_again_what_an_earlier_run_skipped(with_bad: Path, tmp_path: Path) -> None:
    """A run with --on-bad skip finishes shards without their bad inputs.

    The next run, with --on-bad fail, builds these shards again.
    """
    for name in OBVIOUS:
        (with_bad / name).unlink()
    with pytest.raises(Stopped):
        build(with_bad, tmp_path / "store", policy=SKIP, runner=StoppingRunner(4))
    with pytest.raises(UserError, match=r"bad_.*Correct this input"):
        build(with_bad, tmp_path / "store")
    assert not (tmp_path / "store" / "manifest.json").exists()
    assert build(with_bad, tmp_path / "store", policy=SKIP).split("train").records == 200


def test_a_shard_without_an_image_is_left_out(small: Path, photos: Path, tmp_path: Path, records_of: Records) -> None:
    build(small, tmp_path / "all")
    for path in record_sources(records_of(tmp_path / "all", "train"))[50:100]:
        (photos / path).write_bytes(b"no picture")
    built = build(photos, tmp_path / "store", policy=SKIP)
    assert [s.path for s in built.split("train").shards] == ["train/00000", "train/00002", "train/00003"]
    assert all(s.records == 50 for s in built.split("train").shards)
    assert built.split("train").records == 150


def test_a_source_without_an_image_gives_no_store(tmp_path: Path) -> None:
    (tmp_path / "photos" / "n1").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "photos" / "n1" / f"{number}.JPEG").write_bytes(b"no picture")
    with pytest.raises(UserError, match="not one of 3 inputs is an image"):
        build(tmp_path / "photos", tmp_path / "store", policy=SKIP)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_a_file_that_vanished_is_a_bad_input(photos: Path, tmp_path: Path) -> None:
    """The file is removed after the probe, and before the build reads the file."""
    removed = image_paths(photos)[3]

    class AfterRemoval(InlineRunner):
        def map(self, work: Any, tasks: Iterable[Any], watch: Any) -> Iterator[tuple[Any, Any]]:
            (photos / removed).unlink(missing_ok=True)
            return super().map(work, tasks, watch)

    source = list_source(photos, "train")
    for policy in (BuildPolicy(), SKIP):
        (photos / removed).touch()
        shutil.copy2(photos / image_paths(photos)[4], photos / removed)
        source = list_source(photos, "train")
        store, progress = tmp_path / str(policy.skip_bad), Progress(200, "pictures")
        if policy.skip_bad:
            account = build_split(source, store, PPM, AfterRemoval(), progress, policy).split("train").account
            assert account["bad"] == {"cannot be read: No such file or directory": 1}
        else:
            with pytest.raises(UserError, match=f"{removed}: cannot be read: No such file"):
                build_split(source, store, PPM, AfterRemoval(), progress, policy)


def test_a_photograph_without_read_permission_is_bad_and_the_build_goes_on(photos: Path, tmp_path: Path) -> None:
    path = next((photos / "n2").iterdir())
    name = f"n2/{path.name}"
    (tmp_path / "list.csv").write_text("".join(f"{each},{each.parent.name}\n" for each in photos.glob("*/*")))
    path.chmod(0)
    with no_root_rights():
        with pytest.raises(PermissionError):
            path.read_bytes()
        with pytest.raises(
            UserError, match=rf"1 input of 200 is not an image.*{name}: cannot be read: Permission denied"
        ):
            build(photos, tmp_path / "store")
        for number, source in enumerate((photos, tmp_path / "list.csv")):
            built = build(source, tmp_path / f"store{number}", policy=SKIP)
            assert built.split("train").account["bad"] == {"cannot be read: Permission denied": 1}
            assert built.split("train").records == 199
            log = (built.root / "train" / "inputs.jsonl").read_text().splitlines()
            assert [json.loads(line)["source"] for line in log] == [name]


@pytest.mark.parametrize(
    "name", ["x.tar", "x.zip", "x.parquet", "x.csv", "labels.txt", "classes.txt", "exclude.txt", "n1"]
)
def test_other_files_without_read_permission_end_the_command_in_one_line(name: str, tmp_path: Path) -> None:
    make_pictures(tmp_path / "photos", 20, (30, 40), distinct=1)
    path = tmp_path / name if name != "n1" else tmp_path / "photos" / "n1"
    option = {"labels.txt": "--labels", "classes.txt": "--classes", "exclude.txt": "--exclude"}.get(name)
    if name != "n1":
        path.write_bytes(b"n1\n")
    path.chmod(0)
    source = tmp_path / "photos" / "n2" if option == "--labels" else tmp_path / "photos"
    words = [source, option, path] if option else [source if name == "n1" else path]
    with no_root_rights():
        result = CliRunner().invoke(
            main, ["build-lmdb", *map(str, words), "--store", str(tmp_path / "s"), "--jobs", "1"]
        )
    path.chmod(0o700)
    error = result.stderr.splitlines()[-1]
    assert result.exit_code in (1, 2) and str(path) in error and "Traceback" not in result.stderr, result.output
    assert (
        "Permission denied" in error or "is not readable" in error
    )  # click itself refuses an unreadable file, but not for the user root
