"""Tests of the folder offending-step-N, into which a run writes the batch at which it diverged."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train.trainer.offending_batch
from pipeline.loader import TrainLoader, train_loader
from tests.helpers.small_training import small_config
from train.config.recipes import SHORT
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.divergence import Diverged
from train.trainer.loop import fit


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_nan_pixel_stops_the_run_and_its_batch_is_written_without_a_new_checkpoint(
    numbered_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """One image of the second batch has NaN pixels. With `log_every` 1, step 2 is logged at once; with 3, after step 3.

    Labels identify the images, because every image has a different label. The stream has its own seed.
    """
    iterate = TrainLoader.__iter__
    with train_loader(numbered_store, 8, "cpu", 6) as loader:
        bad_label = [labels.tolist() for _, labels in loader][1][3]
    served_labels: list[list[int]] = []

    def with_nan(self: TrainLoader) -> Any:
        for images, labels in iterate(self):
            images[labels == bad_label] = math.nan
            served_labels.append(labels.tolist())
            yield images, labels

    monkeypatch.setattr(TrainLoader, "__iter__", with_nan)
    checkpoint_every = 1 if log_every == 1 else 4
    intervals = {"log_every": log_every, "checkpoint_every": checkpoint_every}
    with pytest.raises(Diverged) as raised:
        fit(Run.open(small_config(numbered_store, tmp_path / "run", stream_seed=6, epochs=5, **intervals)))
    bad_step = 2
    assert f"step {bad_step}: the loss is nan" in str(raised.value)
    folder = tmp_path / "run" / f"offending-step-{bad_step}"
    batch = json.loads((folder / "batch.json").read_text())
    assert [record["label"] for record in batch["records"]] == served_labels[bad_step - 1]
    assert all(f"{record['label']:03d}.jpg" in record["record"] for record in batch["records"])
    assert all(" key " in record["record"] for record in batch["records"])
    assert [record["label"] for record in batch["records"] if record["no_numbers"]] == [bad_label]
    first_step, last_step = batch["steps"]
    assert first_step <= bad_step <= last_step and math.isnan(batch["losses"][bad_step - first_step])
    assert {"parameter", "gradient"} == set(batch["norms"]["conv1.weight"])
    sheet = np.asarray(Image.open(folder / "pictures.png"))
    assert sheet.shape == (112, 8 * 112, 3)
    bad_index = served_labels[bad_step - 1].index(bad_label)
    is_white = [(sheet[:, 112 * k : 112 * (k + 1)] == 255).all() for k in range(8)]
    assert is_white == [k == bad_index for k in range(8)]
    state = checkpoint.load_latest(tmp_path / "run")
    assert state is None or state.step < bad_step
    assert state is None or all(torch.isfinite(t).all() for t in state.parameters.values())


def test_an_offending_batch_that_cannot_be_written_does_not_hide_that_the_training_diverged(
    numbered_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.trainer.offending_batch, "save_image_grid", fail)
    recipe = replace(SHORT, schedule=(), lr=1e12)
    with pytest.raises(Diverged, match=r"training has diverged.*could not be written \(.*No space"):
        fit(Run.open(small_config(numbered_store, tmp_path / "run", recipe=recipe)))
