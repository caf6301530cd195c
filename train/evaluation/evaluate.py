"""Error rates over a whole split, every image once: by one view, ten or all of a square; of several networks, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.augment import SQUARE
from pipeline.loader import EvalLoader
from prep.console import Progress
from train.model.alexnet import AlexNet
from train.model.modes import evaluation_mode
from train.model.precision import autocast, set_precision

Z_95 = 1.959963984540054  # the normal distribution's quantile of 0.975


def batch_of(records: int, views: int, device: str) -> int:
    """Images to take at a time: 32 views keep a CPU's caches warm (measured: 1.3 times 160), 256 a GPU busy."""
    return max(1, min(records, (32 if device == "cpu" else 256) // views))


def wilson(misses: int, images: int) -> tuple[float, float]:
    """The 95 % interval of an error rate, shares in 0..1, of so many misses (Wilson 1927; the score interval).

    The images are taken for a sample of those that could have been asked. Unlike p ± 1.96·√(p(1 − p)/n) it also holds
    near 0.
    """
    p, zz = misses / images, Z_95**2
    middle = (p + zz / (2 * images)) / (1 + zz / images)
    half = Z_95 * math.sqrt(p * (1 - p) / images + zz / (4 * images**2)) / (1 + zz / images)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class EvalResult:
    """Errors are shares in 0..1; the loss is −log of the (averaged) probability of the right class, in nats."""

    top1_error: float
    top5_error: float
    loss: float
    images: int

    @property
    def misses(self) -> tuple[int, int]:
        """Images whose label is not the best guess, and not among the five best."""
        return round(self.top1_error * self.images), round(self.top5_error * self.images)

    @property
    def intervals(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The 95 % intervals of both errors."""
        top1, top5 = self.misses
        return wilson(top1, self.images), wilson(top5, self.images)


def wrong(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,) int64: how many of N rows of scores (N, classes) miss the label with their best, and their five best.

    Of equal scores the class with the lower number is the better, as for argmax; topk would leave it to chance. A score
    that is no number is worse than none, so that its label is missed.
    """
    own, classes = scores.gather(1, labels[:, None]), torch.arange(scores.shape[1], device=scores.device)
    worse = (scores < own) | ((scores == own) & (classes >= labels[:, None]))  # (N, classes), the label's own too
    better = (~worse).sum(dim=1)  # classes that are named before the label
    return torch.stack([(better >= 1).sum(), (better >= min(5, len(classes))).sum()])


def evaluate(
    model: AlexNet,
    loader: EvalLoader,
    report: Progress,
    precision: str = "fp32",
    probabilities: npt.NDArray[np.float32] | None = None,
) -> EvalResult:
    """Evaluate `model` on all images of `loader`; ten views average the softmax (layer.cu:1809, section 4.1), and so do
    the windows of a square, which are those of AlexNet.dense.

    `probabilities`, float32 (records, classes), is filled where it is given. Leaves the model in the mode it was in.
    Raises UserError for a precision that its devices do not have; RuntimeError where the loader served another number
    of images than the split has, which would make the rates wrong.
    """
    set_precision(precision, model.devices)
    misses, loss, images = torch.zeros(2, dtype=torch.int64), 0.0, 0
    with evaluation_mode(model):
        for batch in loader:
            labels = batch.labels.to(model.devices[0])
            with autocast(precision, model.devices[0]):
                if loader.views == SQUARE:
                    logits = model.dense(batch.images).flatten(2).mT  # (N, windows, classes)
                else:
                    logits = model(batch.images.flatten(0, -4)).unflatten(0, (len(labels), -1))
            log_p = log_mean_softmax(logits)
            misses += wrong(log_p, labels).cpu()
            loss -= float(log_p.gather(1, labels[:, None]).sum())
            if probabilities is not None:
                room = probabilities[images : images + len(labels)]
                room[:] = log_p.exp().cpu().numpy()[: len(room)]
            images += len(labels)
            report.advance(len(labels))
    if images != loader.records:
        raise RuntimeError(f"{images} images were served, the split has {loader.records}")
    return EvalResult(int(misses[0]) / images, int(misses[1]) / images, loss / images, images)


def log_mean_softmax(logits: Tensor) -> Tensor:
    """Logits (N, views, classes) to the logarithm of the mean over views of the softmax, float32 (N, classes)."""
    log_p = torch.log_softmax(logits.float(), dim=2)
    return log_p.logsumexp(dim=1) - math.log(log_p.shape[1])


def average(
    probabilities: Sequence[npt.NDArray[np.float32]], weights: Sequence[float] | None = None
) -> npt.NDArray[np.float64]:
    """The weighted mean (N, classes) of several networks' probabilities, as the paper's five and seven (section 6).

    Weights are divided by their sum.
    """
    shares = np.ones(len(probabilities)) if weights is None else np.asarray(weights, np.float64)
    mean = np.zeros(probabilities[0].shape)
    for share, p in zip(shares / shares.sum(), probabilities, strict=True):
        mean += share * p
    return mean


def rates(probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> EvalResult:
    """Errors and loss of probabilities (N, classes); one that float32 could not hold counts as its smallest number."""
    misses = wrong(torch.from_numpy(probabilities), torch.from_numpy(labels)).tolist()
    right = probabilities[np.arange(len(labels)), labels]
    loss = -float(np.log(np.maximum(right, np.finfo(np.float32).smallest_subnormal)).mean())
    return EvalResult(misses[0] / len(labels), misses[1] / len(labels), loss, len(labels))
