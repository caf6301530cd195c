"""Runs of the examples in the process of the test, on small images. A run can be stopped, as if it was killed."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from pipeline import Augmentation, train_loader

BATCH, STEPS_PER_EPOCH, EPOCHS = 7, 4, 2  # the fixture `store` has 30 training and 12 validation images of 3 classes
SIZE_PX, WIDTH = 32, 8
OPTIONS = ("--epochs", EPOCHS, "--batch-size", BATCH, "--size-px", SIZE_PX, "--width", WIDTH)
# Lightning 2.6 calls a function that torch 2.13 deprecates, and warns that the checkpoint folder is not empty.
LIGHTNING_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning", "ignore:Checkpoint directory .* exists and is not empty:UserWarning"
)


class Killed(Exception):
    """Raised within a step of a run that is to be stopped."""


class Run:
    """Calls main() of an example. `losses` and `targets` have the loss and the labels of each step.

    With `kill_at`, main() is stopped in step `kill_at`, counted from 0, before the weights change.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, example: str) -> None:
        self.example = import_module(f"examples.{example}")
        self.losses: list[float] = []
        self.targets: list[list[int]] = []
        self._kill_at: int | None = None
        self._real = nn.functional.cross_entropy
        monkeypatch.setattr(nn.functional, "cross_entropy", self._cross_entropy)

    def __call__(self, store: Path, output: Path, *options: object, kill_at: int | None = None) -> None:
        self.losses, self.targets, self._kill_at = [], [], kill_at
        words = [str(word) for word in (store, output, *OPTIONS, *options)]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # small images are faster with one thread
        try:
            self.example.main(words, standalone_mode=False)
        except Killed:
            assert kill_at is not None
        else:
            assert kill_at is None
        finally:
            torch.set_num_threads(threads)
            if distributed.is_initialized():
                distributed.destroy_process_group()

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        if len(self.losses) == self._kill_at:
            raise Killed
        loss = self._real(logits, targets)
        self.losses.append(loss.item())
        self.targets.append(targets.tolist())
        return loss


def stream_batches(store: Path, preset: str, batch: int = BATCH, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the batches (images, labels) of all epochs of a run."""
    settings = replace(Augmentation.preset(preset), size_px=SIZE_PX)
    with train_loader(store, batch, augmentation=settings, **options) as loader:
        return [tuple(batch) for _ in range(EPOCHS) for batch in loader]  # type: ignore[misc]


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Return whether two state dicts have the same names and the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
