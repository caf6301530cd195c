"""Tests of the predictions that are saved in a run folder and used again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from train.evaluation.trained_run import TrainedRun


def test_cached_predictions_are_used_only_for_the_same_checkpoint_and_precision(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = TrainedRun.open(trained_run, None, "cpu", "fp32")
    computed = trained.predictions("val")
    # From here on, the computation of new predictions raises TypeError.
    monkeypatch.setattr("train.evaluation.trained_run.predict_split", None)
    assert np.array_equal(trained.predictions("val").probabilities, computed.probabilities)
    other_run = replace(trained.checkpoint, digest="another run's")
    for changed in (replace(trained, precision="bf16"), replace(trained, checkpoint=other_run)):
        with pytest.raises(TypeError):
            changed.predictions("val")
    (path,) = trained_run.glob("scores-val-*.npz")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TypeError):
        trained.predictions("val")
