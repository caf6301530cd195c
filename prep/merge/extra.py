"""Extra fields in a merge: joins the columns of the source stores, in the record order of the new store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prep.build.plan import BuildPlan
from prep.console import UserError
from prep.extra.columns import type_text
from prep.inputs.formats.shards import unpack_location
from prep.store.extra import Column, StoredColumns, joined
from prep.store.manifest import SPLITS, Store


def refuse_other_fields(stores: Sequence[Store]) -> None:
    """Raise UserError if a split does not have the same extra fields in all stores that have the split."""
    for split in SPLITS:
        having = [store for store in stores if split in store.splits]
        texts = [_fields_text(store, split) for store in having]
        for store, text in zip(having, texts, strict=True):
            if text != texts[0]:
                raise UserError(
                    f"{store.root}: the split {split} has the extra fields {text}, {having[0].root} has {texts[0]}. "
                    "Add the missing fields with alexprep build-lmdb --extra, or build one of the stores again."
                )


def merged_columns(stores: Sequence[Store], split: str, plan: BuildPlan) -> dict[str, Column]:
    """Return the columns of a split of the new store. The inputs of `plan` are the records of `stores`, shard by shard.

    Raises StoreError if a column is damaged.
    """
    if not stores[0].split(split).extra:
        return {}
    shards = [shard for store in stores for shard in store.split(split).shards]
    starts = np.cumsum([0, *(shard.records for shard in shards)])
    locations = (unpack_location(plan.source.inputs[index].location) for index in plan.permutation.tolist())
    rows = np.fromiter((starts[shard] + record for shard, record in locations), np.int64, len(plan.source.inputs))
    parts = []
    for store in stores:
        columns = StoredColumns(store, split)
        try:
            parts.append(columns.take(np.arange(store.split(split).records)))
        finally:
            columns.close()
    return {name: joined([part[name] for part in parts]).take(rows) for name in parts[0]}


def _fields_text(store: Store, split: str) -> str:
    fields = sorted(store.split(split).extra.items())
    return ", ".join(f"{name} ({type_text(field)})" for name, field in fields) or "none"
