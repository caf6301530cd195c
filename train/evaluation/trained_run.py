"""A trained run, opened for inspection: network, checkpoint, store, preprocessing and saved predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.still_image import EvalTransform
from prep.console import UserError, say
from prep.store.manifest import Store
from train.config.devices import parse_devices
from train.evaluation.predictions import (
    Predictions,
    load_predictions,
    predict_split,
    read_evaluations,
    record_evaluation,
)
from train.model.alexnet import AlexNet
from train.runs.checkpoint import Checkpoint
from train.runs.loading import load_trained, run_and_checkpoint
from train.runs.preprocessing import load_eval_transform
from train.runs.run_dir import read_description
from train.runs.training_store import find_store, missing_store_text, saved_store_path


@dataclass(frozen=True)
class TrainedRun:
    """A run's network and checkpoint, and a store of input images for the network. Created by `TrainedRun.open`."""

    run_dir: Path
    network: AlexNet
    checkpoint: Checkpoint
    store: Store | None  # None: no store was named, and the training store was moved, removed or rebuilt
    precision: str = "fp32"

    @staticmethod
    def open(run_dir: Path, store: Path | None, gpus: str | None, precision: str, which: str = "last") -> TrainedRun:
        """Load the checkpoint of a run, and find the store of the run.

        run_dir    a run folder, or a checkpoint file
        store      folder of the store; None: the training store, if it exists and is unchanged
        gpus       the value of --gpus
        precision  one of train.config.choices.PRECISIONS
        which      the checkpoint: "last", "best" or a file

        Raises the errors of load_trained, find_store and parse_devices.
        """
        run_dir, which = run_and_checkpoint(run_dir, which)
        network, checkpoint = load_trained(run_dir, parse_devices(gpus), which)
        return TrainedRun(run_dir, network, checkpoint, find_store(run_dir, checkpoint, store), precision)

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes. A label is an index into this list."""
        return self.checkpoint.classes

    @cached_property
    def description(self) -> dict[str, Any]:
        """The content of run.json."""
        return read_description(self.run_dir)

    @cached_property
    def transform(self) -> EvalTransform:
        """The preprocessing of single images for evaluation with this network."""
        return load_eval_transform(self.run_dir, self.network.recipe)

    def require_store(self, split: str) -> Store:
        """Return the store.

        Raises UserError if the run has no store, or if the store has no split of the name `split`.
        """
        if self.store is None:
            raise UserError(missing_store_text(self.run_dir, saved_store_path(self.description)))
        self.store.split(split)
        return self.store

    def predictions(self, split: str) -> Predictions:
        """Return the class probabilities for the centre crops of a split, from a file in the run folder.

        For step 232 and the split val, the file is `scores-val-00000232.npz`. If there is no file for this checkpoint,
        split and precision, the probabilities are computed and saved, and the result is added to evaluations.jsonl. The
        new file replaces all older files for this split. If the user has no permission to write into the folder,
        nothing is saved.
        """
        store = self.require_store(split)
        path = self.run_dir / f"scores-{split}-{self.checkpoint.step:08d}.npz"
        expected = {
            "checkpoint": self.checkpoint.digest,
            "split_fingerprint": store.split(split).fingerprint,
            "precision": self.precision,
        }
        try:
            saved = load_predictions(path)
            if all(saved.about.get(key) == value for key, value in expected.items()):
                return saved
        except UserError:
            pass  # the file is missing or damaged, so the predictions are computed below
        older = list(self.run_dir.glob(f"scores-{split}-*.npz"))
        folder = next((old for old in older if old.is_dir()), None)
        if folder is not None:
            raise UserError(f"{folder}: a folder, expected a file of saved predictions. Remove this folder.")
        read_evaluations(self.run_dir)  # a damaged file is reported before the evaluation
        result, predictions = predict_split(
            self.network, self.checkpoint, store, split, 1, self.precision, str(self.run_dir)
        )
        record_evaluation(self.run_dir, predictions.about, result)
        if not os.access(self.run_dir, os.W_OK):  # for example, the run of another user
            say(f"{path}: the predictions are not saved, because you have no permission to write into this folder.")
            return predictions
        for old in older:
            old.unlink(missing_ok=True)
        predictions.save(path)
        return predictions
