"""Top-1 error, top-5 error and loss over a split, of one network or of the averaged probabilities of several networks.

A view is a crop of 224 px. An image has one view (the centre crop), ten views (section 4.1), or a dense grid of views.
The dense grid has crops at a stride of 32 px in the central square (AlexNet.dense).
"""

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
from train.replicas.group import ALONE, ReplicaGroup

Z_95 = 1.959963984540054  # 0.975 quantile of the normal distribution


def eval_batch_size(records: int, views: int, device: str) -> int:
    """Return the number of images in an evaluation batch, which is at most `records`.

    `views` is the number of views per image. A batch has at most 32 views on a CPU and 256 views on a GPU. 32 views fit
    into the caches of a CPU: an evaluation with batches of 32 views was 1.3 times as fast as with batches of 160 views.
    A GPU needs larger batches for full speed.
    """
    return max(1, min(records, (32 if device == "cpu" else 256) // views))


def wilson_interval(misses: int, images: int) -> tuple[float, float]:
    """Return the 95 % score interval (low, high), in 0..1, for an error rate of `misses` / `images` (Wilson 1927).

    The images are regarded as a sample of a larger population. The usual interval p ± 1.96·√(p(1 − p)/images), with p =
    misses / images, is wrong for error rates near 0. The score interval is also valid for error rates near 0.
    """
    p, zz = misses / images, Z_95**2
    middle = (p + zz / (2 * images)) / (1 + zz / images)
    half = Z_95 * math.sqrt(p * (1 - p) / images + zz / (4 * images**2)) / (1 + zz / images)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class EvalResult:
    """Error rates in 0..1, and the loss in nats.

    The loss is the mean of −log p over the images. p is the probability of an image's label, averaged over views and
    networks.
    """

    top1_error: float
    top5_error: float
    loss: float
    images: int

    @property
    def misses(self) -> tuple[int, int]:
        """Numbers of top-1 and top-5 misses.

        A miss is an image whose label is not among the 1 (or 5) most probable classes.
        """
        return round(self.top1_error * self.images), round(self.top5_error * self.images)

    @property
    def intervals(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The 95 % score intervals of the top-1 error and of the top-5 error."""
        top1, top5 = self.misses
        return wilson_interval(top1, self.images), wilson_interval(top5, self.images)


def top_k_misses(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the numbers of top-1 and top-5 misses, int64 (2,), for scores (N, classes) and labels (N,).

    Among classes with equal scores, the class with the lower index ranks higher, as in argmax. torch.topk leaves the
    order of equal scores undefined, so torch.topk is not used. If the score of an image's label is NaN, the image is a
    miss.
    """
    of_label, classes = scores.gather(1, labels[:, None]), torch.arange(scores.shape[1], device=scores.device)
    not_above = (scores < of_label) | ((scores == of_label) & (classes >= labels[:, None]))  # (N, classes)
    rank = (~not_above).sum(dim=1)  # number of classes that rank above the label
    return torch.stack([(rank >= 1).sum(), (rank >= min(5, len(classes))).sum()])


def evaluate(
    network: AlexNet,
    loader: EvalLoader,
    progress: Progress,
    precision: str = "fp32",
    probabilities: npt.NDArray[np.float32] | None = None,
    group: ReplicaGroup = ALONE,
) -> EvalResult:
    """Evaluate `network` on all images of `loader`.

    The softmax is averaged over the views of an image (layer.cu:1809, section 4.1). If `probabilities` is not None, the
    class probabilities are written into this array, float32 (images that `loader` serves, classes). After the
    evaluation, the network is in the same mode (training or evaluation) as before.

    If `group` has several replicas, all ranks must call this function, and their networks must have equal parameters.
    The loader of a rank serves the rank's part of the split (`shard` and `world_size` of eval_loader). The returned
    result is that of the whole split, and has the same bits on every rank. The counts of misses and images are summed
    as integers, so they are exact.

    Raises UserError for a precision that the network's devices do not support. Raises RuntimeError if the loaders of
    all ranks together serve more or fewer images than the split has, because the error rates would then be wrong. Also
    raises the errors of the loader and of ReplicaGroup.sum.
    """
    set_precision(precision, network.devices)
    misses, loss, images = torch.zeros(2, dtype=torch.int64), 0.0, 0
    with evaluation_mode(network):
        for batch in loader:
            labels = batch.labels.to(network.devices[0])
            with autocast(precision, network.devices[0]):
                if loader.views == SQUARE:
                    logits = network.dense(batch.images).flatten(2).mT  # (N, views, classes)
                else:
                    logits = network(batch.images.flatten(0, -4)).unflatten(0, (len(labels), -1))  # (N, views, classes)
            log_p = log_mean_softmax(logits)
            misses += top_k_misses(log_p, labels).cpu()
            loss -= float(log_p.gather(1, labels[:, None]).double().sum())
            if probabilities is not None:
                rows = probabilities[images : images + len(labels)]
                rows[:] = log_p.exp().cpu().numpy()[: len(rows)]
            images += len(labels)
            progress.advance(len(labels))
    top1_misses, top5_misses, images = group.sum(np.array([*misses.tolist(), images], np.int64)).tolist()
    loss = float(group.sum(np.array([loss]))[0])
    if images != loader.records:
        raise RuntimeError(f"{images} images were served, but the split has {loader.records} images")
    return EvalResult(top1_misses / images, top5_misses / images, loss / images, images)


def log_mean_softmax(logits: Tensor) -> Tensor:
    """Average the softmax of `logits` (N, views, classes) over the views.

    Returns the logarithm of the average, float32 (N, classes).
    """
    log_p = torch.log_softmax(logits.float(), dim=2)
    return log_p.logsumexp(dim=1) - math.log(log_p.shape[1])


def average_probabilities(
    probabilities: Sequence[npt.NDArray[np.float32]], weights: Sequence[float] | None = None
) -> npt.NDArray[np.float64]:
    """Return the weighted mean (N, classes) of the probabilities of several networks.

    The paper averages 5 or 7 networks. The weights are divided by their sum. By default, all weights are equal.
    """
    shares = np.ones(len(probabilities)) if weights is None else np.asarray(weights, np.float64)
    mean = np.zeros(probabilities[0].shape)
    for share, p in zip(shares / shares.sum(), probabilities, strict=True):
        mean += share * p
    return mean


def error_rates(probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> EvalResult:
    """Return error rates and loss, computed from probabilities (N, classes).

    For the loss, a probability below the smallest positive float32 is replaced by the smallest positive float32.
    """
    misses = top_k_misses(torch.from_numpy(probabilities), torch.from_numpy(labels)).tolist()
    of_label = probabilities[np.arange(len(labels)), labels]
    loss = -float(np.log(np.maximum(of_label, np.finfo(np.float32).smallest_subnormal)).mean())
    return EvalResult(misses[0] / len(labels), misses[1] / len(labels), loss, len(labels))
