"""Class probabilities of all images of a split, saved as .npz, and the log of evaluations.

A saved file is a NumPy .npz file without pickles. Three arrays have one row for each image, in the order of the store:
`probabilities` float32 (N, classes), `labels` int64 (N,), and `keys` (N,), the record keys of 8 digits. `about` is a
JSON text with the fields run, step, checkpoint, split, split_fingerprint, views, precision and classes. The field
checkpoint is the SHA-256 digest of the checkpoint.

`evaluations.jsonl` in the run folder has one line for each evaluation.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.augment import SQUARE
from pipeline.loader import eval_loader
from pipeline.records import Records
from prep.console import Progress, UserError, WrongArgument, count_noun, disk_error, encodable, progress, say
from prep.files import atomic_file, check_extension
from prep.schema import ArrayShape, decode, read_npz
from prep.store.manifest import Store
from train.evaluation.evaluate import EvalResult, eval_batch_size, evaluate
from train.formats.lines import EvaluationLine, read_lines
from train.formats.small_files import PredictionsAbout
from train.model.alexnet import AlexNet
from train.model.precision import set_precision
from train.replicas.group import ALONE, ReplicaGroup
from train.runs.append_log import AppendLog, remove_cut_line
from train.runs.checkpoint import Checkpoint

DENSE = "dense"  # value of `views` for a grid of crops, with a stride of 32 px, in the central square
_EVALUATIONS = "evaluations.jsonl"
_LARGEST_SUM_ERROR = 0.01  # largest allowed difference between 1 and the sum of an image's probabilities
_ARRAYS = {
    "probabilities": ArrayShape(("<f4",), (None, None)),
    "labels": ArrayShape(("<i8",), (None,)),
    "keys": ArrayShape(("|S8",), (None,)),
    "about": ArrayShape(("U",), ()),
}


@dataclass(frozen=True)
class Predictions:
    """Class probabilities for every image of a split, computed by one network or averaged over several networks."""

    probabilities: npt.NDArray[np.float32]  # (N, classes)
    labels: npt.NDArray[np.int64]  # (N,)
    keys: npt.NDArray[np.bytes_]  # (N,), 8 digits each
    about: Mapping[str, Any]  # see the module's docstring

    def save(self, out: Path) -> None:
        """Write the file `out` atomically. Raises UserError if this fails, or if the extension of `out` is not .npz."""
        check_extension(out, "--out", [".npz"], "probabilities are saved as")
        about = np.array(json.dumps(dict(self.about)))
        try:
            with atomic_file(out) as file:
                np.savez(file, about=about, labels=self.labels, keys=self.keys, probabilities=self.probabilities)
        except OSError as error:
            raise disk_error(error, f"--out {out}: {error.strerror or error}.") from None


def load_predictions(path: Path) -> Predictions:
    """Read a file that Predictions.save wrote.

    Raises UserError for a missing or damaged file, and for a file of another kind.
    """
    advice = "Save the probabilities again with: alextrain evaluate --out"
    try:
        size_bytes = path.stat().st_size  # an intact file is not compressed, so its arrays are not larger than the file
        arrays = read_npz(path, _ARRAYS, size_bytes, advice)
    except OSError as error:
        raise UserError(f"{path}: not a file of saved probabilities ({error.strerror or error}). {advice}") from None
    about_text, name = str(arrays["about"]).encode(errors="surrogatepass"), f"{path}: about"
    about = decode(PredictionsAbout, about_text, name, advice)
    predictions = Predictions(arrays["probabilities"], arrays["labels"], arrays["keys"], json.loads(about_text))
    _check_arrays(path, predictions, len(about.classes), advice)
    return predictions


def _check_arrays(path: Path, predictions: Predictions, classes: int, advice: str) -> None:
    """Raise UserError if arrays differ in their number of images or classes, or have values out of range."""
    probabilities, labels = predictions.probabilities, predictions.labels
    images = len(labels)
    if probabilities.shape != (images, classes) or len(predictions.keys) != images or not images:
        raise UserError(
            f"{path}: probabilities of shape {probabilities.shape} and {len(predictions.keys):,} keys for {images:,} "
            f"images and {classes:,} classes. {advice}"
        )
    smallest, largest = float(probabilities.min()), float(probabilities.max())
    if not (smallest >= 0 and largest <= 1.001):
        raise UserError(f"{path}: probabilities from {smallest:g} to {largest:g}, expected 0 to 1. {advice}")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    worst = float(sums[np.argmax(abs(sums - 1))])
    if abs(worst - 1) > _LARGEST_SUM_ERROR:
        raise UserError(f"{path}: the probabilities of an image have the sum {worst:g}, expected 1. {advice}")
    if not np.char.isdigit(predictions.keys).all():
        wrong = predictions.keys[~np.char.isdigit(predictions.keys)][0]
        raise UserError(f"{path}: the key {wrong!r}, expected a key of digits. {advice}")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{path}: labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1:,}. {advice}"
        )


def predict_split(
    network: AlexNet,
    checkpoint: Checkpoint,
    store: Store,
    split: str,
    views: int | str,
    precision: str = "fp32",
    run: str = "",
    threads: int | None = None,
    service: str | None = None,
    service_fallback: str | None = None,
    group: ReplicaGroup = ALONE,
) -> tuple[EvalResult, Predictions]:
    """Return error rates and probabilities of a network over a split.

    views             1, 10 or DENSE
    run               name of the run, saved in `about`
    threads           number of threads that prepare images; None: one for each usable core
    service           the service that decodes the images, as for eval_loader; None: this process decodes the images
    service_fallback  what happens if the service is lost, as for eval_loader
    group             replicas; each replica evaluates its own part of the split. On rank 0, the returned Predictions
                      hold the whole split. On all other ranks, the returned Predictions hold no images

    Rank 0 shows the progress of its own part. Raises the errors of `evaluate` and of eval_loader.
    """
    device = str(network.devices[0])
    set_precision(precision, network.devices)
    records = store.split(split).records
    loader = eval_loader(
        store.root,
        eval_batch_size(records, 1 if views == DENSE else int(views), device),
        device,
        views=SQUARE if views == DENSE else views,
        split=split,
        augmentation=network.recipe.augmentation.for_stream(),
        threads=threads,
        shard=group.rank,
        world_size=group.size,
        service=service,
        service_fallback=service_fallback,
    )
    own = np.empty((loader.own_records, len(store.classes)), np.float32)
    with loader, replica_progress(group, f"{split}, {views} view{'s' * (views != 1)}", len(own)) as counter:
        result = evaluate(network, loader, counter, precision, own, group)
    probabilities = group.stack_on_first(own)
    about = {
        "run": encodable(run),
        "step": checkpoint.step,
        "checkpoint": checkpoint.digest,
        "split": split,
        "split_fingerprint": store.split(split).fingerprint,
        "views": views,
        "precision": precision,
        "classes": list(store.classes),
    }
    stored = Records(store, split)
    labels = np.array([stored.label(number) for number in range(len(probabilities))], np.int64)
    keys = np.array([stored.key(number) for number in range(len(probabilities))], "S8")
    stored.close()
    return result, Predictions(probabilities, labels, keys, about)


@contextmanager
def replica_progress(group: ReplicaGroup, label: str, images: int) -> Iterator[Progress]:
    """On rank 0, show the progress of this rank's part of an evaluation. On other ranks, count without output."""
    if not group.is_first:
        yield Progress(images, "images")
        return
    if group.size > 1:
        label += f", part 1 of {group.size}"
    with progress(label, images, "images") as counter:
        yield counter


