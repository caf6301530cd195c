"""Types and checks of fields that several files of a run folder have, such as architecture and recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from prep.console import UserError
from prep.schema import Digest, Finite, NonNegative, Text, convert
from prep.schema.check import shown
from train.config.architecture import LAYERS, Architecture, architecture_from_json, architecture_values
from train.config.choices import MAX_COUNT
from train.config.identity import as_json, differing_leaves, recipe_values
from train.config.recipe import Recipe, recipe_fields, recipe_from_json

MAX_STEP = 10**12
MAX_WIDTH = 16_384  # largest number of maps or units of a layer; the paper's network has at most 4,096
MAX_CLASSES = 1_000_000
# Largest number of parameters of a network that is built from a file without tensors, such as run.json. The paper's
# network has 61 million.
MAX_PARAMETERS = 2**28

Positive = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Step = Annotated[int, Meta(ge=0, le=MAX_STEP)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Width = Annotated[int, Meta(ge=1, le=MAX_WIDTH)]
Share = Annotated[float, Meta(ge=0, le=1)]
AboveZero = Annotated[float, Meta(gt=0, le=1.7976931348623157e308)]
Names = Annotated[list[Annotated[str, Meta(min_length=1, max_length=4096)]], Meta(min_length=1, max_length=MAX_CLASSES)]
# Text of a path; the operating system accepts no path with a NUL.
PathText = Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00]*$", extra={"expected": "a path without NUL"})]
_NO_CONTROL = {"expected": "a text without control characters"}
# Text that programs print, without control characters.
Line = Annotated[
    str,
    Meta(max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*(?![\s\S])", extra=_NO_CONTROL),
]
Device = Annotated[
    str, Meta(pattern=r"^(cpu|cuda:[0-9]{1,4})(?![\s\S])", extra={"expected": "cpu, or cuda: and a number"})
]
Precision = Literal["fp32", "tf32", "bf16"]
Layer = Literal["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]


class WidthFields(Struct, frozen=True, forbid_unknown_fields=True):
    """Number of maps or units of each layer (train.config.architecture.Widths)."""

    conv1: Width
    conv2: Width
    conv3: Width
    conv4: Width
    conv5: Width
    fc6: Width
    fc7: Width


class ArchitectureFields(Struct, frozen=True, forbid_unknown_fields=True):
    """An architecture (train.config.architecture.Architecture). A file with unknown fields is refused."""

    name: Line
    source: Line
    columns: Literal[1, 2]
    widths: WidthFields
    conv1_padding: Annotated[int, Meta(ge=0, le=112)] | None
    normalised: bool
    dropout_before: Annotated[list[Literal["fc6", "fc7", "fc8"]], Meta(max_length=3)]
    convolutional: bool


class LrnFields(Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of local response normalization."""

    size: Positive
    alpha: Finite
    beta: Finite
    k: AboveZero


