"""Every number of a training, with its source beside it.

A recipe is data: `paper` follows the text, `released` the code and parameter files that made the paper's table (net
#145 of AlexNet-Source-Code: layers/layers-145.cfg, layers/layer-params-145.cfg, here L145 and P145), `short` is for
minutes on a CPU and small batches. Where paper and code part, the source says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from pipeline.augment import Augmentation
from prep.console import UserError


@dataclass(frozen=True)
class Lrn:
    """Normalisation across maps, alpha multiplying the plain sum of squares (train/lrn.py)."""

    size: int
    alpha: float
    beta: float
    k: float


@dataclass(frozen=True)
class Change:
    """From `after_epochs` epochs on: what is not None takes the place of what was."""

    after_epochs: float  # a change of the colour noise waits for the epoch to end
    lr: float | None = None  # of all weights, conv1's too
    lr_conv1: float | None = None  # of conv1's weights alone; 0 freezes the layer
    colour: str | None = None


@dataclass(frozen=True)
class Plateau:
    """Divide the rate when the validation error stops improving, so many times, then end at the next plateau."""

    factor: float
    patience_epochs: int
    drops: int


@dataclass(frozen=True)
class Recipe:
    """What a run depends on, beside its store, seed and length. `sources` has a line for every other field."""

    name: str
    batch_size: int
    epochs: int
    input_divisor: float  # of the mean-subtracted image
    augmentation: Augmentation
    init: str  # "normal": std below; "he": std = sqrt(2 / fan_in)
    init_std: Mapping[str, float]  # of "normal", by layer
    bias_one: tuple[str, ...]  # layers whose biases start at 1, the others' at 0
    lrn: Lrn
    norm_before_relu: bool  # layer 1: conv, norm, pool, ReLU in place of conv, ReLU, norm, pool
    within_map: Lrn | None  # after layer 2's normalisation
    dropout: float  # of fc6 and fc7: chance to be set to zero
    dropout_scales_training: bool  # True: survivors / (1 − p) in training; False: all × (1 − p) in test
    lr: float
    lr_bias: float | None  # None: biases follow lr; a number: their own, constant
    momentum: float
    weight_decay: float
    decay_biases: bool
    schedule: tuple[Change, ...] | Plateau
    sources: Mapping[str, str]


_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
_BIAS_ONE = ("conv2", "conv4", "conv5", "fc6", "fc7")


def _recipe(name: str, **numbers: tuple[Any, str]) -> Recipe:
    return Recipe(
        name=name,
        sources={field: source for field, (_, source) in numbers.items()},
        **{field: value for field, (value, _) in numbers.items()},
    )


PAPER = _recipe(
    "paper",
    batch_size=(128, "section 5"),
    epochs=(90, "section 5: 'roughly 90 cycles'"),
    input_divisor=(1.0, "section 2: raw RGB values, nothing but the mean subtracted"),
    augmentation=(
        Augmentation(mean="image", colour="eigenvalue", strength=0.1),
        "section 2 (mean activity per pixel); 4.1: eigenvalues times N(0, 0.1), read on pixels in [0, 1]; on "
        "0..255 they would shift by over a thousand grey levels",
    ),
    init=("normal", "section 5: zero-mean Gaussian"),
    init_std=(dict.fromkeys(_LAYERS, 0.01), "section 5: 'each layer'"),
    bias_one=(_BIAS_ONE, "section 5: second, fourth and fifth convolutional and the fully-connected hidden layers"),
    lrn=(Lrn(5, 1e-4, 0.75, 2.0), "section 3.3: k = 2, n = 5, α = 1e-4, β = 0.75"),
    norm_before_relu=(False, "section 3.3: 'after applying the ReLU nonlinearity'"),
    within_map=(None, "not in the text"),
    dropout=(0.5, "section 4.2"),
    dropout_scales_training=(False, "section 4.2: 'at test time ... multiply their outputs by 0.5'"),
    lr=(0.01, "section 5"),
    lr_bias=(None, "section 5: 'an equal learning rate for all layers'"),
    momentum=(0.9, "section 5"),
    weight_decay=(0.0005, "section 5"),
    decay_biases=(True, "section 5 makes no exception of them"),
    schedule=(
        Plateau(factor=0.1, patience_epochs=5, drops=3),
        "section 5: divided by 10 when the validation error stopped improving, three times; the patience is ours",
    ),
)

RELEASED = _recipe(
    "released",
    batch_size=(128, "convnet.py:177"),
    epochs=(91, "P145: stopped at epoch 91"),
    input_divisor=(1.0, "convdata_jpeg.py: nothing but the mean subtracted"),
    augmentation=(
        Augmentation(mean="image", colour="stdev", strength=0.1, divisor=1.1, shared_by=32),
        "convdata_jpeg.py: centre of the mean image :95, noise by standard deviation and /1.1 :155-179, one window for "
        "32 images :77",
    ),
    init=("normal", "layer.py:807"),
    init_std=(
        {**dict.fromkeys(_LAYERS, 0.01), "conv3": 0.03, "conv4": 0.03, "conv5": 0.03},
        "L145: initW; the paper has 0.01 everywhere",
    ),
    bias_one=(_BIAS_ONE, "L145: initB"),
    lrn=(
        Lrn(5, 1e-4 / 5, 0.75, 2.0),
        "P145:137-155, scale divided by size in layer.py:1183; the paper's α is 5 times this",
    ),
    norm_before_relu=(True, "L145:35-63: rnorm1 on conv1's linear outputs, ReLU after pool1; the paper has ReLU first"),
    within_map=(Lrn(5, 1e-3 / 25, 0.75, 1.0), "L145:107-117, P145:157-163: cnorm2; not in the paper"),
    dropout=(0.5, "L145:256-292: hs, keep 0.5"),
    dropout_scales_training=(False, "layer.cu:1126-1135"),
    lr=(0.01, "P145:169"),
    lr_bias=(0.02, "P145: epsB, constant; the paper has one rate"),
    momentum=(0.9, "P145"),
    weight_decay=(0.0005, "P145: wc of all weights"),
    decay_biases=(False, "layer.cu:565; the paper makes no exception of them"),
    schedule=(
        (
            Change(25, lr=1e-3),
            Change(51, lr=1e-4),
            Change(67, lr_conv1=1e-5, colour="off"),
            Change(72, lr_conv1=0.0),
            Change(79, lr=1e-5),
        ),
        "P145:169-182; the paper has three drops, for all layers",
    ),
)

SHORT = replace(
    PAPER,
    name="short",
    batch_size=16,
    epochs=3,
    input_divisor=64.0,
    augmentation=Augmentation(mean="channel", colour="stdev", strength=0.1),
    init="he",
    bias_one=(),
    dropout=0.0,
    lr=0.004,
    decay_biases=False,
    schedule=(Change(2, lr=0.001),),
    sources={
        **PAPER.sources,
        "batch_size": "ours: many small steps learn more in minutes than few large ones (docs/measurements.md)",
        "epochs": "ours: what four minutes of two cores allow on 1,500 pictures",
        "input_divisor": "ours: pixels of about unit variance, as initialisation 'he' expects",
        "augmentation": "ours: a mean for each channel; noise as the released code's, without its /1.1",
        "init": "He et al. 2015 (arXiv 1502.01852), eq. 10",
        "init_std": "not used by 'he'",
        "bias_one": "He et al. 2015: none",
        "dropout": "ours: none. Section 4.2: it 'roughly doubles the number of iterations required to converge'",
        "lr": "ours: the paper's 0.01 at batches of 128, scaled down for small ones (docs/measurements.md)",
        "decay_biases": "ours, as the released code",
        "schedule": "ours: one drop for the last third",
    },
)

RECIPES = {recipe.name: recipe for recipe in (PAPER, RELEASED, SHORT)}


def recipe_named(name: str) -> Recipe:
    """The recipe `name`; raises UserError for a name that is none."""
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: expected one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    """The inverse of dataclasses.asdict and json.dumps; raises TypeError or KeyError for anything else."""
    schedule = data["schedule"]
    parts = {
        "augmentation": Augmentation(**data["augmentation"]),
        "bias_one": tuple(data["bias_one"]),
        "lrn": Lrn(**data["lrn"]),
        "within_map": None if data["within_map"] is None else Lrn(**data["within_map"]),
        "schedule": Plateau(**schedule) if isinstance(schedule, dict) else tuple(Change(**c) for c in schedule),
    }
    return Recipe(**{**data, **parts})


def check_sources() -> None:
    """Raise AssertionError unless every field of every recipe has a source: run by the tests."""
    for recipe in RECIPES.values():
        wanted = {field.name for field in fields(Recipe)} - {"name", "sources"}
        assert set(recipe.sources) == wanted, (recipe.name, wanted ^ set(recipe.sources))
