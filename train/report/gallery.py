"""All pictures of a run, in the order in which they are looked at: what `alextrain figures` and the report draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.still_image import EvalTransform, StoredImages
from prep.console import UserError
from prep.store.manifest import Store
from train.config.choices import INDEX_RECORDS
from train.config.devices import parse_devices
from train.evaluation.features import capture_activations
from train.evaluation.neighbors import LAYER, load_or_build_index, nearest_neighbors
from train.evaluation.predict import image_features, top_predictions
from train.evaluation.predictions import Predictions, load_predictions, predict_split, record_evaluation
from train.model.alexnet import AlexNet
from train.model.modes import evaluation_mode
from train.report.plots_classes import CONFUSION_SIZE, ERRORS_SIZE, class_errors, confusion_matrix, confusion_of
from train.report.plots_images import (
    MAPS_SIZE,
    Guess,
    Row,
    feature_maps,
    guesses,
    guesses_size,
    nearest_rows,
    rows_size,
)
from train.report.plots_run import COLOUR_SIZE, CURVE_SIZE, colour_axes, kernels, kernels_size, learning_curve
from train.report.style import Draw
from train.runs.checkpoint import Checkpoint
from train.runs.loading import load_trained, run_and_checkpoint
from train.runs.preprocessing import find_store, load_eval_transform, saved_color_stats
from train.runs.run_dir import read_description, read_metrics

GUESSES, QUERIES, NEIGHBORS = 8, 5, 6  # as in the paper's figure 4
_MAPPED = ("conv1", "conv2", "conv3", "conv4", "conv5")


class Plate(NamedTuple):
    """One picture to be drawn."""

    name: str  # of its file, without an extension
    title: str
    caption: str
    size: tuple[float, float]  # inches
    draw: Draw


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, and where its pictures come from."""

    run_dir: Path
    model: AlexNet
    state: Checkpoint
    store: Store | None
    precision: str = "fp32"

    @staticmethod
    def open(run_dir: Path, store: Path | None, gpus: str | None, precision: str, checkpoint: str = "last") -> Trained:
        """Raises UserError as load_trained, find_store and parse_devices."""
        run_dir, checkpoint = run_and_checkpoint(run_dir, checkpoint)
        model, state = load_trained(run_dir, parse_devices(gpus), checkpoint)
        return Trained(run_dir, model, state, find_store(run_dir, state, store), precision)

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes; a label is an index into them."""
        return self.state.classes

    @cached_property
    def told(self) -> dict[str, Any]:
        """run.json."""
        return read_description(self.run_dir)

    @cached_property
    def eye(self) -> EvalTransform:
        """How this network is shown pictures."""
        return load_eval_transform(self.run_dir, self.model.recipe)

    def looked_at(self, split: str) -> Store:
        """The store; raises UserError where there is none, or it lacks the split."""
        if self.store is None:
            raise UserError(f"{self.run_dir}: its training store is not where it was. Name it with --store.")
        self.store.split(split)
        return self.store

    def scores(self, split: str) -> Predictions:
        """Probabilities of a split by the centre view: read where the run folder has them, else made and kept."""
        store = self.looked_at(split)
        path = self.run_dir / f"scores-{split}-{self.state.step:08d}.npz"
        asked = {
            "checkpoint": self.state.digest,
            "split_fingerprint": store.split(split).fingerprint,
            "precision": self.precision,
        }
        try:
            kept = load_predictions(path)
            if all(kept.about.get(name) == value for name, value in asked.items()):
                return kept
        except UserError:
            pass  # missing, or torn: they are made anew
        result, scores = predict_split(self.model, self.state, store, split, 1, self.precision, str(self.run_dir))
        record_evaluation(self.run_dir, scores.about, result)
        for old in self.run_dir.glob(f"scores-{split}-*.npz"):
            old.unlink()
        scores.save(path)
        return scores


def plates(trained: Trained, split: str = "val", seed: int = 0, most: int = INDEX_RECORDS) -> Iterator[Plate]:
    """The pictures of a run. Those that look at photographs are left out where there is no store with `split`.

    `seed` chooses which photographs are shown, `most` bounds the index (train.evaluation.neighbors). Raises UserError as what they
    need.
    """
    yield from _of_the_run(trained)
    if trained.store is not None and split in trained.store.splits:
        yield from _of_photographs(trained, split, seed, most)
        yield from _of_errors(trained, split)


def _of_the_run(trained: Trained) -> Iterator[Plate]:
    lines = read_metrics(trained.run_dir)
    if lines:  # an imported network has none
        yield Plate(
            "learning-curve",
            "Learning curves",
            "Loss and errors over the epochs. Upright lines mark where the learning rate fell.",
            CURVE_SIZE,
            lambda figure: learning_curve(figure, lines),
        )
    parameters, columns = trained.state.parameters, trained.model.architecture.columns
    yield Plate(
        "kernels",
        "First kernels",
        f"The {len(parameters['conv1.weight'])} kernels of conv1, 11×11×3 each, stretched to their own range"
        + (": column 0's above column 1's. The paper's figure 3." if columns > 1 else ". The paper's figure 3."),
        kernels_size(parameters, columns),
        lambda figure: kernels(figure, parameters, columns),
    )
    colour = saved_color_stats(trained.told)
    yield Plate(
        "colour-axes",
        "Colour axes of the store",
        "Principal components of the training pixels, along which the colour noise of section 4.1 goes.",
        COLOUR_SIZE,
        lambda figure: colour_axes(figure, colour),
    )


def _of_photographs(trained: Trained, split: str, seed: int, most: int) -> Iterator[Plate]:
    store, model, eye, names = trained.looked_at(split), trained.model, trained.eye, trained.classes
    with ExitStack() as held:
        shown = held.enter_context(StoredImages(store, split))
        numbers = np.random.default_rng(seed).permutation(len(shown))[: GUESSES + QUERIES].tolist()
        made = []
        for number in numbers[:GUESSES]:
            p = top_predictions(model, eye, shown[number], 10, precision=trained.precision)
            made.append(Guess(shown[number], shown.label(number), p))
        yield Plate(
            "guesses",
            "Test pictures and their five best labels",
            f"{len(made)} pictures of {split}, drawn by chance, with the five most probable labels by ten views; the "
            "right one in orange. The paper's figure 4, left.",
            guesses_size(len(made)),
            lambda figure: guesses(figure, made, names),
        )
        if "train" in store.splits:
            queries = numbers[-QUERIES:]  # others than the guesses, where there are enough
            training = held.enter_context(StoredImages(store, "train"))
            index = load_or_build_index(trained.run_dir, model, trained.state, store, most, trained.precision)
            units = [image_features(model, eye, shown[k], LAYER, trained.precision) for k in queries]
            rows = []
            for number, near in zip(queries, nearest_neighbors(index, np.stack(units), NEIGHBORS), strict=True):
                found = [(training[n.record], n.label, n.distance) for n in near]
                rows.append(Row(shown[number], names[shown.label(number)], shown.label(number), found))
            yield Plate(
                "nearest",
                "Nearest training pictures",
                f"Pictures of {split} at the left; beside each the {len(rows[0].neighbors)} of {len(index.labels):,} "
                f"training pictures whose {LAYER} ({index.features.shape[1]:,} units, centre view) is nearest, with "
                "class and distance; those of its class in orange. The paper's figure 4, right.",
                rows_size(len(rows), len(rows[0].neighbors)),
                lambda figure: nearest_rows(figure, rows, names),
            )
        square = shown[numbers[0]]
        columns = _maps(trained, square)
        yield Plate(
            "feature-maps",
            "Feature maps",
            "One picture through the convolutional layers: of each column the maps that answer most strongly, each "
            "stretched to its own range.",
            MAPS_SIZE,
            lambda figure: feature_maps(figure, square, columns),
        )


def _maps(trained: Trained, square: Any) -> dict[str, list[Any]]:
    """(maps, rows, columns) of each layer and column, for the centre view."""
    with evaluation_mode(trained.model), capture_activations(trained.model, _MAPPED) as found:
        trained.model(torch.from_numpy(trained.eye.crops(square)))
    return {layer: [part[0].float().cpu().numpy() for part in parts] for layer, parts in found.items()}


def _of_errors(trained: Trained, split: str) -> Iterator[Plate]:
    scores = trained.scores(split)
    confusion, names = confusion_of(scores.probabilities, scores.labels), trained.classes
    yield Plate(
        "class-errors",
        "Errors per class",
        f"Top-1 errors of {split}, centre view, the worst class first.",
        ERRORS_SIZE,
        lambda figure: class_errors(figure, confusion, names),
    )
    yield Plate(
        "confusion",
        "What the worst classes are taken for",
        "Images of the classes with the highest errors, by the class that they were taken for; the right one is "
        "framed.",
        CONFUSION_SIZE,
        lambda figure: confusion_matrix(figure, confusion, names),
    )