class AugmentationFields(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the augmentation (pipeline.augment.Augmentation). Version 0.1.0 wrote no `eval_divisor`."""

    mean: Literal["channel", "image", "aligned", "none"]
    colour: Literal["stdev", "eigenvalue", "off"]
    strength: NonNegative
    divisor: AboveZero
    shared_by: Positive
    eval_divisor: AboveZero | None = None


class ScheduleChangeFields(Struct, frozen=True, forbid_unknown_fields=True):
    """A change of learning rates or colour noise after a number of epochs."""

    after_epochs: NonNegative
    lr: NonNegative | None = None
    lr_conv1: NonNegative | None = None
    colour: Literal["stdev", "eigenvalue", "off"] | None = None


class PlateauFields(Struct, frozen=True, forbid_unknown_fields=True):
    """A schedule that reduces the learning rate when the validation error stops improving."""

    factor: AboveZero
    patience_epochs: Positive
    drops: Annotated[int, Meta(ge=0, le=2**31)]


class CosineFields(Struct, frozen=True, forbid_unknown_fields=True):
    """A schedule of half a cosine after a warm-up."""

    warmup_epochs: NonNegative
    start: Share
    end: Share


class PolynomialFields(Struct, frozen=True, forbid_unknown_fields=True):
    """A polynomial schedule with a warm-up."""

    warmup_epochs: NonNegative
    start: Share
    power: AboveZero
    end: Share


class RecipeFields(Struct, frozen=True, forbid_unknown_fields=True):
    """The hyperparameters of a run (train.config.recipe.Recipe). A file with unknown fields is refused.

    A schedule that is an object has the fields of PlateauFields, CosineFields or PolynomialFields. Version 0.1.0 wrote
    neither `lr_batch` nor `lars_trust`.
    """

    name: Line
    batch_size: Positive
    epochs: Positive
    input_divisor: AboveZero
    augmentation: AugmentationFields
    activation: Literal["relu", "tanh", "sigmoid"]
    lrn: LrnFields | None
    norm_before_relu: bool
    within_map: LrnFields | None
    pool_px: Literal[2, 3]
    crossing: bool
    dropout: Share
    dropout_scales_training: bool
    init: Literal["normal", "he"]
    init_std: dict[Layer, Finite]
    init_bias: dict[Layer, Finite]
    label_smoothing: Share
    lr: AboveZero
    lr_bias: Finite | None
    lr_bias_factor: AboveZero
    momentum: Share
    weight_decay: NonNegative
    decay_biases: bool
    schedule: Annotated[list[ScheduleChangeFields], Meta(max_length=10_000)] | dict[str, Finite]
    sources: dict[str, Line]
    lr_batch: Positive | None = None
    lars_trust: AboveZero | None = None


class IdentityFields(Struct, frozen=True):
    """The settings that must be unchanged when a run continues (train.config.identity)."""

    store_fingerprint: Digest
    classes: Annotated[int, Meta(ge=1, le=MAX_CLASSES)]
    model: Text
    model_numbers: dict[str, Any]
    recipe: Text
    recipe_numbers: dict[str, Any]
    batch_size: Positive
    accumulate: Positive
    seed: Seed
    precision: Precision
    stream_seed: Seed | None = None


class EnvironmentFields(Struct, frozen=True):
    """Versions of the software that wrote a file."""

    alexnet: Line
    torch: Line
    python: Line
    machine: Line


class DifferenceFields(Struct, frozen=True):
    """A setting that a fork has changed, with both values."""

    name: Text
    there: Any
    here: Any


class AncestorFields(Struct, frozen=True):
    """The checkpoint from which a run or one of its ancestors was forked."""

    path: PathText
    step: Step
    checkpoint_digest: Digest
    differences: Annotated[list[DifferenceFields], Meta(max_length=10_000)]


Ancestry = Annotated[list[AncestorFields], Meta(max_length=1000)]


def parameter_shapes(architecture: Architecture, crossing: bool, classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of AlexNet.joined_tensors by name, without building the network.

    crossing  whether conv3, fc6 and fc7 see both columns (Recipe.crossing)

    A layer that sees only its own column has weights for the inputs of one column. conv2, conv4 and conv5 always see
    only their own column. The maps of pool5 have 6 × 6 positions.
    """
    w, columns = architecture.widths, architecture.columns
    seen = 1 if crossing else columns  # conv3, fc6 and fc7 see 1 / `seen` of the units of the previous layer
    weights: dict[str, tuple[int, ...]] = {
        "conv1": (w.conv1, 3, 11, 11),
        "conv2": (w.conv2, w.conv1 // columns, 5, 5),
        "conv3": (w.conv3, w.conv2 // seen, 3, 3),
        "conv4": (w.conv4, w.conv3 // columns, 3, 3),
        "conv5": (w.conv5, w.conv4 // columns, 3, 3),
        "fc6": (w.fc6, w.conv5 // seen * 36),
        "fc7": (w.fc7, w.fc6 // seen),
        "fc8": (classes, w.fc7),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, shape in weights.items():
        shapes[f"{layer}.weight"], shapes[f"{layer}.bias"] = shape, shape[:1]
    return shapes


def checked_architecture(data: Any, name: str, advice: str) -> Architecture:
    """Convert `data`, which has the types of ArchitectureFields, to an Architecture. Raises UserError for wrong values.

    name    names of the file and of the field, for error messages
    advice  last sentence of an error message
    """
    try:
        return architecture_from_json(data)
    except ValueError as error:
        raise UserError(f"{name}: {str(error).rstrip('.')}. {advice}") from None


def checked_recipe(data: Any, name: str, advice: str) -> Recipe:
    """Convert `data`, which has the types of RecipeFields, to a Recipe. Raises UserError for wrong values.

    name    names of the file and of the field, for error messages
    advice  last sentence of an error message
    """
    schedule = data["schedule"]
    if isinstance(schedule, dict):
        fields: type[Struct] = PlateauFields
        if "warmup_epochs" in schedule:
            fields = PolynomialFields if "power" in schedule else CosineFields
        convert(fields, schedule, f"{name}.schedule", advice)
    try:
        recipe = recipe_from_json(data)
    except ValueError as error:
        raise UserError(f"{name}: {str(error).rstrip('.')}. {advice}") from None
    missing = [field for field in recipe_fields() if field not in recipe.sources]
    if missing:
        raise UserError(f"{name}.sources has no {missing[0]}, expected a source for each field of the recipe. {advice}")
    return recipe


def check_identity_fields(
    identity: IdentityFields, architecture: Architecture, recipe: Recipe, classes: int, name: str, advice: str
) -> None:
    """Raise UserError if the identity in a file differs from the architecture, recipe or classes in the same file."""
    numbers = {field: value for field, value in architecture_values(architecture).items() if field != "name"}
    expected = {
        "model": architecture.name,
        "recipe": recipe.name,
        "classes": classes,
        "model_numbers": as_json(numbers),
        "recipe_numbers": recipe_values(recipe),
    }
    found = {field: getattr(identity, field) for field in expected}
    differing = next(differing_leaves("identity", found, expected), None)
    if differing is not None:
        raise UserError(
            f"{name}: {differing.name} is {shown(differing.there)}, expected {shown(differing.here)}, as in the other "
            f"fields of this file. {advice}"
        )


def check_network(architecture: Architecture, recipe: Recipe, classes: int, name: str, advice: str) -> None:
    """Raise UserError if a network has more than MAX_PARAMETERS parameters. Allocates no memory for the network."""
    total = 0
    for shape in parameter_shapes(architecture, recipe.crossing, classes).values():
        product = 1
        for size in shape:
            product *= size
        total += product
    if total > MAX_PARAMETERS:
        raise UserError(f"{name}: a network of {total:,} parameters, expected at most {MAX_PARAMETERS:,}. {advice}")


assert set(LAYERS) == set(Layer.__args__)  # type: ignore[attr-defined]  # typing.Literal has this attribute
