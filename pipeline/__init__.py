"""Streams the images of a store in augmented batches, on a GPU or a CPU.

    from pipeline import train_loader, eval_loader

Importing a loader from `pipeline` loads torch. `import pipeline` alone does not load torch, so `alexstream --help`
stays fast. DALI is loaded only by a loader whose engine uses DALI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.augment import Augmentation
    from pipeline.evaluation_loader import EvalLoader, eval_loader
    from pipeline.loader import TrainLoader, train_loader
    from pipeline.loader_base import WaitTimes
    from pipeline.selection.dataset import RecordDataset, StoredRecord
    from pipeline.selection.fields import Batch, FieldBatch
    from prep.console import UserError
    from prep.store.manifest import ChannelStats, StoreError

__all__ = [
    "Augmentation",
    "Batch",
    "ChannelStats",
    "EvalLoader",
    "FieldBatch",
    "RecordDataset",
    "StoreError",
    "StoredRecord",
    "TrainLoader",
    "UserError",
    "WaitTimes",
    "eval_loader",
    "train_loader",
]

_MODULES = {
    "Augmentation": "pipeline.augment",
    "Batch": "pipeline.selection.fields",
    "ChannelStats": "prep.store.manifest",
    "EvalLoader": "pipeline.evaluation_loader",
    "FieldBatch": "pipeline.selection.fields",
    "RecordDataset": "pipeline.selection.dataset",
    "StoreError": "prep.store.manifest",
    "StoredRecord": "pipeline.selection.dataset",
    "TrainLoader": "pipeline.loader",
    "UserError": "prep.console",
    "WaitTimes": "pipeline.loader_base",
    "eval_loader": "pipeline.evaluation_loader",
    "train_loader": "pipeline.loader",
}


def __getattr__(name: str) -> Any:
    """Import a public name only when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
