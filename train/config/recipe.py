"""What a recipe is: every number of a training, with its source beside it. The numbers are in train/config/recipes.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pipeline.augment import Augmentation, check_choice
from prep.console import UserError
from train.config.architecture import LAYERS

INITS = ("normal", "he")
ACTIVATIONS = ("relu", "tanh", "sigmoid")
POOLS_PX = (2, 3)


@dataclass(frozen=True)
class Lrn:
    """Normalization across maps, alpha multiplying the plain sum of squares (train/model/lrn.py)."""

    size: int
    alpha: float
    beta: float
    k: float

    def __post_init__(self) -> None:
        """Raise UserError for a window without a middle."""
        if self.size < 1 or self.size % 2 == 0 or self.k <= 0:
            raise UserError(f"size {self.size}, k {self.k}: expected an odd number of maps, and more than 0.")


@dataclass(frozen=True)
class ScheduleChange:
    """From `after_epochs` epochs on: what is not None takes the place of what was."""

    after_epochs: float  # a change of the colour noise waits for the epoch to end
    lr: float | None = None  # of all weights, conv1's too unless it was given its own
    lr_conv1: float | None = None  # of conv1's weights alone; 0 freezes the layer
    colour: str | None = None


@dataclass(frozen=True)
class Plateau:
    """Divide the rate when the validation error stops improving, so many times, then end at the next plateau."""

    factor: float
    patience_epochs: int
    drops: int

    def __post_init__(self) -> None:
        """Raise UserError for a plan that never moves."""
        if not 0 < self.factor < 1 or self.patience_epochs < 1 or self.drops < 0:
            raise UserError(
                f"factor {self.factor}, patience_epochs {self.patience_epochs}, drops {self.drops}: expected between 0 "
                "and 1, at least 1, at least 0."
            )


@dataclass(frozen=True)
class Cosine:
    """Rise in a straight line from `start` · lr over `warmup_epochs`, then fall along half a cosine to `end` · lr.

    The fall ends with the recipe's `epochs`. Shares are above 0, for a rate of 0 would freeze the network.
    """

    warmup_epochs: float
    start: float
    end: float

    def __post_init__(self) -> None:
        """Raise UserError for shares out of range."""
        if self.warmup_epochs < 0 or not 0 < self.start <= 1 or not 0 < self.end <= 1:
            raise UserError(
                f"warmup_epochs {self.warmup_epochs}, start {self.start}, end {self.end}: expected at least 0, and "
                "shares of lr above 0, up to 1."
            )


ScheduleSpec = tuple[ScheduleChange, ...] | Plateau | Cosine


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, beside its network, store, seed and length. `sources` has a line for every other field."""

    name: str

    batch_size: int
    epochs: int
    input_divisor: float  # of the mean-subtracted image
    augmentation: Augmentation

    activation: str  # one of ACTIVATIONS
    lrn: Lrn | None  # after layers 1 and 2
    norm_before_relu: bool  # layer 1: conv, norm, pool, ReLU in place of conv, ReLU, norm, pool
    within_map: Lrn | None  # after layer 2's normalization
    pool_px: int  # side of a pooling window, at a stride of 2: 3 overlaps, 2 does not
    crossing: bool  # False: conv3, fc6 and fc7 see their own column alone; fc8 sees both all the same
    dropout: float  # of fc6 and fc7: chance to be set to zero
    dropout_scales_training: bool  # True: survivors / (1 − p) in training; False: all × (1 − p) in test

    init: str  # "normal": std below; "he": std = sqrt(2 / fan_in)
    init_std: Mapping[str, float]  # of "normal", by layer
    init_bias: Mapping[str, float]  # by layer; 0 in layers that are not named

    label_smoothing: float  # share of the target that goes to all classes alike
    lr: float
    lr_bias: float | None  # None: a multiple of lr; a number: the biases' own, constant
    lr_bias_factor: float  # of lr, where lr_bias is None
    momentum: float
    weight_decay: float
    decay_biases: bool
    schedule: ScheduleSpec

    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raise UserError for a number that no training can have."""
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("init", self.init, INITS)
        ranges: dict[str, tuple[bool, str]] = {
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "input_divisor": (self.input_divisor > 0, "more than 0"),
            "pool_px": (self.pool_px in POOLS_PX, " or ".join(map(str, POOLS_PX))),
            "dropout": (0 <= self.dropout < 1, "at least 0, less than 1"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "at least 0, less than 1"),
            "lr": (self.lr > 0, "more than 0"),
            "lr_bias_factor": (self.lr_bias_factor > 0, "more than 0"),
            "momentum": (0 <= self.momentum < 1, "at least 0, less than 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "init_std": (set(self.init_std) == set(LAYERS), f"a number for each of {', '.join(LAYERS)}"),
            "init_bias": (set(self.init_bias) <= set(LAYERS), f"layers of {', '.join(LAYERS)}"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise UserError(f"{name} {getattr(self, name)}: expected {expected}.")


def recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    """The inverse of dataclasses.asdict and json.dumps; raises TypeError, KeyError or ValueError for anything else."""
    parts = {
        "augmentation": Augmentation(**data["augmentation"]),
        "lrn": None if data["lrn"] is None else Lrn(**data["lrn"]),
        "within_map": None if data["within_map"] is None else Lrn(**data["within_map"]),
        "schedule": _plan_from_json(data["schedule"]),
    }
    return Recipe(**{**data, **parts})


def _plan_from_json(data: Any) -> ScheduleSpec:
    if not isinstance(data, dict):
        return tuple(ScheduleChange(**change) for change in data)
    kind = Cosine if "warmup_epochs" in data else Plateau
    return kind(**data)


def recipe_fields() -> list[str]:
    """The names of what a recipe decides, in order."""
    return [field.name for field in fields(Recipe) if field.name not in ("name", "sources")]


def insensitive_at_init(recipe: Recipe) -> bool:
    """Whether its logits hardly depend on the picture at first, as those of the paper's own initialization: weights of
    0.01 and biases of 1 in the middle layers (docs/measurements.md has what follows of it).
    """
    middle = ("conv3", "conv4", "conv5")
    small = all(recipe.init_std[layer] <= 0.01 for layer in middle)
    return recipe.init == "normal" and small and any(recipe.init_bias.get(layer, 0) >= 1 for layer in middle)
