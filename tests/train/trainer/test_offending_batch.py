"""The batch at which a training diverged, in the run folder."""

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
from train.trainer.loop import fit
from train.trainer.watchdog import Diverged


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_poisoned_picture_is_found_kept_aside_and_costs_no_checkpoint(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """One of the second batch, of the store whose labels are numbers; whenever the line is due."""
    serve = TrainLoader.__iter__
    with train_loader(numbered, 8, "cpu", 3) as loader:
        bad = [labels.tolist() for _, labels in loader][1][3]
    served: list[list[int]] = []

    def poisoned(self: TrainLoader) -> Any:
        for images, labels in serve(self):
            images[labels == bad] = math.nan
            served.append(labels.tolist())
            yield images, labels

    monkeypatch.setattr(TrainLoader, "__iter__", poisoned)
    every = 1 if log_every == 1 else 4
    plan = small_config(numbered, tmp_path / "run", log_every=log_every, checkpoint_every=every, epochs=5)
    with pytest.raises(Diverged) as stop:
        fit(Run.open(plan))
    at = 2
    assert f"step {at}: the loss is nan" in str(stop.value)
    about = json.loads((tmp_path / "run" / f"offending-step-{at}" / "batch.json").read_text())
    assert [record["label"] for record in about["records"]] == served[at - 1]
    assert all(f"{record['label']:03d}.jpg" in record["record"] for record in about["records"])
    assert all(" key " in record["record"] for record in about["records"])
    assert [record["label"] for record in about["records"] if record["no_numbers"]] == [bad]
    assert about["steps"][0] <= at <= about["steps"][1] and math.isnan(about["losses"][at - about["steps"][0]])
    assert {"parameter", "gradient"} == set(about["norms"]["conv1.weight"])
    sheet = np.asarray(Image.open(tmp_path / "run" / f"offending-step-{at}" / "pictures.png"))
    assert sheet.shape == (112, 8 * 112, 3)
    place = served[at - 1].index(bad)
    white = [(sheet[:, 112 * k : 112 * (k + 1)] == 255).all() for k in range(8)]
    assert white == [k == place for k in range(8)]
    state = checkpoint.load_latest(tmp_path / "run")
    assert state is None or state.step < at
    assert state is None or all(torch.isfinite(t).all() for t in state.parameters.values())


def test_a_batch_that_cannot_be_written_aside_hides_nothing(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*of: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.trainer.offending_batch, "save_image_grid", full)
    recipe = replace(SHORT, schedule=(), lr=1e12)
    with pytest.raises(Diverged, match=r"training has diverged.*could not be written \(.*No space"):
        fit(Run.open(small_config(numbered, tmp_path / "run", recipe=recipe)))
