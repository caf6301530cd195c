"""What a network says of single photographs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipeline.still_image import EvalTransform, Pixels, read_photograph
from prep.console import say
from train.config.architecture import LAYERS
from train.evaluation.evaluate import log_mean_softmax
from train.evaluation.features import tapped
from train.model.alexnet import AlexNet
from train.model.modes import evaluation_mode
from train.model.precision import autocast, set_precision


@dataclass(frozen=True)
class Prediction:
    """Classes in falling order of probability."""

    labels: list[int]
    probabilities: list[float]


def said_of(
    model: AlexNet,
    eye: EvalTransform,
    square: Pixels,
    views: int = 10,
    precision: str = "fp32",
    layer: str = LAYERS[-1],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Probabilities (classes,), and the activations (units,) of a full layer for the first view."""
    set_precision(precision, model.devices)
    images = torch.from_numpy(eye.crops(square, views))
    with evaluation_mode(model), tapped(model, [layer]) as found, autocast(precision, model.devices[0]):
        logits = model(images)
    log_p = log_mean_softmax(logits[None])[0].double().cpu().numpy()
    units = torch.cat([part[0].float().cpu() for part in found[layer]]).numpy()
    return np.exp(log_p), units


def best(probabilities: npt.NDArray[np.float64], count: int = 5) -> Prediction:
    """The `count` most probable classes."""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return Prediction(order.tolist(), probabilities[order].tolist())


def prepared(path: Path, eye: EvalTransform) -> Pixels:
    """A photograph as the training store would hold it; says where it has an EXIF orientation, which is not applied."""
    photograph = read_photograph(path, eye.settings)
    if photograph.orientation != 1:
        say(f"{path}: EXIF orientation {photograph.orientation} is not applied, as in the store.")
    return photograph.square
