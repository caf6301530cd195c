"""What a run is watched for: losses and gradients that are no numbers, losses that say nothing, memory that ends.

Nothing here waits for a device between two lines of the log: what a step gives is kept where it is, and read with the
line. A loss that is no number is therefore told an interval late, but by its step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import Augmentation
from pipeline.diagnostics.preview import save_image_grid
from pipeline.loader import train_loader
from pipeline.records import Records
from pipeline.sampling import epoch_permutation
from prep.console import UserError, say
from prep.files import write_atomic
from train.config.run_config import RunConfig
from train.model.alexnet import AlexNet
from train.runs import checkpoint
from train.runs.run import Run

STUCK_STEPS = 5000  # with a loss of ln(classes): the paper's network on ImageNet may need half as many to leave it
STUCK_LEAST = 100  # in a run of fewer than 10,000 steps half of them, but no fewer than these
STUCK_SHARE = 0.01  # of ln(classes): how near is stuck
ZERO_NATS = 1e-6
ONE_CLASS_IMAGES = 32  # fewer labels of one class may be chance

# What a lack of memory is called where it has no type of its own: a CPU's allocator, the driver's and DALI's, cuBLAS.
_NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Diverged(UserError):
    """The loss, a gradient or a parameter is no longer a number."""


class Watchdog:
    """Sees every step of a run, and judges them at each line of the log."""

    def __init__(self, run: Run, model: AlexNet, warn: Callable[[str], None] = say) -> None:
        """`warn` is what says a warning."""
        self.run, self.model, self._tell = run, model, warn
        self.stuck_steps = max(STUCK_LEAST, min(STUCK_STEPS, run.last_step // 2))
        self._near_since: int | None = None  # the step since when every line has said ln(classes)
        self._said: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._losses: list[Tensor] = []
        self._labels: tuple[Tensor, Tensor] | None = None  # the least and the largest
        self._images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """A step, as train.trainer.step.StepResult."""
        least, largest = labels.aminmax()
        if self._labels is not None:
            least, largest = torch.minimum(least, self._labels[0]), torch.maximum(largest, self._labels[1])
        self._labels = least, largest
        self._images += len(labels)
        self._losses.append(loss)

    def check(self, step: int, how: Augmentation) -> dict[str, dict[str, float]]:
        """Judge the steps up to `step` that were not yet; `how` the stream served them. Returns parameter_norms the model.

        Raises Diverged, once the batch is written aside, for a loss, or a norm of a gradient or of a parameter, that
        is not finite.
        """
        losses: list[float] = torch.stack(self._losses).tolist()
        norms = parameter_norms(self.model)
        words = {"parameter": "", "gradient": "the gradient of "}
        bad = [
            f"{words[kind]}{name} has norm {norm}"
            for name, kinds in norms.items()
            for kind, norm in kinds.items()
            if not math.isfinite(norm)
        ]
        wrong = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if wrong is not None or bad:
            at = step if wrong is None else step - len(losses) + 1 + wrong
            last = f", within the last {len(losses)} steps" if len(losses) > 1 else ""
            what = bad[0] + last if wrong is None else f"the loss is {losses[wrong]}"
            self._stop(at, what, {"steps": [step - len(losses) + 1, step], "losses": losses, "norms": norms}, how)
        self._warn(step, losses)
        self._begin()
        return norms

    def _warn(self, step: int, losses: Sequence[float]) -> None:
        mean, classes = sum(losses) / len(losses), self.run.store.classes
        guess = math.log(len(classes))
        first = step - len(losses)
        if abs(mean - guess) > STUCK_SHARE * guess:
            self._near_since = None
        elif self._near_since is None:
            self._near_since = first
        stuck = guess > 0 and self._near_since is not None and step - self._near_since >= self.stuck_steps
        assert self._labels is not None
        least, largest = (int(label) for label in self._labels)
        warnings = {
            "stuck": (
                stuck,
                f"the loss has been within {STUCK_SHARE:.0%} of ln {len(classes):,} = {guess:.3f}, a guess among all "
                f"classes, for {self.stuck_steps:,} steps. Usually: a rate that is too high or too low (--set lr=…), "
                "or labels that are not those of the pictures (alexstream preview, alexprep verify).",
            ),
            "zero": (
                mean < ZERO_NATS,
                f"the loss is {mean:.1g}. Usually: a store with one class, or so few pictures that they are known by "
                "heart (alexprep inspect).",
            ),
            "one class": (
                least == largest and self._images >= ONE_CLASS_IMAGES,
                f"all {self._images:,} labels since step {first:,} are {classes[least]}. Usually: a "
                "store with one class, or one whose records lie class by class (alexstream inspect).",
            ),
        }
        for name, (holds, text) in warnings.items():
            if holds and name not in self._said:
                self._said.add(name)
                self._tell(f"Warning: step {step:,}: {text}")

    def _stop(self, at: int, what: str, found: dict[str, Any], how: Augmentation) -> None:
        folder = self.run.run_dir / f"offending-step-{at}"
        kept = checkpoint.checkpoint_paths(self.run.run_dir)
        try:
            write_offending_batch(folder, self.run, (at - 1) // self.run.steps_per_epoch, at, how, found)
            aside = f"Its batch is in {folder}."
        except (OSError, UserError) as error:
            aside = f"Its batch could not be written aside ({error})."
        raise Diverged(
            f"step {at:,}: {what}: training has diverged. {aside} "
            + (f"{kept[-1].name} is kept. " if kept else "")
            + "A lower rate usually helps: --set lr=…, another --recipe, or a larger --batch for the same rate; with "
            "--fork NEW_DIR from the checkpoint on."
        )


def parameter_norms(model: AlexNet) -> dict[str, dict[str, float]]:
    """The Euclidean norms of each joined parameter and of its gradient, where it has one; waits for the devices."""
    squares: dict[tuple[str, str], float] = {}
    for device in dict.fromkeys(model.devices):
        names, tensors = [], []
        for name, parameters in model.parameters_by_joined_name().items():
            for p in parameters:
                parts = {"parameter": p.detach(), "gradient": p.grad} if p.device == device else {}
                names += [(name, kind) for kind, tensor in parts.items() if tensor is not None]
                tensors += [tensor for tensor in parts.values() if tensor is not None]
        for key, norm in zip(names, torch.stack([_norm(tensor) for tensor in tensors]).tolist(), strict=True):
            squares[key] = squares.get(key, 0.0) + norm**2
    found: dict[str, dict[str, float]] = {}
    for (name, kind), square in squares.items():
        found.setdefault(name, {})[kind] = math.sqrt(square)
    return found


def _norm(tensor: Tensor) -> Tensor:
    """(), of rows first: a single float32 sum over fc6's 38 million squares is wrong in the fourth digit on a CPU."""
    rows: Tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())))
    norm: Tensor = torch.linalg.vector_norm(rows)
    return norm


