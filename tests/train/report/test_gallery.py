"""What is drawn, asked of matplotlib's own objects; which pictures a run has with and without a store; the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from prep.store.manifest import Store
from train.cli import main
from train.evaluation.predict import TopPredictions
from train.report.gallery import Trained
from train.report.plots_classes import class_errors, confusion_matrix, confusion_of
from train.report.plots_images import Guess, Row, feature_maps, guesses, nearest_rows
from train.report.plots_run import CURVE_SIZE, colour_axes, kernels, learning_curve, rate_drops
from train.report.style import ORANGE, rendered, stretched, tiled
from train.runs.run_dir import read_metrics

WITHOUT_STORE = ["colour-axes", "kernels", "learning-curve"]
WITH_STORE = sorted([*WITHOUT_STORE, "guesses", "nearest", "feature-maps", "class-errors", "confusion"])


def line(kind: str, epoch: float, **more: float) -> dict[str, Any]:
    return {"kind": kind, "epoch": epoch, "loss": 2 / epoch, "top1_error": 0.5, "top5_error": 0.2, **more}


def test_curves_have_every_line_and_mark_where_the_rate_falls_at_once() -> None:
    rates = {1.0: 0.01, 2.0: 0.01, 3.0: 0.001, 4.0: 0.0009, 5.0: 0.0001}
    lines = [line("train", epoch, lr=lr) for epoch, lr in rates.items()] + [line("val", 2), line("val", 4)]
    assert rate_drops(lines[:5]) == [(2.0, 0.001), (4.0, 0.0001)]
    figure = Figure()
    learning_curve(figure, lines)
    loss, error = figure.axes
    train, val, *marks = loss.lines
    assert train.get_xydata().tolist() == [[epoch, 2 / epoch] for epoch in rates]
    assert val.get_xydata().tolist() == [[2, 1], [4, 0.5]]
    assert [mark.get_xdata()[0] for mark in marks] == [2.0, 4.0]
    assert [text.get_text().strip() for text in loss.texts] == ["lr 0.001", "lr 0.0001"]
    assert {float(y) for drawn in error.lines[:4] for y in drawn.get_ydata()} == {50.0, 20.0}


def test_tiles_lie_in_reading_order_and_stretch_to_their_own_range() -> None:
    images = np.arange(5 * 6.0).reshape(5, 2, 3) * np.array([1, 2, 3, 4, 0])[:, None, None]
    shown = stretched(images)
    assert shown.min((1, 2)).tolist() == [0] * 5 and shown.max((1, 2)).tolist() == [1, 1, 1, 1, 0]
    sheet = tiled(shown, across=3, scale=2, gap=1)
    assert sheet.shape == (2 * 5 - 1, 3 * 7 - 1)
    assert np.array_equal(sheet[5:9:2, 7:13:2], shown[4]) and np.array_equal(sheet[0:4:2, 14:20:2], shown[2])
    assert (sheet[4] == 1).all() and (sheet[5:, 14:] == 1).all()


def test_kernels_of_column_0_lie_above_those_of_column_1() -> None:
    weights = torch.zeros(8, 3, 11, 11)
    weights[:4, 0, 0, 0] = 1.0  # red in the upper left corner
    weights[4:, 2, 10, 10] = 1.0  # blue in the lower right one
    figure = Figure()
    kernels(figure, {"conv1.weight": weights}, columns=2)
    above, below = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    assert [axes.get_title("left") for axes in figure.axes] == ["column 0", "column 1"]
    assert above[0, 0].tolist() == [1, 0, 0] and below[-1, -1].tolist() == [0, 0, 1]
    assert below[0, 0].tolist() == [0, 0, 0]


def test_colour_axes_move_the_mean_by_whole_standard_deviations(store: Path) -> None:
    stats = Store.open(store).color_stats()
    figure = Figure()
    colour_axes(figure, stats)
    strips, spectrum = figure.axes
    image = np.asarray(strips.images[0].get_array())
    for k in range(3):
        axis = np.array(stats.eigenvectors)[:, k] * stats.stdevs[k]
        assert np.abs(image[k, 160] - np.clip(np.array(stats.mean_rgb) + axis, 0, 255)).max() <= 0.5
    assert [bar.get_height() for bar in spectrum.patches] == pytest.approx(stats.stdevs)


LABELS = np.array([0, 0, 0, 1, 1, 2])
TAKEN_FOR = np.array([1, 1, 0, 1, 2, 2])


def test_confusion_counts_what_was_taken_for_what() -> None:
    found = confusion_of(np.eye(4)[TAKEN_FOR], LABELS)
    assert found.counts.tolist() == [[1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found.errors.tolist() == pytest.approx([2 / 3, 1 / 2, 0, 0]) and found.worst() == [0, 1]
    figure = Figure()
    class_errors(figure, found, "abcd")
    (bars,) = figure.axes
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([200 / 3, 50, 0])  # d has no image
    assert [text.get_text() for text in bars.texts] == ["2", "1", "0"]
    figure = Figure()
    confusion_matrix(figure, found, "abcd")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b", "c"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[100 / 3, 200 / 3, 0], [0, 50, 50]])
    assert [(*t.get_position(), t.get_text()) for t in axes.texts] == [
        (0, 0, "1"),
        (1, 0, "2"),
        (1, 1, "1"),
        (2, 1, "1"),
    ]
    assert [box.get_xy() for box in axes.patches] == [(-0.47, -0.47), (0.53, 0.53)]


def test_many_classes_are_one_curve_and_the_worst_by_name_and_no_errors_are_drawn_too() -> None:
    labels = np.arange(200) % 40
    figure = Figure()
    found = confusion_of(np.eye(40)[np.where(labels < 5, 39, labels)], labels)
    class_errors(figure, found, [str(k) for k in range(40)])
    curve, bars = figure.axes
    assert curve.get_xlabel().startswith("40 classes") and len(bars.patches) == 20
    assert [t.get_text() for t in bars.get_xticklabels()][:5] == ["0", "1", "2", "3", "4"]
    none = confusion_of(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2]))
    assert none.worst() == []
    assert rendered(lambda f: confusion_matrix(f, none, "abc"), (3, 3)).startswith(b"\x89PNG")


def test_the_right_guess_has_another_colour_and_so_have_neighbors_of_the_class() -> None:
    square = np.zeros((8, 8, 3), np.uint8)
    figure = Figure()
    guesses(figure, [Guess(square, 2, TopPredictions([0, 2, 1], [0.6, 0.3, 0.1]))], "xyz")
    picture, bars = (axes for axes in figure.axes if axes.images or axes.patches)
    assert picture.get_title() == "z" and [bar.get_width() for bar in bars.patches] == [0.6, 0.3, 0.1]
    assert [to_hex(bar.get_facecolor()) == ORANGE for bar in bars.patches] == [False, True, False]
    assert [text.get_text() for text in bars.texts] == ["x", "z", "y"]
    figure = Figure()
    near = [(square + k, k, float(k)) for k in range(3)]
    nearest_rows(figure, [Row(square, "0123456789" * 3, 1, near), Row(square, "r", None, near)], "xyz")
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown[:4]] == ["…" + "9" + "0123456789" * 2, "x  0", "y  1", "z  2"]
    assert [to_hex(axes.title.get_color()) == ORANGE for axes in shown] == [*[False] * 2, True, *[False] * 5]
    assert [int(axes.images[0].get_array().max()) for axes in shown[4:]] == [0, 0, 1, 2]


def test_feature_maps_show_the_strongest_of_each_column() -> None:
    maps = np.zeros((12, 13, 13), np.float32)
    maps[7, 3, 4], maps[2, 0, 0] = 5.0, 3.0
    figure = Figure()
    feature_maps(figure, np.zeros((8, 8, 3), np.uint8), {"conv1": [maps, maps * 0], "conv2": [maps, maps]})
    _, *panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["column 0", "column 1", "", ""]
    assert [axes.get_ylabel() for axes in panels] == ["conv1\n13×13", "", "conv2\n13×13", ""]
    image, scale = np.asarray(panels[0].images[0].get_array()), 9  # 110 px and more
    assert image[3 * scale, 4 * scale] == 1 and image[:, 13 * scale + 6 :][0, 0] == 1 and image[0, 0] == 0
    assert np.asarray(panels[1].images[0].get_array())[: 13 * scale, : 13 * scale].max() == 0


def test_names_are_drawn_as_they_are_written() -> None:
    """A formula for matplotlib, letters that its font lacks, a line's end, and one that would push all else aside."""
    names = ["$a_{b$", "猫\n", "x" * 200]
    square = np.zeros((8, 8, 3), np.uint8)
    rows = [Row(square, "$p_{1$.jpg\n", 0, [(square, k, float(k)) for k in range(3)])]
    made = [Guess(square, 2, TopPredictions([0, 2, 1], [0.6, 0.3, 0.1]))]
    found = confusion_of(np.eye(3)[[1, 2, 0]], np.array([0, 1, 2]))
    for draw in (
        lambda figure: nearest_rows(figure, rows, names),
        lambda figure: guesses(figure, made, names),
        lambda figure: class_errors(figure, found, names),
        lambda figure: confusion_matrix(figure, found, names),
    ):
        assert rendered(draw, (8, 3)).startswith(b"\x89PNG")
        figure = Figure()
        draw(figure)
        texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert "$a_{b$" in " ".join(texts) and "猫\\n" in " ".join(texts)
        assert all(len(text) < 50 and ("\n" not in text or "above" in text) for text in texts)


