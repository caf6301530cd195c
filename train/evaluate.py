"""Error rates over a whole split: every image once, by one view, by ten, or by every window of a square."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.augment import SQUARE
from pipeline.loader import EvalLoader
from prep.console import Progress
from train.model import AlexNet
from train.precision import autocast, set_precision


def batch_of(records: int, views: int, device: str) -> int:
    """Images to take at a time: 32 views keep a CPU's caches warm (measured: 1.3 times 160), 256 a GPU busy."""
    return max(1, min(records, (32 if device == "cpu" else 256) // views))


@dataclass(frozen=True)
class EvalResult:
    """Errors are shares in 0..1; the loss is −log of the (averaged) probability of the right class, in nats."""

    top1_error: float
    top5_error: float
    loss: float
    images: int


def wrong(scores: Tensor, labels: Tensor) -> Tensor:
    """(2,) int64: how many of N rows of scores (N, classes) miss the label with their best, and their five best."""
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]  # (N, 5)
    return torch.stack([len(labels) - best[:, 0].sum(), len(labels) - best.any(dim=1).sum()])


def evaluate(model: AlexNet, loader: EvalLoader, report: Progress, precision: str = "fp32") -> EvalResult:
    """Evaluate `model` on all images of `loader`; ten views average the softmax (layer.cu:1809, section 4.1), and so do
    the windows of a square, which are those of AlexNet.dense.

    Leaves the model in the mode it was in. Raises UserError for a precision that its devices do not have; RuntimeError
    where the loader served another number of images than the split has, which would make the rates wrong.
    """
    set_precision(precision, model.devices)
    was_training = model.training
    model.eval()
    misses, loss, images = torch.zeros(2, dtype=torch.int64), 0.0, 0
    try:
        with torch.no_grad():
            for batch in loader:
                labels = batch.labels.to(model.devices[0])
                with autocast(precision, model.devices[0]):
                    if loader.views == SQUARE:
                        logits = model.dense(batch.images).flatten(2).mT  # (N, windows, classes)
                    else:
                        logits = model(batch.images.flatten(0, -4)).unflatten(0, (len(labels), -1))
                log_p = torch.log_softmax(logits.float(), dim=2)  # (N, views, classes)
                log_p = log_p.logsumexp(dim=1) - torch.log(torch.tensor(float(log_p.shape[1])))
                misses += wrong(log_p, labels).cpu()
                loss -= float(log_p.gather(1, labels[:, None]).sum())
                images += len(labels)
                report.advance(len(labels))
    finally:
        model.train(was_training)
    if images != loader.records:
        raise RuntimeError(f"{images} images were served, the split has {loader.records}")
    return EvalResult(int(misses[0]) / images, int(misses[1]) / images, loss / images, images)
