"""Reads and checks run.json: the settings, recipe, architecture, store and length of a run.

Unknown fields are kept, because other versions of this program write other settings, which `alextrain compare` and
`report` show. Unknown fields are refused in the architecture, the recipe, the store's settings and the store's colours,
because such fields could change the network or its inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from prep.console import UserError
from prep.schema import Count, Digest, Text, convert, parse_json, read_regular
from prep.schema.fields import MAX_INT
from prep.store.agreement import inconsistent_statistics
from prep.store.manifest import ColorStats, Settings
from train.config.choices import MAX_THREADS
from train.formats.fields import (
    Ancestry,
    ArchitectureFields,
    Device,
    EnvironmentFields,
    IdentityFields,
    Line,
    Names,
    PathText,
    Positive,
    Precision,
    RecipeFields,
    Seed,
    Step,
    check_identity_fields,
    check_network,
    checked_architecture,
    checked_recipe,
)

MAX_BYTES = 256 << 20  # largest size of run.json; for 1,000 classes the file has 40 KB
OneOrMore = Annotated[int, Meta(ge=1, le=MAX_INT)]
ADVICE = "Move the file away, and repeat the alextrain run command with its options to write the file again."


class SettingsFields(Struct, frozen=True):
    """The settings of a run (RunConfig). Version 0.1.0 wrote only the fields without a default."""

    store: PathText
    batch_size: Positive
    seed: Seed
    precision: Precision
    accumulate: Positive
    run_dir: PathText
    devices: tuple[Device, Device]
    # Earlier versions had no upper bound for these numbers. Large numbers, which mean "never" or "without end", stay
    # valid.
    epochs: OneOrMore
    steps: Count | None
    log_every: OneOrMore
    checkpoint_every: OneOrMore
    keep: OneOrMore
    threads: Annotated[int, Meta(ge=1, le=MAX_THREADS)] | None
    deterministic: bool = False
    stream_seed: Seed | None = None
    replicas: Positive = 1
    service: Text | None = None
    service_fallback: Literal["local"] | None = None
    store_absolute: PathText | None = None


class SplitFields(Struct, frozen=True):
    """The size of a split of the training store."""

    records: Positive
    bytes: Count
    label_counts: list[Count]


class StoreFields(Struct, frozen=True):
    """Metadata of the training store: the value of the key "store" in run.json."""

    fingerprint: Digest
    settings: Settings
    tools: dict[str, Line]
    splits: Annotated[dict[str, SplitFields], Meta(min_length=1)]
    colour: ColorStats


class LengthFields(Struct, frozen=True):
    """The length of a run in steps."""

    steps_per_epoch: Step
    steps: Count


class RunFile(Struct, frozen=True):
    """The content of run.json."""

    identity: IdentityFields
    settings: SettingsFields
    model: ArchitectureFields
    recipe: RecipeFields
    classes: Names
    environment: EnvironmentFields
    store: StoreFields
    length: LengthFields
    ancestry: Ancestry = []


def read_run_file(path: Path) -> dict[str, Any]:
    """Return the content of run.json: fields with the types of RunFile, and any unknown fields.

    Raises FileNotFoundError if there is no run.json. Raises UserError if the file cannot be read, if a field is
    missing, has a wrong type or is out of range, and if fields contradict each other.
    """
    content = read_regular(path, MAX_BYTES, ADVICE)
    data = parse_json(content, str(path), ADVICE)
    checked = convert(RunFile, data, str(path), ADVICE)
    architecture = checked_architecture(data["model"], f"{path}: model", ADVICE)
    recipe = checked_recipe(data["recipe"], f"{path}: recipe", ADVICE)
    classes = len(checked.classes)
    check_network(architecture, recipe, classes, f"{path}: model", ADVICE)
    check_identity_fields(checked.identity, architecture, recipe, classes, str(path), ADVICE)
    for field in ("batch_size", "accumulate", "seed", "precision"):
        setting, value = getattr(checked.settings, field), getattr(checked.identity, field)
        if setting != value:
            raise UserError(f"{path}: settings.{field} is {setting}, expected {value}, as in identity. {ADVICE}")
    wrong = next(inconsistent_statistics(checked.store.colour), "")
    if wrong:
        raise UserError(f"{path}: store.colour.{wrong}. {ADVICE}")
    for name, split in checked.store.splits.items():
        counts = split.label_counts
        if len(counts) != classes or sum(counts) != split.records:
            raise UserError(
                f"{path}: store.splits.{name}.label_counts has {len(counts):,} numbers with the sum {sum(counts):,}, "
                f"expected {classes:,} with the sum {split.records:,}. {ADVICE}"
            )
    return dict(data)
