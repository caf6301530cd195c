"""Ends a run if a loss, gradient or parameter is NaN or infinite.

Warns if the loss stays at that of a random guess, if it is zero, or if all labels are equal. Between two log lines, the
host does not wait for a device. The values of a step stay on the device until the next training line of metrics.jsonl
is due. A NaN loss is therefore reported when this line is due. The report names the exact step at which the loss was
NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import Augmentation
from prep.console import UserError, say
from train.model.alexnet import AlexNet
from train.monitor.step_counters import Counts
from train.replicas.group import ReplicaGroup
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.offending_batch import write_offending_batch

# The check warns if the loss stays at ln(classes), the loss of a random guess, for STUCK_STEPS steps. On ImageNet,
# the loss of the paper's network can stay at ln(classes) for half of STUCK_STEPS before it falls. In a run of fewer
# than 2 · STUCK_STEPS steps, the check warns after half of the run's steps, but not before MIN_STUCK_STEPS steps.
STUCK_STEPS = 5000
MIN_STUCK_STEPS = 100
STUCK_SHARE = 0.01  # relative tolerance within which a loss counts as ln(classes)
ZERO_LOSS_NATS = 1e-6  # a mean loss below this value counts as zero
REPLICA_TOLERANCE = 1e-4  # relative difference of the norms of two replicas; rounding causes smaller differences
ONE_CLASS_IMAGES = 32  # number of images below which equal labels may be a coincidence


class Diverged(UserError):
    """A loss, a gradient or a parameter is NaN or infinite."""


class DivergenceCheck:
    """Checks losses, labels and norms before each training line of metrics.jsonl."""

    def __init__(self, run: Run, network: AlexNet, warn: Callable[[str], None] = say) -> None:
        """`warn` prints a warning. Each kind of warning is printed at most once."""
        self.run, self.network, self._print_warning, self._group = run, network, warn, network.replicas
        self.stuck_steps = max(MIN_STUCK_STEPS, min(STUCK_STEPS, run.last_step // 2))
        self._stuck_since: int | None = None  # since this step, the mean loss of every interval was ln(classes)
        self._warned: set[str] = set()

    def check(self, step: int, images: int, counts: Counts, augmentation: Augmentation) -> dict[str, dict[str, float]]:
        """Check the steps since the last check, up to `step`. Returns parameter_norms(network).

        images        number of images in the checked steps, over all replicas
        counts        the counts of the checked steps, over all replicas (counts_of_all)
        augmentation  the stream's augmentation in the checked steps

        If a loss is NaN or infinite, writes the batch of its step into the run folder and raises Diverged. If the norm
        of a gradient or parameter is NaN or infinite, writes the batch of `step` and raises Diverged.

        With several replicas, all ranks call `check` and get the same values, so all ranks end together. Rank 0 writes
        the batch of the whole step. Raises UserError if the norms of the replicas differ.
        """
        losses = counts.losses
        norms = norms_of_all(parameter_norms(self.network), self._group)
        prefix = {"parameter": "", "gradient": "the gradient of "}
        not_finite = [
            f"{prefix[kind]}{name} has norm {norm}"
            for name, kinds in norms.items()
            for kind, norm in kinds.items()
            if not math.isfinite(norm)
        ]
        first_step = step - len(losses) + 1
        diagnosis = {"steps": [first_step, step], "losses": losses, "norms": norms}
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                self._stop(first_step + index, f"the loss is {loss}", diagnosis, augmentation)
        if not_finite:
            when = f", within the last {len(losses)} steps" if len(losses) > 1 else ""
            self._stop(step, not_finite[0] + when, diagnosis, augmentation)
        self._warn(step, images, counts)
        return norms

    def _warn(self, step: int, images: int, counts: Counts) -> None:
        losses, smallest, largest = counts.losses, counts.smallest_label, counts.largest_label
        mean, classes = sum(losses) / len(losses), self.run.store.classes
        loss_of_guessing = math.log(len(classes))
        before = step - len(losses)
        if abs(mean - loss_of_guessing) > STUCK_SHARE * loss_of_guessing:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = before
        steps_stuck = 0 if self._stuck_since is None else step - self._stuck_since
        warnings = {
            "stuck": (
                loss_of_guessing > 0 and steps_stuck >= self.stuck_steps,
                f"the loss has been within {STUCK_SHARE:.0%} of ln {len(classes):,} = {loss_of_guessing:.3f}, the "
                f"loss of a random guess, for {self.stuck_steps:,} steps. Usual causes: a learning rate that is too "
                "high or too low (--set lr=…), or labels that do not belong to the images (alexstream preview, "
                "alexprep verify).",
            ),
            "zero": (
                mean < ZERO_LOSS_NATS,
                f"the loss is {mean:.1g}. Usual causes: a store with one class, or with so few images that the network "
                "has memorized them (alexprep inspect).",
            ),
            "one class": (
                smallest == largest and images >= ONE_CLASS_IMAGES,
                f"all {images:,} labels since step {before:,} are {classes[smallest]}. Usual causes: a store "
                "with one class, or with records sorted by class (alexstream inspect).",
            ),
        }
        for kind, (applies, text) in warnings.items():
            if applies and kind not in self._warned:
                self._warned.add(kind)
                self._print_warning(f"Warning: step {step:,}: {text}")

    def _stop(self, step: int, what: str, diagnosis: Mapping[str, Any], augmentation: Augmentation) -> None:
        with self._group.together():
            if self._group.is_first:
                self._set_aside(step, what, diagnosis, augmentation)

    def _set_aside(self, step: int, what: str, diagnosis: Mapping[str, Any], augmentation: Augmentation) -> NoReturn:
        folder = self.run.run_dir / f"offending-step-{step}"
        kept = checkpoint.checkpoint_paths(self.run.run_dir)
        try:
            write_offending_batch(folder, self.run, step, augmentation, diagnosis)
            batch = f"The batch of this step is in {folder}."
        except (OSError, UserError) as error:
            batch = f"The batch of this step could not be written ({error})."
        raise Diverged(
            f"step {step:,}: {what}: training has diverged. {batch} "
            + (f"{kept[-1].name} is kept. " if kept else "")
            + "A lower learning rate (--set lr=…), another --recipe, or a larger --batch at the same learning rate "
            "usually helps. --fork NEW_DIR continues from the checkpoint with the new setting."
        )


def parameter_norms(network: AlexNet) -> dict[str, dict[str, float]]:
    """Return the Euclidean norms of parameters and gradients: `{"conv1.weight": {"parameter": …, "gradient": …}}`.

    The keys are the names in AlexNet.joined_tensors. A parameter without a gradient has no key "gradient". This
    function waits for the devices.
    """
    squares: dict[tuple[str, str], float] = {}
    for device in dict.fromkeys(network.devices):
        keys, tensors = [], []
        for name, parameters in network.parameters_by_joined_name().items():
            for parameter in parameters:
                if parameter.device == device:
                    keys.append((name, "parameter"))
                    tensors.append(parameter.detach())
                    if parameter.grad is not None:
                        keys.append((name, "gradient"))
                        tensors.append(parameter.grad)
        for key, norm in zip(keys, torch.stack([_norm(tensor) for tensor in tensors]).tolist(), strict=True):
            squares[key] = squares.get(key, 0.0) + norm**2
    norms: dict[str, dict[str, float]] = {}
    for (name, kind), square in squares.items():
        norms.setdefault(name, {})[kind] = math.sqrt(square)
    return norms


def norms_of_all(norms: dict[str, dict[str, float]], group: ReplicaGroup) -> dict[str, dict[str, float]]:
    """Return `norms`, after comparing them with the norms of the other replicas.

    If a norm is NaN or infinite on one rank, it is NaN or infinite in the result. Raises UserError if the norms of two
    ranks differ by more than rounding, because the replicas then no longer train the same network.
    """
    if group.size == 1:
        return norms
    keys = [(name, kind) for name, kinds in norms.items() for kind in kinds]
    by_rank = group.gather_equal(np.array([norms[name][kind] for name, kind in keys]))
    for index, (name, kind) in enumerate(keys):
        column = by_rank[:, index]
        not_finite = column[~np.isfinite(column)]
        if len(not_finite):
            norms[name][kind] = float(not_finite[0])
        elif column.max() - column.min() > REPLICA_TOLERANCE * column.max():
            rank = int(abs(column - np.median(column)).argmax())
            with group.together():
                raise UserError(
                    f"rank {rank} has another {kind} {name} than the other replicas (norms "
                    f"{', '.join(map(str, column))}). Run the same command again, which continues from the newest "
                    "checkpoint. If this happens again, look for a machine with faulty memory."
                )
    return norms


def _norm(tensor: Tensor) -> Tensor:
    """Return the norm of a tensor, as a tensor of shape (). The norm is computed row by row.

    On a CPU, a single float32 sum of the squares of fc6's 38 million weights is wrong in the fourth digit.
    """
    rows: Tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())))
    norm: Tensor = torch.linalg.vector_norm(rows)
    return norm
