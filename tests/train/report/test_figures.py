"""Tests of `alextrain figures`: figures with and without the store, reproducible bytes, and a missing matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from prep.plot_style import render_figure
from tests.helpers.alextrain import lose_store
from train.cli import main
from train.report.plots_run import LEARNING_CURVE_INCHES, draw_learning_curve
from train.report.style import with_caption
from train.runs.run_dir import read_metrics

WITHOUT_STORE = ["colour-axes", "kernels", "learning-curve"]
WITH_STORE = sorted([*WITHOUT_STORE, "guesses", "nearest", "feature-maps", "class-errors", "confusion"])


def run_command(*args: object, code: int = 0) -> tuple[list[str], str]:
    """Run `alextrain figures`, and return the lines of standard error and the standard output."""
    result = CliRunner().invoke(main, ["figures", *map(str, args)])
    assert result.exit_code == code, result.output
    return result.stderr.splitlines(), result.stdout


def test_all_figures_are_drawn_if_the_training_store_still_exists(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test renders no figure. tests/train/report/test_html.py tests the content of all figures."""
    monkeypatch.setattr("prep.plot_style.render_figure", lambda draw, size, format: f"{size[0]} {format}".encode())
    run_command(trained_run)
    assert sorted(path.stem for path in trained_run.glob("*.png")) == WITH_STORE
    assert (trained_run / "nearest.png").read_text() == "8.0 png"


def test_a_single_picture_has_its_caption_and_a_run_of_one_line_is_visible(trained_run: Path, tmp_path: Path) -> None:
    first = (trained_run / "metrics.jsonl").read_text().splitlines()[0]
    (trained_run / "metrics.jsonl").write_text(first + "\n")
    run_command(trained_run, "--no-images", "--format", "svg", "--out", tmp_path)
    svg = (tmp_path / "learning-curve.svg").read_text()
    assert "<!-- Learning curves. Loss and errors over the epochs." in svg and "top-1 error, %" in svg
    assert "top-5" not in svg  # the store has three classes
    figure = Figure()
    draw_learning_curve(figure, [json.loads(first)], 3)
    for axes in figure.axes:
        (line,) = [line for line in axes.lines if len(line.get_xdata())]
        assert line.get_marker() == "o"


def test_without_a_store_figures_of_images_are_left_out_with_a_message_and_exit_code_1(
    trained_run: Path, tmp_path: Path
) -> None:
    lose_store(trained_run)
    options = [trained_run, "--format", "svg", "--out", tmp_path / "svg", "--json"]
    messages, answer = run_command(*options, code=1)
    assert {f"{name}.svg" for name in WITHOUT_STORE} == set(json.loads(answer)["files"])
    assert sorted(path.stem for path in (tmp_path / "svg").glob("*.svg")) == WITHOUT_STORE
    assert "the training store /nowhere/store was moved" in messages[-1] and "--store" in messages[-1]
    assert run_command(*options, "--no-images") == ([], answer)
    result = CliRunner().invoke(main, ["report", str(trained_run)])
    assert result.exit_code == 1 and "/nowhere/store was moved" in result.stderr
    assert (trained_run / "report.html").exists()


def test_a_figure_has_the_same_bytes_each_time_and_ignores_an_incomplete_line(
    trained_run: Path, tmp_path: Path
) -> None:
    lines = read_metrics(trained_run)
    with open(trained_run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "val", "st')  # this line is not complete, because the run is still writing it
    draw, size_inches = with_caption(
        lambda figure: draw_learning_curve(figure, lines, 3),
        LEARNING_CURVE_INCHES,
        "Learning curves. Loss and errors over the epochs. Vertical lines mark drops of the learning rate.",
    )
    expected = render_figure(draw, size_inches, "svg")
    for _ in range(2):
        run_command(trained_run, "--no-images", "--format", "svg", "--out", tmp_path / "svg")
        assert (tmp_path / "svg" / "learning-curve.svg").read_bytes() == expected
    messages, _ = run_command(trained_run, "--split", "test", "--format", "svg", "--out", tmp_path / "svg", code=1)
    assert "has no split test, only train and val. Name another --split." in messages[-1]


def test_a_missing_matplotlib_is_reported_with_the_command_that_installs_it(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, ["figures", str(trained_run)])
    assert result.exit_code == 1 and "pip install 'matplotlib>=3.9'" in result.stderr
