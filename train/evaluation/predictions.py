"""Probabilities of a whole split, in memory or saved, and several of them together.

A saved file is NumPy's .npz without pickles: `probabilities` float32 (N, classes), `labels` int64 (N,), `keys` (N,) of
8 digits each, in the store's order, and `about`, JSON: run, step, checkpoint (its SHA-256), split, split_fingerprint,
views, precision, classes.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.augment import SQUARE
from pipeline.loader import eval_loader
from pipeline.records import Records
from prep.console import UserError, disk_error, progress
from prep.files import atomic_file
from prep.store.manifest import Store
from train.evaluation.evaluate import EvalResult, batch_of, evaluate
from train.model.alexnet import AlexNet
from train.model.precision import set_precision
from train.runs.append_log import AppendLog
from train.runs.checkpoint import Checkpoint

DENSE = "dense"  # in place of a number of views: every window of the whole square
_EVALUATIONS = "evaluations.jsonl"
_ARRAYS = ("probabilities", "labels", "keys", "about")


@dataclass(frozen=True)
class Predictions:
    """What one network says of every image of a split."""

    probabilities: npt.NDArray[np.float32]  # (N, classes)
    labels: npt.NDArray[np.int64]  # (N,)
    keys: npt.NDArray[np.bytes_]  # (N,), of 8 digits
    about: Mapping[str, Any]

    def save(self, out: Path) -> None:
        """Write a .npz, whole or not at all; raises UserError where it cannot be written."""
        check_out(out)
        about = np.array(json.dumps(dict(self.about)))
        try:
            with atomic_file(out) as file:
                np.savez(file, about=about, labels=self.labels, keys=self.keys, probabilities=self.probabilities)
        except OSError as error:
            raise disk_error(error, f"--out {out}: {error.strerror or error}.") from None


def check_out(out: Path) -> None:
    """Raise UserError for a name under which probabilities are not saved, or in a folder that is not there."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: probabilities are saved as .npz. Name it {out.with_suffix('.npz')}.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}. Make it, or name another.")


def load_predictions(path: Path) -> Predictions:
    """A saved file; raises UserError where it is missing, damaged or another."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
            if set(held.files) != set(_ARRAYS):
                raise UserError(f"{path} holds {', '.join(held.files)}; expected {', '.join(_ARRAYS)}.")
            about = json.loads(str(held["about"]))
            scores = Predictions(held["probabilities"], held["labels"], held["keys"], about)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no saved probabilities ({error}). Write them: alextrain evaluate --out") from None
    images = len(scores.labels)
    if scores.probabilities.ndim != 2 or len(scores.probabilities) != images or len(scores.keys) != images:
        raise UserError(f"{path}: {scores.probabilities.shape} probabilities of {images} images. Write it again.")
    return scores


def score(
    model: AlexNet,
    state: Checkpoint,
    store: Store,
    split: str,
    views: int | str,
    precision: str = "fp32",
    run: str = "",
) -> tuple[EvalResult, Predictions]:
    """Error rates and probabilities of a network over a split; raises as train.evaluation.evaluate.evaluate and the loaders."""
    device = str(model.devices[0])
    set_precision(precision, model.devices)
    records = store.split(split).records
    probabilities = np.empty((records, len(store.classes)), np.float32)
    loader = eval_loader(
        store.root,
        batch_of(records, 1 if views == DENSE else int(views), device),
        device,
        views=SQUARE if views == DENSE else views,
        split=split,
        augmentation=model.recipe.augmentation,
    )
    with loader, progress(f"{split}, {views} view{'s' * (views != 1)}", records, "images") as report:
        result = evaluate(model, loader, report, precision, probabilities)
    held = Records(store, split)
    about = {
        "run": run,
        "step": state.step,
        "checkpoint": state.digest,
        "split": split,
        "split_fingerprint": store.split(split).fingerprint,
        "views": views,
        "precision": precision,
        "classes": list(store.classes),
    }
    labels = np.array([held[number].label for number in range(records)], np.int64)
    keys = np.array([held.key(number) for number in range(records)], "S8")
    held.close()
    return result, Predictions(probabilities, labels, keys, about)


def check_same(names: Sequence[str], members: Sequence[Predictions]) -> None:
    """Raise UserError where the images of two members are not the same ones in the same order."""
    first = members[0]
    for name, member in zip(names[1:], members[1:], strict=True):
        for what in ("classes", "split", "split_fingerprint"):
            here, there = first.about.get(what), member.about.get(what)
            if here != there:
                shown = [str(value)[:40] for value in (here, there)]
                raise UserError(
                    f"{names[0]} and {name} differ in {what.replace('_', ' ')} ({shown[0]}, {shown[1]}): only what was "
                    "said of the same images can be averaged."
                )
        if not (np.array_equal(first.keys, member.keys) and np.array_equal(first.labels, member.labels)):
            raise UserError(f"{names[0]} and {name} hold other images, or in another order. Evaluate both anew.")


def weights_of(text: str | None, members: int) -> list[float] | None:
    """`2,1,1`: a weight for each member; raises UserError for others."""
    if text is None:
        return None
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != members or min(weights, default=0) < 0 or not 0 < sum(weights) < float("inf"):
        raise UserError(f"--weights {text}: expected {members} numbers of at least 0, one for each, as 2,1,1.")
    return weights


def views_text(views: int | str | None) -> str:
    """What `about` says of views, for people; None: several networks', not all the same."""
    return {1: "centre view", 10: "ten views", DENSE: "dense windows", None: "different views"}[views]


def record_evaluation(run_dir: Path, about: Mapping[str, Any], result: EvalResult) -> None:
    """Add a line to the run's evaluations.jsonl, which the report tells of; raises UserError where it cannot be."""
    line = {name: about[name] for name in ("step", "split", "split_fingerprint", "views", "precision")}
    path = run_dir / _EVALUATIONS
    error = AppendLog(path).add(f"{json.dumps(line | vars(result))}\n".encode())
    if error is not None:
        raise disk_error(error, f"{path}: cannot be written ({error.strerror}).")


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl, the last of each step, split, views and precision."""
    path = run_dir / _EVALUATIONS
    if not path.exists():
        return []
    found = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a kill
            continue
        found[line["step"], line["split_fingerprint"], str(line["views"]), line["precision"]] = line
    return [found[place] for place in sorted(found)]