def write_offending_batch(
    folder: Path, run: Run, epoch: int, step: int, how: Augmentation, found: dict[str, Any]
) -> None:
    """Write what the network saw in step `step`, counted from 1, into `folder`: batch.json and pictures.png.

    The stream is asked again: what it serves is a function of seed, epoch and step. batch.json has the records with
    shard, key, source and label, the range of the pixels, and what was `found`. The pictures have the mean colour
    added, and are white where a pixel is no number. Raises OSError, and UserError as train_loader.
    """
    config, store, size = run.config, run.store, run.config.batch_size
    with train_loader(
        config.store, size, config.devices[0], config.seed, augmentation=how, threads=config.threads
    ) as loader:
        place = step - 1 - epoch * len(loader)
        loader.seek(epoch, place)
        images, labels = next(iter(loader))
        numbers = epoch_permutation(loader.records, config.seed, epoch)[place * size : (place + 1) * size].tolist()
    pixels = images.float().cpu().numpy()
    finite = np.isfinite(pixels)
    records = Records(store, "train")
    about = {
        "step": step,
        "epoch": epoch,
        **found,
        "pixels": {
            "smallest": float(pixels[finite].min(initial=np.inf)),
            "largest": float(pixels[finite].max(initial=-np.inf)),
            "no_numbers": int((~finite).sum()),
        },
        "augmentation": asdict(how),
        "records": [
            {
                "number": number,
                "label": label,
                "class": store.classes[label],
                "record": records.location(number),
                "no_numbers": int(missing),
            }
            for number, label, missing in zip(numbers, labels.tolist(), (~finite).sum((1, 2, 3)), strict=True)
        ],
    }
    records.close()
    mean = 0.0 if how.mean == "none" else np.array(store.color_stats().mean_rgb)[:, None, None]
    shown = np.nan_to_num(pixels * how.divisor + mean, nan=255.0, posinf=255.0, neginf=255.0)
    folder.mkdir(exist_ok=True)
    save_image_grid(np.rint(shown.clip(0, 255)).astype(np.uint8).transpose(0, 2, 3, 1), folder / "pictures.png")
    write_atomic(folder / "batch.json", json.dumps(about, indent=1).encode())


@contextmanager
def out_of_memory(config: RunConfig) -> Iterator[None]:
    """Say what fits where a device or the machine has no memory left; raises UserError for that, else what it was."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not typed and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise UserError(_memory_advice(config, str(error).strip().split("\n")[0][:200])) from None


def _memory_advice(config: RunConfig, what: str) -> str:
    batch, parts = config.batch_size, config.accumulate
    more = next((n for n in range(2 * parts, batch + 1) if batch % n == 0), None)
    ways = [f"--accumulate {more} (the same batch in {more} parts)"] * (more is not None)
    ways += [f"--batch {batch // 2}"] * (batch > 1)
    words = " or ".join(ways) or "a smaller --model"
    if checkpoint.checkpoint_paths(config.run_dir):
        words += ", with --fork NEW_DIR to go on from the newest checkpoint"
    now = f"--batch {batch}" + (f" --accumulate {parts}" if parts > 1 else "")
    return f"{now}: out of memory on {' and '.join(dict.fromkeys(config.devices))} ({what}). Give {words}."