def test_probabilities_that_were_kept_are_those_of_the_checkpoint_and_the_precision(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained.open(trained_run, None, "cpu", "fp32")
    kept = trained.scores("val")
    monkeypatch.setattr("train.report.gallery.predict_split", None)
    assert np.array_equal(trained.scores("val").probabilities, kept.probabilities)

    for changed in (
        replace(trained, precision="bf16"),
        replace(trained, state=replace(trained.state, digest="another run's")),
    ):
        with pytest.raises(TypeError):  # to be made anew
            changed.scores("val")
    (path,) = trained_run.glob("scores-val-*.npz")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TypeError):
        trained.scores("val")


def drawn(*words: object) -> tuple[list[str], str]:
    result = CliRunner().invoke(main, ["figures", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stderr.splitlines(), result.stdout


def test_the_command_draws_all_with_a_store_and_says_what_it_leaves_out(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:  # tests/train/report/test_html.py looks at all of them
        patched.setattr("train.report.style.rendered", lambda draw, size, format: f"{size[0]} {format}".encode())
        drawn(trained_run)  # the training store is where it was
    assert sorted(path.stem for path in trained_run.glob("*.png")) == WITH_STORE
    assert (trained_run / "nearest.png").read_text() == "8.0 png"
    told = json.loads((trained_run / "run.json").read_text())
    told["settings"]["store"] = "nowhere"
    (trained_run / "run.json").write_text(json.dumps(told))
    said, answered = drawn(trained_run, "--format", "svg", "--out", tmp_path / "svg", "--json")
    assert {f"{name}.svg" for name in WITHOUT_STORE} == set(json.loads(answered)["files"])
    assert sorted(path.stem for path in (tmp_path / "svg").glob("*.svg")) == WITHOUT_STORE
    assert "No store to look at" in said[-1] and "--store" in said[-1]
    lines = read_metrics(trained_run)
    with open(trained_run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "val", "st')  # by a run that trains meanwhile
    again = rendered(lambda figure: learning_curve(figure, lines), CURVE_SIZE, "svg")
    assert again == (tmp_path / "svg" / "learning-curve.svg").read_bytes()
    drawn(trained_run, "--format", "svg", "--out", tmp_path / "svg")
    assert again == (tmp_path / "svg" / "learning-curve.svg").read_bytes()


def test_without_matplotlib(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(main, ["figures", str(trained_run)])
    assert result.exit_code == 1 and "pip install 'alexnet[figures]'" in result.stderr
