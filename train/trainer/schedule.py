"""The learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from train.config.recipe import Cosine, Plateau, Recipe, ScheduleChange
from train.trainer.optim import PaperSGD


def cosine_share(spec: Cosine, epochs_done: float, epochs: int) -> float:
    """The share of lr after `epochs_done` of `epochs`; `spec.end` from there on."""
    if epochs_done < spec.warmup_epochs:
        return spec.start + (1 - spec.start) * epochs_done / spec.warmup_epochs
    if epochs_done >= epochs:
        return spec.end
    way = (epochs_done - spec.warmup_epochs) / (epochs - spec.warmup_epochs)
    return spec.end + (1 - spec.end) * (1 + math.cos(math.pi * way)) / 2


@dataclass
class Schedule:
    """What the rates and the colour noise are now. Plateau state is in the three numbers, which a checkpoint keeps."""

    recipe: Recipe
    best_error: float = float("inf")
    epochs_since_best: int = 0
    drops: int = 0
    finished: bool = field(default=False, init=False)

    def learning_rates(self, epochs_done: float) -> tuple[float, float, float]:
        """(lr of weights, of conv1's weights, of biases) after `epochs_done` epochs."""
        recipe = self.recipe
        lr, lr_conv1 = recipe.lr, None  # a rate that conv1 is given of its own it keeps
        if isinstance(recipe.schedule, Plateau):
            lr *= recipe.schedule.factor**self.drops
        if isinstance(recipe.schedule, Cosine):
            lr *= cosine_share(recipe.schedule, epochs_done, recipe.epochs)
        for change in self._changes(epochs_done):
            lr = lr if change.lr is None else change.lr
            lr_conv1 = lr_conv1 if change.lr_conv1 is None else change.lr_conv1
        lr_bias = lr * recipe.lr_bias_factor if recipe.lr_bias is None else recipe.lr_bias
        return lr, lr if lr_conv1 is None else lr_conv1, lr_bias

    def colour(self, epochs_done: int) -> str:
        """The colour noise after `epochs_done` whole epochs, in Augmentation's words."""
        colour = self.recipe.augmentation.colour
        for change in self._changes(epochs_done):
            colour = change.colour or colour
        return colour

    def apply(self, optimizer: PaperSGD, epochs_done: float) -> float:
        """Set the rates of an optimizer that make_optimizer made; returns the rate of the weights.

        A rate of 0 for conv1 freezes the layer whole: no gradient is computed for it.
        """
        lr, lr_conv1, lr_bias = self.learning_rates(epochs_done)
        rates = {"weights": lr, "biases": lr_bias, "conv1": lr_conv1, "conv1 biases": lr_bias if lr_conv1 else 0.0}
        for group in optimizer.param_groups:
            group["lr"] = rates[group["name"]]
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] != 0)
        return lr

    def record_validation(self, error: float) -> None:
        """Count an epoch's validation error towards a plateau; `finished` says that the last rate has reached one."""
        spec = self.recipe.schedule
        if not isinstance(spec, Plateau):
            return
        if error < self.best_error:
            self.best_error, self.epochs_since_best = error, 0
            return
        self.epochs_since_best += 1
        if self.epochs_since_best < spec.patience_epochs:
            return
        self.epochs_since_best = 0
        if self.drops == spec.drops:
            self.finished = True
        else:
            self.drops += 1

    def _changes(self, epochs_done: float) -> list[ScheduleChange]:
        if not isinstance(self.recipe.schedule, tuple):
            return []
        return [change for change in self.recipe.schedule if epochs_done >= change.after_epochs]

    def state_dict(self) -> dict[str, float | int | bool]:
        """What rates depend on beside the epoch."""
        return {
            "best_error": self.best_error,
            "epochs_since_best": self.epochs_since_best,
            "drops": self.drops,
            "finished": self.finished,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        for name in self.state_dict():
            setattr(self, name, state[name])
