"""Tests of the figures that train/report/plots_*.py draw. The tests read the contents of matplotlib's objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from prep.plot_style import render_figure
from prep.store.manifest import Store
from train.evaluation.predict import TopPredictions
from train.report.plots_classes import confusion_matrix, draw_class_errors, draw_confusion_matrix
from train.report.plots_images import (
    ImageAndNeighbors,
    ImageAndPredictions,
    draw_feature_maps,
    draw_neighbors,
    draw_predictions,
)
from train.report.plots_run import draw_color_axes, draw_kernels, draw_learning_curve, learning_rate_drops
from train.report.style import ORANGE, scale_to_unit_range, tile_images


def metrics_line(kind: str, epoch: float, **more: float) -> dict[str, Any]:
    return {"kind": kind, "epoch": epoch, "loss": 2 / epoch, "top1_error": 0.5, "top5_error": 0.2, **more}


def test_learning_curves_show_every_line_and_mark_drops_of_the_learning_rate() -> None:
    rates = {1.0: 0.01, 2.0: 0.01, 3.0: 0.001, 4.0: 0.0009, 5.0: 0.0001}
    lines = [metrics_line("train", epoch, lr=lr) for epoch, lr in rates.items()] + [
        metrics_line("val", 2),
        metrics_line("val", 4),
    ]
    assert learning_rate_drops(lines[:5]) == [(2.0, 0.001), (4.0, 0.0001)]
    figure = Figure()
    draw_learning_curve(figure, lines)
    loss, error = figure.axes
    train, val, *marks = loss.lines
    assert train.get_xydata().tolist() == [[epoch, 2 / epoch] for epoch in rates]
    assert val.get_xydata().tolist() == [[2, 1], [4, 0.5]]
    assert [mark.get_xdata()[0] for mark in marks] == [2.0, 4.0]
    assert [text.get_text().strip() for text in loss.texts] == ["lr 0.001", "lr 0.0001"]
    assert {float(y) for drawn in error.lines[:4] for y in drawn.get_ydata()} == {50.0, 20.0}


def test_tiles_are_in_reading_order_and_each_is_scaled_to_its_own_range() -> None:
    images = np.arange(5 * 6.0).reshape(5, 2, 3) * np.array([1, 2, 3, 4, 0])[:, None, None]
    shown = scale_to_unit_range(images)
    assert shown.min((1, 2)).tolist() == [0] * 5 and shown.max((1, 2)).tolist() == [1, 1, 1, 1, 0]
    sheet = tile_images(shown, per_row=3, scale=2, gap_px=1)
    assert sheet.shape == (2 * 5 - 1, 3 * 7 - 1)
    assert np.array_equal(sheet[5:9:2, 7:13:2], shown[4]) and np.array_equal(sheet[0:4:2, 14:20:2], shown[2])
    assert (sheet[4] == 1).all() and (sheet[5:, 14:] == 1).all()


def test_kernels_of_column_0_are_above_the_kernels_of_column_1() -> None:
    weights = torch.zeros(8, 3, 11, 11)
    weights[:4, 0, 0, 0] = 1.0  # column 0: red in the upper left corner
    weights[4:, 2, 10, 10] = 1.0  # column 1: blue in the lower right corner
    figure = Figure()
    draw_kernels(figure, {"conv1.weight": weights}, columns=2)
    above, below = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    assert [axes.get_title("left") for axes in figure.axes] == ["column 0", "column 1"]
    assert above[0, 0].tolist() == [1, 0, 0] and below[-1, -1].tolist() == [0, 0, 1]
    assert below[0, 0].tolist() == [0, 0, 0]


def test_color_axes_move_the_mean_color_by_whole_standard_deviations(store: Path) -> None:
    stats = Store.open(store).color_stats()
    figure = Figure()
    draw_color_axes(figure, stats)
    strips, spectrum = figure.axes
    image = np.asarray(strips.images[0].get_array())
    for k in range(3):
        axis = np.array(stats.eigenvectors)[:, k] * stats.stdevs[k]
        assert np.abs(image[k, 160] - np.clip(np.array(stats.mean_rgb) + axis, 0, 255)).max() <= 0.5
    assert [bar.get_height() for bar in spectrum.patches] == pytest.approx(stats.stdevs)


LABELS = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([1, 1, 0, 1, 2, 2])


def test_the_confusion_matrix_counts_classes_by_predicted_class() -> None:
    confusion = confusion_matrix(np.eye(4)[PREDICTED], LABELS)
    assert confusion.counts.tolist() == [[1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert confusion.errors.tolist() == pytest.approx([2 / 3, 1 / 2, 0, 0]) and confusion.worst() == [0, 1]
    figure = Figure()
    draw_class_errors(figure, confusion, "abcd")
    (bars,) = figure.axes
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([200 / 3, 50, 0])  # the class d has no image
    assert [text.get_text() for text in bars.texts] == ["2", "1", "0"]
    figure = Figure()
    draw_confusion_matrix(figure, confusion, "abcd")
    axes, scale = figure.axes
    assert scale.get_ylabel() == "share of the images of the class, %" and scale.get_ylim() == (0, 100)
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


def test_many_classes_are_drawn_as_a_curve_with_names_for_the_worst_only() -> None:
    labels = np.arange(200) % 40
    figure = Figure()
    confusion = confusion_matrix(np.eye(40)[np.where(labels < 5, 39, labels)], labels)
    draw_class_errors(figure, confusion, [str(k) for k in range(40)])
    curve, bars = figure.axes
    assert curve.get_xlabel().startswith("40 classes") and len(bars.patches) == 20
    assert [t.get_text() for t in bars.get_xticklabels()][:5] == ["0", "1", "2", "3", "4"]
    none = confusion_matrix(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2]))
    assert none.worst() == []
    assert render_figure(lambda f: draw_confusion_matrix(f, none, "abc"), (3, 3)).startswith(b"\x89PNG")


def test_the_correct_class_is_orange_among_predictions_and_neighbors() -> None:
    square = np.zeros((8, 8, 3), np.uint8)
    figure = Figure()
    draw_predictions(figure, [ImageAndPredictions(square, 2, TopPredictions([0, 2, 1], [0.6, 0.3, 0.1]))], "xyz")
    picture, bars = (axes for axes in figure.axes if axes.images or axes.patches)
    assert picture.get_title() == "z" and [bar.get_width() for bar in bars.patches] == [0.6, 0.3, 0.1]
    assert [to_hex(bar.get_facecolor()) == ORANGE for bar in bars.patches] == [False, True, False]
    assert [text.get_text() for text in bars.texts] == ["x", "60.0%", "z", "30.0%", "y", "10.0%"]
    figure = Figure()
    near = [(square + k, k, float(k)) for k in range(3)]
    draw_neighbors(
        figure,
        [ImageAndNeighbors(square, "0123456789" * 3, 1, near), ImageAndNeighbors(square, "r", None, near)],
        "xyz",
    )
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown[:4]] == ["…" + "3456789" + "0123456789", "x  0", "y  1", "z  2"]
    assert [to_hex(axes.title.get_color()) == ORANGE for axes in shown] == [*[False] * 2, True, *[False] * 5]
    assert [int(axes.images[0].get_array().max()) for axes in shown[4:]] == [0, 0, 1, 2]


def test_feature_maps_with_the_highest_activation_of_each_column_are_drawn() -> None:
    maps = np.zeros((12, 13, 13), np.float32)
    maps[7, 3, 4], maps[2, 0, 0] = 5.0, 3.0
    figure = Figure()
    draw_feature_maps(figure, np.zeros((8, 8, 3), np.uint8), {"conv1": [maps, maps * 0], "conv2": [maps, maps]})
    _, *panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["column 0", "column 1", "", ""]
    assert [axes.get_ylabel() for axes in panels] == ["conv1\n13×13", "", "conv2\n13×13", ""]
    image = np.asarray(panels[0].images[0].get_array())
    scale = 9  # the smallest integer factor that enlarges 13 px to at least 110 px
    assert image[3 * scale, 4 * scale] == 1 and image[:, 13 * scale + 6 :][0, 0] == 1 and image[0, 0] == 0
    assert np.asarray(panels[1].images[0].get_array())[: 13 * scale, : 13 * scale].max() == 0


def test_unusual_names_are_drawn_literally_and_shortened() -> None:
    """One name has a $, with which matplotlib begins a formula.

    Another name has a character that the font lacks, and a third name has 200 letters.
    """
    names = ["$a_{b$", "猫\n", "x" * 200]
    square = np.zeros((8, 8, 3), np.uint8)
    rows = [ImageAndNeighbors(square, "$p_{1$.jpg\n", 0, [(square, k, float(k)) for k in range(3)])]
    predicted = [ImageAndPredictions(square, 2, TopPredictions([0, 2, 1], [0.6, 0.3, 0.1]))]
    confusion = confusion_matrix(np.eye(3)[[1, 2, 0]], np.array([0, 1, 2]))
    for draw in (
        lambda figure: draw_neighbors(figure, rows, names),
        lambda figure: draw_predictions(figure, predicted, names),
        lambda figure: draw_class_errors(figure, confusion, names),
        lambda figure: draw_confusion_matrix(figure, confusion, names),
    ):
        assert render_figure(draw, (8, 3)).startswith(b"\x89PNG")
        figure = Figure()
        draw(figure)
        texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert "$a_{b$" in " ".join(texts) and "猫\\n" in " ".join(texts)
        assert all(len(text) < 50 and ("\n" not in text or "above" in text) for text in texts)
