"""Tests of `alextrain figures`: figures with and without the store, reproducible bytes, and a missing package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")

from prep.plot_style import render_figure
from train.cli import main
from train.report.plots_run import LEARNING_CURVE_INCHES, draw_learning_curve
from train.runs.run_dir import read_metrics

WITHOUT_STORE = ["colour-axes", "kernels", "learning-curve"]
WITH_STORE = sorted([*WITHOUT_STORE, "guesses", "nearest", "feature-maps", "class-errors", "confusion"])


def run_command(*args: object) -> tuple[list[str], str]:
    """Run `alextrain figures`; returns the lines of standard error, and standard output."""
    result = CliRunner().invoke(main, ["figures", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.stderr.splitlines(), result.stdout


def test_all_figures_are_drawn_if_the_training_store_still_exists(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendering is replaced, because tests/train/report/test_html.py tests the content of all figures."""
    monkeypatch.setattr("prep.plot_style.render_figure", lambda draw, size, format: f"{size[0]} {format}".encode())
    run_command(trained_run)
    assert sorted(path.stem for path in trained_run.glob("*.png")) == WITH_STORE
    assert (trained_run / "nearest.png").read_text() == "8.0 png"


def test_without_a_store_figures_of_images_are_left_out_with_a_message(trained_run: Path, tmp_path: Path) -> None:
    description = json.loads((trained_run / "run.json").read_text())
    description["settings"]["store"] = "nowhere"
    (trained_run / "run.json").write_text(json.dumps(description))
    messages, answer = run_command(trained_run, "--format", "svg", "--out", tmp_path / "svg", "--json")
    assert {f"{name}.svg" for name in WITHOUT_STORE} == set(json.loads(answer)["files"])
    assert sorted(path.stem for path in (tmp_path / "svg").glob("*.svg")) == WITHOUT_STORE
    assert "training store was moved" in messages[-1] and "--store" in messages[-1]


def test_a_figure_has_the_same_bytes_each_time_and_ignores_an_incomplete_line(
    trained_run: Path, tmp_path: Path
) -> None:
    lines = read_metrics(trained_run)
    with open(trained_run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "val", "st')  # a line that a run in progress has not finished
    expected = render_figure(lambda figure: draw_learning_curve(figure, lines), LEARNING_CURVE_INCHES, "svg")
    for _ in range(2):
        # The store has no split `test`: figures of images are left out.
        run_command(trained_run, "--split", "test", "--format", "svg", "--out", tmp_path / "svg")
        assert (tmp_path / "svg" / "learning-curve.svg").read_bytes() == expected


def test_a_missing_matplotlib_is_reported_with_the_command_that_installs_it(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, ["figures", str(trained_run)])
    assert result.exit_code == 1 and "pip install 'matplotlib>=3.9'" in result.stderr
