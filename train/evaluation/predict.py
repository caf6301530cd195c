"""Results of a network for single images: the most probable classes, and the activations of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline.still_image import EvalTransform, Pixels, read_photographs
from prep.console import UserError, count_noun, print_json, say
from prep.images.limits import MAX_PIXELS
from train.evaluation.evaluate import log_mean_softmax
from train.evaluation.features import compute_activations
from train.model.alexnet import AlexNet
from train.model.modes import evaluation_mode
from train.model.precision import autocast, set_precision


@dataclass(frozen=True)
class TopPredictions:
    """Class indices and their probabilities. The most probable class comes first."""

    labels: list[int]
    probabilities: list[float]


def top_predictions(
    network: AlexNet,
    transform: EvalTransform,
    square: Pixels,
    views: int = 10,
    count: int = 5,
    precision: str = "fp32",
) -> TopPredictions:
    """Return the `count` most probable classes of an image. The softmax is averaged over `views` (1 or 10) crops.

    square  the central square of the image, uint8 (side_px, side_px, 3)
    """
    set_precision(precision, network.devices)
    images = torch.from_numpy(transform.crops(square, views))
    with evaluation_mode(network), autocast(precision, network.devices[0]):
        logits = network(images)
    probabilities = np.exp(log_mean_softmax(logits[None])[0].double().cpu().numpy())
    order = np.argsort(-probabilities, kind="stable")[:count]
    return TopPredictions(order.tolist(), probabilities[order].tolist())


def image_features(
    network: AlexNet, transform: EvalTransform, square: Pixels, layer: str, precision: str = "fp32"
) -> npt.NDArray[np.float32]:
    """Return the activations (units,) of a fully connected layer for the centre crop of an image's central square."""
    set_precision(precision, network.devices)
    images = torch.from_numpy(transform.crops(square))
    return compute_activations(network, images, [layer], precision)[layer][0].numpy()


def load_photographs(
    paths: Sequence[Path], transform: EvalTransform, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Path, Pixels | UserError]]:
    """Yield (path, central square) of photographs that are preprocessed like the images of the training store.

    If a file cannot be used, yields (path, error) for this file, and continues with the next file. Prints a message if
    a file has an EXIF orientation other than 1, or if the decoder warns. The EXIF orientation is not applied, because
    alexprep does not apply the EXIF orientation of training images.
    """
    for path, photograph in read_photographs(paths, transform.settings, max_pixels):
        if isinstance(photograph, UserError):
            yield path, photograph
            continue
        if photograph.orientation != 1:
            say(f"{path}: EXIF orientation {photograph.orientation} is not applied, as in the store.")
        if photograph.warnings:
            say(f"{path}: decoded with warnings: {'; '.join(photograph.warnings)}")
        yield path, photograph.square


def report_bad_photograph(path: Path, error: UserError, count: int, as_json: bool) -> None:
    """Report the error of one of `count` photographs: raise the error if `count` is 1, otherwise print the error."""
    if as_json:
        print_json({"image": str(path), "error": str(error)})
    if count == 1:
        raise error
    say(f"Error: {error}")


def refuse_bad_photographs(errors: Sequence[UserError], count: int) -> None:
    """Raise UserError if any of `count` photographs could not be used. The `errors` have already been printed."""
    if errors:
        raise UserError(f"{len(errors):,} of {count_noun(count, 'photograph')} could not be read; see the lines above.")
