"""Models of status.json, ensemble.json and ablation.json, and of the JSON text `about` in a .npz file of probabilities.

Unknown fields are ignored, but are refused in ensemble.json, because its fields are the identity of the ensemble.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from prep.schema import Text
from train.formats.fields import IdentityFields, Names, Precision, Seed, Share, Step

MAX_BYTES = 64 << 20  # largest size of each of these files
MAX_MEMBERS = 1000  # largest number of members of an ensemble, as for --members


class StatusFile(Struct, frozen=True):
    """The content of status.json: whether a process trains the run, or how the training ended."""

    state: Literal["training", "finished", "stopped", "failed"]
    said: Annotated[str, Meta(max_length=1_000_000)]
    step: Step
    process: Annotated[int, Meta(ge=0, le=2**31)]
    host: Text
    unix_time_s: Annotated[float, Meta(ge=0, le=1e12)]


class EnsembleFile(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ensemble.json."""

    members: Annotated[int, Meta(ge=1, le=MAX_MEMBERS)]
    seed: Seed
    stream_seed: Seed


class AblationFile(Struct, frozen=True):
    """The content of ablation.json: the errors of a run of an ablation, which are null if the training diverged."""

    identity: IdentityFields
    steps: Step
    top1_error: Share | None
    top5_error: Share | None


class PredictionsAbout(Struct, frozen=True):
    """The text `about` in a .npz file of class probabilities. For an average of runs, `run` and `step` are lists."""

    run: Text | list[Text]
    step: Step | list[Step]
    checkpoint: Text
    split: Text
    split_fingerprint: Text
    views: Literal[1, 10, "dense"] | None
    precision: Precision | None
    classes: Names