def check_same_images(names: Sequence[str], members: Sequence[Predictions]) -> None:
    """Raise UserError if the `members` of an average differ in their images, or in the order of the images."""
    first = members[0]
    for name, member in zip(names[1:], members[1:], strict=True):
        for key in ("classes", "split", "split_fingerprint"):
            values = [predictions.about.get(key) for predictions in (first, member)]
            if values[0] != values[1]:
                shown = [_difference_text(value, other) for value, other in (values, values[::-1])]
                raise UserError(
                    f"{names[0]} and {name} differ in {key.replace('_', ' ')} ({shown[0]}; {shown[1]}): only "
                    "probabilities of the same images can be averaged. Evaluate each run by itself."
                )
        if not (np.array_equal(first.keys, member.keys) and np.array_equal(first.labels, member.labels)):
            raise UserError(
                f"{names[0]} and {name} hold different images, or the same images in another order. Evaluate both "
                "again."
            )


def _difference_text(value: Any, other: Any) -> str:
    """Return a value of `about` for an error message.

    A list is shown as its length and the first item that `other` lacks.
    """
    if not isinstance(value, list):
        return str(value)[:40]
    first = next((item for item in value if item not in (other or ())), None)
    return count_noun(len(value), "class", "classes") + ("" if first is None else f", including {first}")


def parse_weights(text: str | None, members: int) -> list[float] | None:
    """Parse the value of --weights, such as `2,1,1`.

    Raises UserError if the number of weights is not `members`, if a weight is negative, or if all weights are 0.
    """
    if text is None:
        return None
    try:
        weights = [float(number) for number in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != members or min(weights, default=0) < 0 or not 0 < sum(weights) < float("inf"):
        raise WrongArgument(
            f"--weights {text}: expected {count_noun(members, 'number')} of at least 0, one for each run, not all 0, "
            "as in 2,1,1 for three runs."
        )
    return weights


def views_text(views: int | str | None) -> str:
    """Return the text for a value of `about["views"]`. None means an average over networks with different views."""
    return {1: "centre view", 10: "ten views", DENSE: "dense windows", None: "different views"}[views]


def record_evaluation(run_dir: Path, about: Mapping[str, Any], result: EvalResult) -> None:
    """Append a line to the run's evaluations.jsonl, for the report. Raises UserError for a disk error.

    If the user has no permission to write into the run folder, a warning is printed instead. Call read_evaluations
    before the evaluation begins, so that a damaged evaluations.jsonl is reported before the long computation.
    """
    line = {name: about[name] for name in ("step", "split", "split_fingerprint", "views", "precision")}
    path = run_dir / _EVALUATIONS
    try:
        remove_cut_line(path)
        error = AppendLog(path).add(f"{json.dumps(line | vars(result))}\n".encode())
    except OSError as failure:
        error = failure
    if error is not None and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        say(f"{path}: cannot be written ({error.strerror}). The evaluation is not recorded for the report.")
    elif error is not None:
        raise disk_error(error, f"{path}: cannot be written ({error.strerror}).")


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of evaluations.jsonl.

    If several lines have the same step, views, precision and fingerprint of the split, only the last of these lines is
    returned. Raises UserError if a line is invalid.
    """
    path = run_dir / _EVALUATIONS
    try:
        read = read_lines(path, EvaluationLine, f"Remove this line from {_EVALUATIONS}, or remove the file.")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    lines = {}
    for _, line in read:
        lines[line["step"], line["split_fingerprint"], str(line["views"]), line["precision"]] = line
    return [lines[key] for key in sorted(lines)]
