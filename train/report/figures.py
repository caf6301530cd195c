"""All figures of a run, in the order in which they are shown: drawn by `alextrain figures` and `alextrain report`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.still_image import Pixels, StoredImages
from prep.plot_style import DrawFunction
from train.config.choices import INDEX_RECORDS
from train.evaluation.features import capture_activations
from train.evaluation.neighbors import LAYER, load_or_build_index, nearest_neighbors
from train.evaluation.predict import image_features, top_predictions
from train.evaluation.trained_run import TrainedRun
from train.model.modes import evaluation_mode
from train.report.plots_classes import (
    CONFUSION_INCHES,
    ERRORS_INCHES,
    confusion_matrix,
    draw_class_errors,
    draw_confusion_matrix,
)
from train.report.plots_images import (
    FEATURE_MAPS_INCHES,
    ImageAndNeighbors,
    ImageAndPredictions,
    draw_feature_maps,
    draw_neighbors,
    draw_predictions,
    neighbors_inches,
    predictions_inches,
)
from train.report.plots_run import (
    COLOR_AXES_INCHES,
    LEARNING_CURVE_INCHES,
    draw_color_axes,
    draw_kernels,
    draw_learning_curve,
    kernels_inches,
)
from train.runs.preprocessing import saved_color_stats
from train.runs.run_dir import read_metrics

PREDICTED, QUERIES, NEIGHBORS = 8, 5, 6  # images, as in the paper's figure 4
_CONV_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")


class RunFigure(NamedTuple):
    """A figure of a run, to be drawn by prep.plot_style.render_figure."""

    name: str  # file name without an extension
    title: str
    caption: str
    size_inches: tuple[float, float]
    draw: DrawFunction


def run_figures(
    trained: TrainedRun, split: str = "val", seed: int = 0, index_records: int = INDEX_RECORDS
) -> Iterator[RunFigure]:
    """The figures of a run. Those that need images are left out if there is no store, or it has no such split.

    seed           chooses the images of `split` that are shown
    index_records  training records to search for nearest neighbors, at most

    Raises UserError as the functions of train/evaluation.
    """
    yield from _figures_without_images(trained)
    if trained.store is not None and split in trained.store.splits:
        yield from _figures_of_images(trained, split, seed, index_records)
        yield from _figures_of_errors(trained, split)


def _figures_without_images(trained: TrainedRun) -> Iterator[RunFigure]:
    lines = read_metrics(trained.run_dir)
    if lines:  # an imported network has none
        yield RunFigure(
            "learning-curve",
            "Learning curves",
            "Loss and errors over the epochs. Vertical lines mark drops of the learning rate.",
            LEARNING_CURVE_INCHES,
            lambda figure: draw_learning_curve(figure, lines),
        )
    parameters, columns = trained.checkpoint.parameters, trained.network.architecture.columns
    yield RunFigure(
        "kernels",
        "First kernels",
        f"The {len(parameters['conv1.weight'])} kernels of conv1, 11×11×3 each, scaled to their own range"
        + (": column 0 above column 1. The paper's figure 3." if columns > 1 else ". The paper's figure 3."),
        kernels_inches(parameters, columns),
        lambda figure: draw_kernels(figure, parameters, columns),
    )
    color_stats = saved_color_stats(trained.description)
    yield RunFigure(
        "colour-axes",
        "Colour axes of the store",
        "Principal components of the training pixels, along which section 4.1 adds colour noise.",
        COLOR_AXES_INCHES,
        lambda figure: draw_color_axes(figure, color_stats),
    )


def _figures_of_images(trained: TrainedRun, split: str, seed: int, index_records: int) -> Iterator[RunFigure]:
    store, network, transform, names = trained.require_store(split), trained.network, trained.transform, trained.classes
    with ExitStack() as stack:
        images = stack.enter_context(StoredImages(store, split))
        numbers = np.random.default_rng(seed).permutation(len(images))[: PREDICTED + QUERIES].tolist()
        predicted = [
            ImageAndPredictions(
                images[number],
                images.label(number),
                top_predictions(network, transform, images[number], precision=trained.precision),
            )
            for number in numbers[:PREDICTED]
        ]
        yield RunFigure(
            "guesses",
            "Test images and their five most probable labels",
            f"{len(predicted)} images of {split}, drawn at random, with the five most probable labels by ten views; "
            "the correct one in orange. The paper's figure 4, left.",
            predictions_inches(len(predicted)),
            lambda figure: draw_predictions(figure, predicted, names),
        )
        if "train" in store.splits:
            queries = numbers[-QUERIES:]  # other images than in the figure above, if there are enough
            training_images = stack.enter_context(StoredImages(store, "train"))
            index = load_or_build_index(
                trained.run_dir, network, trained.checkpoint, store, index_records, trained.precision
            )
            features = np.stack(
                [image_features(network, transform, images[k], LAYER, trained.precision) for k in queries]
            )
            rows = []
            for number, neighbors in zip(queries, nearest_neighbors(index, features, NEIGHBORS), strict=True):
                shown = [(training_images[n.record], n.label, n.distance) for n in neighbors]
                label = images.label(number)
                rows.append(ImageAndNeighbors(images[number], names[label], label, shown))
            yield RunFigure(
                "nearest",
                "Nearest training images",
                f"Images of {split} at the left; beside each the {len(rows[0].neighbors)} of {len(index.labels):,} "
                f"training images whose {LAYER} ({index.features.shape[1]:,} units, centre crop) is nearest, with "
                "class and distance; those of its class in orange. The paper's figure 4, right.",
                neighbors_inches(len(rows), len(rows[0].neighbors)),
                lambda figure: draw_neighbors(figure, rows, names),
            )
        square = images[numbers[0]]
        maps = _feature_maps(trained, square)
        yield RunFigure(
            "feature-maps",
            "Feature maps",
            "One image through the convolutional layers: of each column the maps with the highest activations, each "
            "scaled to its own range.",
            FEATURE_MAPS_INCHES,
            lambda figure: draw_feature_maps(figure, square, maps),
        )


def _feature_maps(trained: TrainedRun, square: Pixels) -> dict[str, list[npt.NDArray[np.float32]]]:
    """By layer, for each column (maps, rows, columns): activations of the convolutional layers for the centre crop."""
    with evaluation_mode(trained.network), capture_activations(trained.network, _CONV_LAYERS) as captured:
        trained.network(torch.from_numpy(trained.transform.crops(square)))
    return {layer: [part[0].float().cpu().numpy() for part in parts] for layer, parts in captured.items()}


def _figures_of_errors(trained: TrainedRun, split: str) -> Iterator[RunFigure]:
    predictions = trained.predictions(split)
    confusion, names = confusion_matrix(predictions.probabilities, predictions.labels), trained.classes
    yield RunFigure(
        "class-errors",
        "Errors per class",
        f"Top-1 errors of {split}, centre crop, the worst class first.",
        ERRORS_INCHES,
        lambda figure: draw_class_errors(figure, confusion, names),
    )
    yield RunFigure(
        "confusion",
        "Confusion of the worst classes",
        "Images of the classes with the highest errors, by predicted class; the correct one is framed.",
        CONFUSION_INCHES,
        lambda figure: draw_confusion_matrix(figure, confusion, names),
    )
