"""The Recipe class: every hyperparameter of a training, with its source.

train/config/recipes.py defines the recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.augment import Augmentation, check_choice
from prep.console import UserError
from train.config.architecture import LAYERS
from train.config.choices import ACTIVATIONS, INITS, MAX_COUNT, POOLS_PX


@dataclass(frozen=True)
class Lrn:
    """Parameters of local response normalization: a · (k + alpha · Σ a²)^−beta (train/model/lrn.py).

    Σ a² is the sum of the squared activations in a window around the activation a.
    """

    size: int  # odd size of the window: number of maps (field `lrn`), or side of a square in px (field `within_map`)
    alpha: float  # factor of the sum Σ a², as in the paper; torch.nn.LocalResponseNorm divides its alpha by `size`
    beta: float
    k: float

    def __post_init__(self) -> None:
        """Raise UserError if `size` is even or not positive, or if `k` is not positive."""
        if not 1 <= self.size <= MAX_COUNT or self.size % 2 == 0 or self.k <= 0:
            raise UserError(f"size {self.size}, k {self.k}: expected an odd size, and a k of more than 0.")


@dataclass(frozen=True)
class AlexNetAugmentation:
    """The settings of pipeline.augment.Augmentation that a recipe can set. All other settings keep their defaults."""

    mean: str = "channel"
    colour: str = "stdev"
    strength: float = 0.1
    divisor: float = 1.0
    shared_by: int = 1
    eval_divisor: float | None = None

    def for_stream(self) -> Augmentation:
        """Return the Augmentation with these settings, for the stream."""
        return Augmentation(**asdict(self))

    @property
    def divisor_in_evaluation(self) -> float:
        """The number by which evaluation images are divided."""
        return self.for_stream().divisor_in_evaluation

    def __post_init__(self) -> None:
        """Raise WrongArgument, which is a UserError, for a value that is not allowed."""
        self.for_stream()


@dataclass(frozen=True)
class ScheduleChange:
    """A change of learning rates or colour noise after `after_epochs` epochs. A field that is None changes nothing."""

    after_epochs: float  # need not be a whole number, but colour noise changes only at the end of an epoch
    # Learning rate of the weights. If this change or an earlier change sets lr_conv1, `lr` does not apply to conv1.
    lr: float | None = None
    lr_conv1: float | None = None  # learning rate of conv1's weights; 0 freezes conv1's weights and biases
    colour: str | None = None  # colour noise: a value of Augmentation.colour


@dataclass(frozen=True)
class Plateau:
    """Schedule that multiplies the learning rate by `factor` each time the validation error stops improving.

    After `drops` multiplications, the training ends at the next plateau.
    """

    factor: float
    patience_epochs: int  # a plateau is this number of epochs without a new lowest validation error
    drops: int

    def __post_init__(self) -> None:
        """Raise UserError if a value is out of range."""
        counts_fit = 1 <= self.patience_epochs <= MAX_COUNT and 0 <= self.drops <= MAX_COUNT
        if not 0 < self.factor < 1 or not counts_fit:
            raise UserError(
                f"factor {self.factor}, patience_epochs {self.patience_epochs}, drops {self.drops}: expected a "
                "factor between 0 and 1, patience_epochs of at least 1, and drops of at least 0."
            )


@dataclass(frozen=True)
class Cosine:
    """Schedule: linear warm-up from `start` · lr to lr, then half a cosine from lr to `end` · lr.

    The warm-up takes `warmup_epochs` epochs. The cosine ends after `Recipe.epochs` epochs. `start` and `end` must be
    above 0, because a learning rate of 0 would freeze the network.
    """

    warmup_epochs: float
    start: float
    end: float

    def __post_init__(self) -> None:
        """Raise UserError if a value is out of range."""
        if self.warmup_epochs < 0 or not 0 < self.start <= 1 or not 0 < self.end <= 1:
            raise UserError(
                f"warmup_epochs {self.warmup_epochs}, start {self.start}, end {self.end}: expected "
                "warmup_epochs of at least 0, and start and end (shares of lr) above 0 and at most 1."
            )


@dataclass(frozen=True)
class Polynomial:
    """Schedule: linear warm-up from `start` · lr to lr, then lr · (1 − e / E)^`power` after e of E epochs.

    The warm-up takes `warmup_epochs` epochs. E is `Recipe.epochs`, and e includes the warm-up: after the warm-up, the
    rate is lr · (1 − warmup_epochs / E)^power. The rate never falls below `end` · lr. `start` and `end` must be above
    0, because a learning rate of 0 would freeze the network.
    """

    warmup_epochs: float
    start: float
    power: float
    end: float

    def __post_init__(self) -> None:
        """Raise UserError if a value is out of range."""
        if self.warmup_epochs < 0 or not 0 < self.start <= 1 or self.power <= 0 or not 0 < self.end <= 1:
            raise UserError(
                f"warmup_epochs {self.warmup_epochs}, start {self.start}, power {self.power}, end {self.end}: expected "
                "warmup_epochs of at least 0, start and end (shares of lr) above 0 and at most 1, and a power above 0."
            )


ScheduleSpec = (
    tuple[ScheduleChange, ...] | Plateau | Cosine | Polynomial
)  # train.optim.schedule.Schedule implements these schedules


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run. `sources` maps the name of each field to a text about the origin of its value.

    The architecture, store and seed of a run are not part of its recipe. `epochs` is a default, and a run can have
    another number of epochs.
    """

    name: str

    batch_size: int
    epochs: int
    input_divisor: float  # pixel values minus the mean are divided by this number
    augmentation: AlexNetAugmentation

    activation: str  # one of ACTIVATIONS
    lrn: Lrn | None  # normalization across maps, in layers 1 and 2; None: no normalization
    # True: layer 1 is conv, norm, pool, activation. False: layer 1 is conv, activation, norm, pool.
    norm_before_relu: bool
    within_map: Lrn | None  # normalization within each map of layer 2, after the normalization across maps
    pool_px: int  # side of a pooling window in px; the stride is 2, so windows of 3 px overlap
    crossing: bool  # if False, conv3, fc6 and fc7 do not connect the columns; fc8 always connects the columns
    dropout: float  # probability with which an input of the layers in Architecture.dropout_before is set to zero
    # If True, training divides activations by 1 − dropout. If False, evaluation multiplies activations by 1 − dropout.
    dropout_scales_training: bool

    init: str  # "normal": standard deviations in init_std; "he": standard deviation sqrt(2 / fan_in)
    init_std: Mapping[str, float]  # standard deviation of each layer; used only if init is "normal"
    init_bias: Mapping[str, float]  # initial bias of each layer; a layer that is not listed has 0

    label_smoothing: float  # share of the target probability that is spread evenly over all classes
    lr: float
    # Batch size for which the learning rates of the recipe are given. With another batch size, the learning rates are
    # multiplied by batch size / lr_batch. None: the learning rates do not depend on the batch size.
    lr_batch: int | None
    lr_bias: float | None  # constant learning rate of the biases; None: their learning rate is lr_bias_factor · lr
    lr_bias_factor: float  # used only if lr_bias is None
    momentum: float
    weight_decay: float
    decay_biases: bool
    lars_trust: float | None  # trust coefficient of LARS (train/optim/lars.py); None: SGD without LARS
    schedule: ScheduleSpec

    sources: Mapping[str, str]

    @property
    def eval_input_divisor(self) -> float:
        """The number by which loader and network together divide evaluation images after subtracting the mean."""
        return self.input_divisor * self.augmentation.divisor_in_evaluation

    def rate_factor(self, batch_size: int) -> float:
        """Return the factor of all learning rates for a batch size: batch_size / lr_batch, or 1 if lr_batch is None."""
        return 1.0 if self.lr_batch is None else batch_size / self.lr_batch

    def __post_init__(self) -> None:
        """Raise UserError if a value is out of range."""
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("init", self.init, INITS)
        ranges: dict[str, tuple[bool, str]] = {
            "batch_size": (1 <= self.batch_size <= MAX_COUNT, f"1 to {MAX_COUNT:,}"),
            "epochs": (1 <= self.epochs <= MAX_COUNT, f"1 to {MAX_COUNT:,}"),
            "input_divisor": (self.input_divisor > 0, "more than 0"),
            "pool_px": (self.pool_px in POOLS_PX, " or ".join(map(str, POOLS_PX))),
            "dropout": (0 <= self.dropout < 1, "at least 0, less than 1"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "at least 0, less than 1"),
            "lr": (self.lr > 0, "more than 0"),
            "lr_batch": (self.lr_batch is None or 1 <= self.lr_batch <= MAX_COUNT, "at least 1, or none"),
            "lr_bias_factor": (self.lr_bias_factor > 0, "more than 0"),
            "momentum": (0 <= self.momentum < 1, "at least 0, less than 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "lars_trust": (self.lars_trust is None or self.lars_trust > 0, "more than 0, or none"),
            "init_std": (set(self.init_std) == set(LAYERS), f"a number for each of {', '.join(LAYERS)}"),
            "init_bias": (set(self.init_bias) <= set(LAYERS), f"layers of {', '.join(LAYERS)}"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise UserError(f"{name} {getattr(self, name)}: expected {expected}.")


# Fields that version 0.1.0 did not have. If these fields are None, training works as in version 0.1.0.
ADDED_FIELDS = ("lr_batch", "lars_trust")


def recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    """Convert the result of asdict back to a Recipe. Raises TypeError, KeyError or ValueError for other data.

    `data` may lack the fields of ADDED_FIELDS.
    """
    converted = {
        **{name: data.get(name) for name in ADDED_FIELDS},
        "sources": {
            **dict.fromkeys(ADDED_FIELDS, "the version that began the run did not have this field"),
            **data["sources"],
        },
        "augmentation": AlexNetAugmentation(**with_eval_divisor(data["augmentation"])),
        "lrn": None if data["lrn"] is None else Lrn(**data["lrn"]),
        "within_map": None if data["within_map"] is None else Lrn(**data["within_map"]),
        "schedule": _schedule_from_json(data["schedule"]),
    }
    return Recipe(**{**data, **converted})


def with_eval_divisor(augmentation: Mapping[str, Any]) -> dict[str, Any]:
    """Return `augmentation`, the fields of an AlexNetAugmentation, with `eval_divisor` added if it is missing.

    Version 0.1.0 wrote no `eval_divisor`, and did not divide evaluation images.
    """
    before = None if augmentation.get("divisor", 1) == 1 else 1.0
    return {**augmentation, "eval_divisor": augmentation.get("eval_divisor", before)}


def _schedule_from_json(data: Any) -> ScheduleSpec:
    if not isinstance(data, dict):
        return tuple(ScheduleChange(**change) for change in data)
    kind = Polynomial if "power" in data else Cosine if "warmup_epochs" in data else Plateau
    return kind(**data)


def recipe_fields() -> list[str]:
    """Return the names of the hyperparameters in order.

    The hyperparameters are all fields except `name` and `sources`.
    """
    return [field.name for field in fields(Recipe) if field.name not in ("name", "sources")]


def insensitive_at_init(recipe: Recipe) -> bool:
    """Return True if the logits of a newly initialized network hardly depend on the image.

    Learning then starts late, as docs/measurements.md shows. One such initialization is that of the paper: the initial
    weights of conv3 to conv5 have a standard deviation of 0.01, and the initial biases of conv4 and conv5 are 1.
    """
    middle = ("conv3", "conv4", "conv5")
    small = all(recipe.init_std[layer] <= 0.01 for layer in middle)
    return recipe.init == "normal" and small and any(recipe.init_bias.get(layer, 0) >= 1 for layer in middle)
