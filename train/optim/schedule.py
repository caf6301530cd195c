"""Learning-rate schedules (steps, plateau, cosine, polynomial), and scheduled changes of the colour noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from train.config.recipe import Cosine, Plateau, Polynomial, Recipe, ScheduleChange
from train.optim.paper_sgd import PaperSGD


def cosine_share(cosine: Cosine, epochs_done: float, epochs: int) -> float:
    """Return the factor by which a cosine schedule multiplies the recipe's lr after `epochs_done` of `epochs` epochs.

    The factor rises linearly during the warm-up, then falls along half a cosine.
    After `epochs` epochs the factor stays at `cosine.end`.
    """
    if epochs_done < cosine.warmup_epochs:
        return _warmup_share(cosine, epochs_done)
    if epochs_done >= epochs:
        return cosine.end
    progress = (epochs_done - cosine.warmup_epochs) / (epochs - cosine.warmup_epochs)
    return cosine.end + (1 - cosine.end) * (1 + math.cos(math.pi * progress)) / 2


def polynomial_share(polynomial: Polynomial, epochs_done: float, epochs: int) -> float:
    """Return the factor by which a polynomial schedule multiplies the recipe's lr after `epochs_done` of `epochs`."""
    if epochs_done < polynomial.warmup_epochs:
        return _warmup_share(polynomial, epochs_done)
    remaining = max(0.0, 1 - epochs_done / epochs)
    return max(polynomial.end, math.pow(remaining, polynomial.power))


def _warmup_share(schedule: Cosine | Polynomial, epochs_done: float) -> float:
    return schedule.start + (1 - schedule.start) * epochs_done / schedule.warmup_epochs


@dataclass
class Schedule:
    """Learning rates and colour noise of a recipe, at any epoch.

    The schedules `steps`, `cosine` and `polynomial` depend only on the epoch. A plateau schedule also depends on the
    validation errors so far. The fields after `batch_size` summarize the validation errors and are saved in
    checkpoints.
    """

    recipe: Recipe
    batch_size: int | None = None  # number of images in a step, over all processes; None: the batch size of the recipe
    best_error: float = float("inf")  # lowest validation top-1 error so far, 0..1
    epochs_since_best: int = 0
    drops: int = 0  # number of reductions of the learning rate so far
    # whether the run must end, because the validation error no longer improves at the lowest learning rate of the
    # schedule
    finished: bool = field(default=False, init=False)

    def learning_rates(self, epochs_done: float) -> tuple[float, float, float]:
        """Return (lr of weights, lr of conv1's weights, lr of biases) after `epochs_done` epochs.

        If the recipe sets `lr_batch`, all three rates are multiplied by batch_size / lr_batch.
        """
        recipe = self.recipe
        lr, lr_conv1 = recipe.lr, None  # None: conv1 has the same learning rate as the other layers
        if isinstance(recipe.schedule, Plateau):
            lr *= recipe.schedule.factor**self.drops
        if isinstance(recipe.schedule, Cosine):
            lr *= cosine_share(recipe.schedule, epochs_done, recipe.epochs)
        if isinstance(recipe.schedule, Polynomial):
            lr *= polynomial_share(recipe.schedule, epochs_done, recipe.epochs)
        for change in self._changes_until(epochs_done):
            lr = lr if change.lr is None else change.lr
            lr_conv1 = lr_conv1 if change.lr_conv1 is None else change.lr_conv1
        lr_bias = lr * recipe.lr_bias_factor if recipe.lr_bias is None else recipe.lr_bias
        factor = recipe.rate_factor(recipe.batch_size if self.batch_size is None else self.batch_size)
        return factor * lr, factor * (lr if lr_conv1 is None else lr_conv1), factor * lr_bias

    def colour(self, epochs_done: int) -> str:
        """Return the colour noise after `epochs_done` complete epochs: a value of Augmentation.colour."""
        colour = self.recipe.augmentation.colour
        for change in self._changes_until(epochs_done):
            colour = change.colour or colour
        return colour

    def apply(self, optimizer: PaperSGD, epochs_done: float) -> float:
        """Set the learning rates of an optimizer that make_optimizer returned.

        Returns the rate of the weights of conv2 to fc8.

        A learning rate of 0 for conv1 freezes the layer: conv1's weights and biases get no gradient.
        """
        lr, lr_conv1, lr_bias = self.learning_rates(epochs_done)
        lr_conv1_bias = lr_bias if lr_conv1 else 0.0
        lr_by_group = {"weights": lr, "biases": lr_bias, "conv1": lr_conv1, "conv1 biases": lr_conv1_bias}
        for group in optimizer.param_groups:
            group["lr"] = lr_by_group[group["name"]]
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] != 0)
        return lr

    def record_validation(self, error: float) -> None:
        """Record the validation top-1 error (0..1) of an epoch.

        After `patience_epochs` epochs without a new lowest error, a plateau schedule reduces the learning rate. If no
        reduction is left, the schedule sets `finished` instead. All other schedules ignore the validation error.
        """
        plateau = self.recipe.schedule
        if not isinstance(plateau, Plateau):
            return
        if error < self.best_error:
            self.best_error, self.epochs_since_best = error, 0
            return
        self.epochs_since_best += 1
        if self.epochs_since_best < plateau.patience_epochs:
            return
        self.epochs_since_best = 0
        if self.drops == plateau.drops:
            self.finished = True
        else:
            self.drops += 1

    def state_dict(self) -> dict[str, float | int | bool]:
        """Return the state of the schedule, saved as "schedule" in checkpoints."""
        return {
            "best_error": self.best_error,
            "epochs_since_best": self.epochs_since_best,
            "drops": self.drops,
            "finished": self.finished,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        for name in self.state_dict():
            setattr(self, name, state[name])

    def _changes_until(self, epochs_done: float) -> list[ScheduleChange]:
        if not isinstance(self.recipe.schedule, tuple):
            return []
        return [change for change in self.recipe.schedule if epochs_done >= change.after_epochs]
