"""All figures of a run, in display order. Without a store, the figures that need images are left out."""

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

# Numbers of images with predictions, of query images, and of neighbors for each query (the paper's figure 4).
PREDICTED, QUERIES, NEIGHBORS = 8, 5, 6
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
    """Yield the figures of a run.

    Figures that need images are left out if there is no store, or no `split` in the store.

    seed           random seed for choosing the images of `split` that are shown
    index_records  largest number of training records that are searched for nearest neighbors

    Raises the errors of the functions of train/evaluation.
    """
    yield from _figures_without_images(trained)
    if trained.store is not None and split in trained.store.splits:
        yield from _figures_of_images(trained, split, seed, index_records)
        yield from _figures_of_errors(trained, split)


def _figures_without_images(trained: TrainedRun) -> Iterator[RunFigure]:
    lines = read_metrics(trained.run_dir)
    if lines:  # an imported run has no metrics before it is trained
        yield RunFigure(
            "learning-curve",
            "Learning curves",
            "Loss and errors over the epochs. Vertical lines mark drops of the learning rate.",
            LEARNING_CURVE_INCHES,
            lambda figure: draw_learning_curve(figure, lines, len(trained.classes)),
        )
    parameters, columns = trained.checkpoint.parameters, trained.network.architecture.columns
    yield RunFigure(
        "kernels",
        "First kernels",
        f"The {len(parameters['conv1.weight'])} kernels of conv1, 11×11×3. Each kernel is scaled to its own range. "
        + ("Column 0 is above column 1. " if columns > 1 else "")
        + "The paper's figure 3.",
        kernels_inches(parameters, columns),
        lambda figure: draw_kernels(figure, parameters, columns),
    )
    color_stats = saved_color_stats(trained.description)
    yield RunFigure(
        "colour-axes",
        "Colour axes of the store",
        "Principal components of the training pixels. In section 4.1 of the paper, colour noise is added along these "
        "components.",
        COLOR_AXES_INCHES,
        lambda figure: draw_color_axes(figure, color_stats),
    )


def _figures_of_images(trained: TrainedRun, split: str, seed: int, index_records: int) -> Iterator[RunFigure]:
    store, network, transform, names = trained.require_store(split), trained.network, trained.transform, trained.classes
    with ExitStack() as stack:
        images = stack.enter_context(StoredImages(store, split))
        indices = np.random.default_rng(seed).permutation(len(images))[: PREDICTED + QUERIES].tolist()
        predicted = [
            ImageAndPredictions(
                images[index],
                images.label(index),
                top_predictions(network, transform, images[index], precision=trained.precision),
            )
            for index in indices[:PREDICTED]
        ]
        yield RunFigure(
            "guesses",
            "Test images and their most probable labels",
            f"{len(predicted)} randomly chosen images of {split}, with the {min(5, len(names))} most probable labels. "
            "The probabilities are averaged over ten views. The correct label is orange. The paper's figure 4, left.",
            predictions_inches(len(predicted)),
            lambda figure: draw_predictions(figure, predicted, names),
        )
        if "train" in store.splits:
            # If `split` has at least PREDICTED + QUERIES images, the queries are not in `predicted`.
            queries = indices[-QUERIES:]
            training_images = stack.enter_context(StoredImages(store, "train"))
            neighbor_index = load_or_build_index(
                trained.run_dir, network, trained.checkpoint, store, index_records, trained.precision
            )
            features = np.stack(
                [image_features(network, transform, images[k], LAYER, trained.precision) for k in queries]
            )
            rows = []
            for query, neighbors in zip(queries, nearest_neighbors(neighbor_index, features, NEIGHBORS), strict=True):
                shown = [(training_images[n.record], n.label, n.distance) for n in neighbors]
                label = images.label(query)
                rows.append(ImageAndNeighbors(images[query], names[label], label, shown))
            yield RunFigure(
                "nearest",
                "Nearest training images",
                f"Left: images of {split}. Right: the {len(rows[0].neighbors)} nearest of "
                f"{len(neighbor_index.labels):,} training images, with class and distance. The distance is between the "
                f"{LAYER} activations ({neighbor_index.features.shape[1]:,} units, centre crop). A class is "
                "orange if it is the class of the image at the left. The paper's figure 4, right.",
                neighbors_inches(len(rows), len(rows[0].neighbors)),
                lambda figure: draw_neighbors(figure, rows, names),
            )
        square = images[indices[0]]
        maps = _feature_maps(trained, square)
        yield RunFigure(
            "feature-maps",
            "Feature maps",
            "Feature maps of one image. For each convolutional layer and each column, the maps with the highest "
            "activations are shown. Each map is scaled to its own range.",
            FEATURE_MAPS_INCHES,
            lambda figure: draw_feature_maps(figure, square, maps),
        )


def _feature_maps(trained: TrainedRun, square: Pixels) -> dict[str, list[npt.NDArray[np.float32]]]:
    """Return the activations for the centre crop.

    For each conv layer, there is an array (maps, height, width) for each column.
    """
    with evaluation_mode(trained.network), capture_activations(trained.network, _CONV_LAYERS) as captured:
        trained.network(torch.from_numpy(trained.transform.crops(square)))
    return {layer: [part[0].float().cpu().numpy() for part in parts] for layer, parts in captured.items()}


def _figures_of_errors(trained: TrainedRun, split: str) -> Iterator[RunFigure]:
    predictions = trained.predictions(split)
    confusion, names = confusion_matrix(predictions.probabilities, predictions.labels), trained.classes
    yield RunFigure(
        "class-errors",
        "Errors per class",
        f"Top-1 error of each class of {split}, measured on the centre crop. The worst class comes first.",
        ERRORS_INCHES,
        lambda figure: draw_class_errors(figure, confusion, names),
    )
    yield RunFigure(
        "confusion",
        "Confusion of the worst classes",
        "Each row is a class with a high error, and each column is a predicted class. A cell has the number of images "
        "of the row's class for which the column's class is predicted. The shade is the share of these images in the "
        "row's class. The correct class is framed.",
        CONFUSION_INCHES,
        lambda figure: draw_confusion_matrix(figure, confusion, names),
    )
