"""The command alexprep: text and JSON output, one-line errors, exit codes, and the options of pca-stats.

Commands run in this process through click's runner. One test runs the command as a separate process. The tests compare
values in the output with the files of the store.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.cli import main
from prep.console import DiskFull, Terminated, UserError
from prep.store.manifest import StoreError


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def fails(result: Result, *parts: str, code: int = 1) -> None:
    """Assert that the exit code is `code`, and that standard error is one line.

    The line begins with "Error:" and has all `parts`.
    """
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)  # no traceback
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]


BUILD_KEYS = ["split", "records", "classes", "skipped", "warned", "bytes", "seconds", "images_per_s", "fingerprint"]
STATS_KEYS = [
    "records",
    "pixels",
    "mean_rgb",
    "covariance",
    "eigenvalues",
    "stdevs",
    "eigenvectors",
    "pixel_scale",
    "std_rgb",
    "unit_range",
]


def test_build_lmdb_answers_in_json(photo_folder: Path, tmp_path: Path) -> None:
    """The command runs as a process. Standard output has only JSON: a line for each split."""
    photos = Path(shutil.copytree(photo_folder, tmp_path / "photos"))
    (photos / "train" / "n00000011" / "broken.JPEG").write_bytes(b"no picture")
    store = tmp_path / "store"
    program = [sys.executable, "-c", "from prep.cli import main; main()", "build-lmdb", str(photos), "--side", "32"]
    ended = subprocess.run(
        [*program, "--jobs", "1", "--on-bad", "skip", "--json"],
        env={**os.environ, "ALEXNET_STORE": str(store)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [list(answer) for answer in answers] == [BUILD_KEYS, BUILD_KEYS]
    written = json.loads((store / "manifest.json").read_bytes())["splits"]
    for answer, split, records, skipped in zip(answers, ("train", "val"), (30, 12), (1, 0), strict=True):
        assert (answer["split"], answer["records"], answer["classes"]) == (split, records, 3)
        assert answer["skipped"] == skipped
        assert answer["bytes"] == written[split]["bytes"] > 0
        assert answer["fingerprint"] == written[split]["fingerprint"]
        assert answer["seconds"] > 0
        assert answer["images_per_s"] == pytest.approx((records + skipped) / answer["seconds"], rel=0.05, abs=0.2)


def test_a_repeated_build_reports_that_there_is_nothing_to_do(photo_folder: Path, store: Path) -> None:
    result = alexprep("build-lmdb", photo_folder, "--store", store)
    assert result.exit_code == 0
    assert result.stdout.count("nothing to do") == 2
    assert "train: 30 records of 3 classes" in result.stdout
    assert "val: 12 records of 3 classes" in result.stdout
    assert "converted: 1 cmyk, 1 grey, 1 png" in result.stdout
    result = alexprep("build-lmdb", photo_folder, "--store", store, "--split", "val", "--json")
    answer = json.loads(result.stdout)
    assert (answer["split"], answer["records"], answer["images_per_s"]) == ("val", 12, 0)


def test_a_build_with_other_settings_is_refused(photo_folder: Path, store: Path) -> None:
    train = ("build-lmdb", photo_folder, "--split", "train", "--store", store)
    fails(alexprep(*train, "--side", "128"), "--side 256", "has 128")
    fails(alexprep(*train, "--keep-aspect"), "--keep-aspect")


def test_sources_that_cannot_be_built_are_one_line_errors(tmp_path: Path) -> None:
    store = tmp_path / "store"
    fails(alexprep("build-lmdb", tmp_path / "nowhere", "--store", store), str(tmp_path / "nowhere"), "no such folder")
    (tmp_path / "empty").mkdir()
    fails(alexprep("build-lmdb", tmp_path / "empty", "--store", store), str(tmp_path / "empty"), "empty")
    (tmp_path / "file").write_text("x")
    fails(alexprep("build-lmdb", tmp_path / "file", "--store", store), str(tmp_path / "file"), "archive")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.JPEG").write_text("x")
    fails(alexprep("build-lmdb", tmp_path / "flat", "--store", store), "--labels")
    fails(alexprep("build-lmdb", tmp_path / "flat", "--store", store, "--labels", tmp_path / "no.txt"), "no.txt")
    assert not store.exists()


@pytest.mark.parametrize(
    "words", [["--side", "0"], ["--format", "png"], ["--quality", "101"], ["--jobs", "0"], ["--seed", "-1"]]
)
def test_options_out_of_range_are_usage_errors(words: list[str], tmp_path: Path) -> None:
    result = alexprep("build-lmdb", tmp_path, "--store", tmp_path / "store", *words)
    assert result.exit_code == 2
    assert words[0] in result.stderr
    assert not (tmp_path / "store").exists()


def test_every_command_has_help_and_the_group_a_version() -> None:
    names = ("build-lmdb", "copy", "export-files", "import-caffe", "inspect", "join", "merge", "pca-stats", "verify")
    assert set(main.commands) == set(names)
    for words in (["--help"], ["-h"], *([name, flag] for name in names for flag in ("--help", "-h"))):
        result = alexprep(*words)
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: ")
        assert "Example" in result.stdout
    assert alexprep("--version").exit_code == 0


def test_exit_codes_are_those_of_the_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit codes: 1 for an error, 2 for wrong usage, 3 for a full disk, 130 and 143 after an interruption."""
    raised: list[BaseException] = []

    def open_store(root: object) -> None:
        raise raised[-1]

    monkeypatch.setattr("prep.cli.check.Store.open", open_store)
    for error, code, message in (
        (UserError("mend it"), 1, "Error: mend it\n"),
        (StoreError("build it"), 1, "Error: build it\n"),
        (DiskFull("disk full"), 3, "Error: disk full\n"),
        (KeyboardInterrupt(), 130, "Interrupted. Run the same command again to start over.\n"),
        (Terminated(), 143, "Interrupted. Run the same command again to start over.\n"),
    ):
        raised.append(error)
        result = alexprep("inspect", "--store", tmp_path)
        assert (result.exit_code, result.stdout, result.stderr) == (code, "", message)
    raised.append(KeyboardInterrupt())
    result = alexprep("export-files", tmp_path / "out", "--store", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == "Interrupted. Run the same command again to continue from here.\n"
    assert set(main.resumable) < set(main.commands)
    assert alexprep("inspect", "--nothing").exit_code == 2
    for code in ("0:", "1:", "2:", "3:", "130, 143:"):
        assert code in alexprep("--help").stdout


@pytest.mark.parametrize("split", ["train", "val"])
def test_pca_stats_answers_in_json(split: str, store: Path) -> None:
    result = alexprep("pca-stats", "--store", store, "--split", split, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert list(answer) == STATS_KEYS
    written = json.loads((store / split / "colour.json").read_bytes())
    assert {name: answer[name] for name in written} == written
    np.testing.assert_allclose(np.square(answer["std_rgb"]), np.diag(answer["covariance"]), rtol=1e-12)
    for name, values in answer["unit_range"].items():
        np.testing.assert_allclose(values, np.divide(answer[name], 255), rtol=1e-12)
    assert answer["records"] == {"train": 30, "val": 12}[split]
    assert answer["pixels"] == answer["records"] * 256 * 256
    assert answer["pixel_scale"] == 255
    np.testing.assert_allclose(np.square(answer["stdevs"]), answer["eigenvalues"], rtol=1e-12)


def test_pca_stats_prints_the_numbers_of_colour_json(store: Path) -> None:
    stats = json.loads((store / "train" / "colour.json").read_bytes())
    printed = alexprep("pca-stats", "--store", store).stdout
    assert f"30 records, {30 * 256 * 256:,} pixels" in printed
    for value in np.sqrt(np.diag(stats["covariance"])):
        assert f"{value:.2f}" in printed and f"{value / 255:.4f}" in printed
    for value in stats["mean_rgb"]:
        assert f"{value:.2f}" in printed
    for value in stats["stdevs"]:
        assert f"{value:.2f}" in printed
    for value in stats["eigenvalues"]:
        assert f"{value:.1f}" in printed
        assert f"{value / 255**2:.4f}" in printed
    for value in np.ravel(stats["eigenvectors"]):
        assert f"{value:.4f}" in printed


def test_pca_stats_recompute_reports_the_difference(store: Path) -> None:
    before = (store / "val" / "colour.json").read_bytes()
    built = json.loads(before)
    recomputed = json.loads(alexprep("pca-stats", "--store", store, "--split", "val", "--recompute", "--json").stdout)
    difference = max(abs(a - b) for a, b in zip(built["stdevs"], recomputed["stdevs"], strict=True))
    assert 0 < difference < 1
    result = alexprep("pca-stats", "--store", store, "--split", "val", "--recompute")
    assert result.exit_code == 0
    assert f"{difference:.4f} grey levels" in result.stdout
    assert "before JPEG" in result.stdout
    assert (store / "val" / "colour.json").read_bytes() == before


def test_pca_stats_writes_a_missing_colour_file_again(store: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(store, tmp_path / "store"))
    (copied / "train" / "colour.json").unlink()
    assert alexprep("pca-stats", "--store", copied).exit_code == 0
    assert (copied / "train" / "colour.json").read_bytes() == (store / "train" / "colour.json").read_bytes()


def test_pca_stats_without_a_store_is_a_one_line_error(store: Path, tmp_path: Path) -> None:
    fails(alexprep("pca-stats", "--store", tmp_path / "nowhere"), "no such store")
    fails(alexprep("pca-stats", "--store", tmp_path), "no manifest.json")
    copied = Path(shutil.copytree(store, tmp_path / "store"))
    (copied / "manifest.json").write_text("{")
    fails(alexprep("pca-stats", "--store", copied), "cannot be read")


def test_pca_stats_prints_its_result_and_writes_a_plot(store: Path, tmp_path: Path) -> None:
    """tests/prep/check/test_color_plot.py tests the content of the plot."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "pca.png"
    result = alexprep("pca-stats", "--store", store, "--plot", out, "--json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)) == STATS_KEYS
    assert result.stderr == f"Wrote {out}.\n"
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width > 600


def test_a_plot_that_cannot_be_written_is_a_one_line_error(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for out, code in ((tmp_path / "nowhere" / "pca.png", 2), (tmp_path / "pca.unknown", 2)):
        result = alexprep("pca-stats", "--store", store, "--plot", out)
        fails(result, "--plot", str(out), code=code)
        assert not out.exists()


def test_a_plot_without_matplotlib_is_an_error_that_says_what_to_install(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fails(alexprep("pca-stats", "--store", store, "--plot", tmp_path / "pca.png"), "pip install 'matplotlib>=3.9'")


def test_paths_with_undecodable_bytes_are_usable(photo_folder: Path, tmp_path: Path) -> None:
    """In Linux, the names of folders are bytes. Python represents bytes that are not UTF-8 as surrogates."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/store\xff"))
    options = ["--store", str(folder), "--jobs", "1"]
    built = CliRunner().invoke(main, ["build-lmdb", str(photo_folder), *options])
    verified = CliRunner().invoke(main, ["verify", *options])
    assert built.exit_code == verified.exit_code == 0, built.output + verified.output
    assert r"store\udcff: 42 records" in verified.output
