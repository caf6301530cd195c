"""examples.lightning_resnet: limited epochs continue in the stream, and each validation image counts once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer

from examples.lightning_resnet import Classifier, Stream
from examples.networks import resnet18
from pipeline import Augmentation, eval_loader
from tests.examples.runs import LIGHTNING_WARNINGS, SIZE_PX, WIDTH, Run, stream_batches

pytestmark = LIGHTNING_WARNINGS


def test_limited_epochs_continue_in_the_stream_also_after_a_kill(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch of the stream has four batches.

    With limit_train_batches=3, Lightning divides these batches into an epoch of 3 batches and an epoch of 1 batch.
    Lightning validates only after the epochs of 3 batches.
    """
    validated = []

    def validation_step(self: Classifier, *_: object) -> None:
        if not self.trainer.sanity_checking:
            validated.append(self.current_epoch)

    monkeypatch.setattr(Classifier, "validation_step", validation_step)
    run = Run(monkeypatch, "lightning_resnet")
    options = ("--batches", 3, "--epochs", 4, "--save-every", 3)
    run(store, tmp_path / "checkpoints", *options, kill_at=5)
    first = run.targets
    run(store, tmp_path / "checkpoints", *options)
    expected = [labels.tolist() for _, labels in stream_batches(store, "resnet")]
    assert first == expected[:5] and run.targets == expected[3:]
    assert set(validated) == {0, 2}


def test_accuracy_counts_each_image_once(store: Path) -> None:
    torch.manual_seed(4)
    model = Classifier(resnet18(3, WIDTH), 0.1)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    (result,) = trainer.validate(model, Stream(str(store), 5, SIZE_PX), verbose=False)
    model.eval()
    settings = replace(Augmentation.preset("resnet"), size_px=SIZE_PX)
    with torch.no_grad(), eval_loader(store, 12, augmentation=settings) as loader:
        ((images, labels),) = loader
        correct = int((model.net(images).argmax(1) == labels).sum())
    assert abs(result["top_1"] - correct / 12) < 1e-6
