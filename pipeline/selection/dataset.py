"""Random access to the decoded records of a split, in any process: a data set for torch's DataLoader."""

from __future__ import annotations

import weakref
from operator import index as whole_number
from pathlib import Path
from typing import NamedTuple, Self, SupportsIndex

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from pipeline.records import Records
from prep.store.extra import Value
from prep.store.manifest import Store


class StoredRecord(NamedTuple):
    """One record of a store, decoded."""

    image: npt.NDArray[np.uint8]
    """RGB, (height, width, 3): the whole stored image, even if the image is not square."""
    label: int
    """Index into the names of the classes."""
    key: str
    """LMDB key of the record: 8 digits, unique in the split."""
    source: str
    """Path of the input file, relative to the input folder of the split. Empty if the record has no path."""
    extra: dict[str, Value]
    """The extra fields of the record, by name: int, float, vector as float32 (d,), or str."""


class RecordDataset(Dataset[StoredRecord]):
    """The records of one split, in the order of the store. `dataset[i]` decodes record i.

    The data set can be pickled, and can be used in forked and spawned processes and in several threads. The checksum of
    each record is verified. The files of the store are opened when they are first used. `close`, a `with` statement or
    the deletion of the data set closes the files.
    """

    def __init__(self, store: Store | str | Path, split: str = "train") -> None:
        """`store` is an open store, or the path of its folder.

        Raises StoreError for a store that is missing, damaged or of another schema version, and for a split that the
        store lacks.
        """
        self.store = store if isinstance(store, Store) else Store.open(store)
        self.split = split
        self._records = Records(self.store, split, check=True)
        weakref.finalize(self, self._records.close).atexit = False

    def __reduce__(self) -> tuple[type[Self], tuple[Store, str]]:
        """Let a pickled copy, for example in a spawned process, open the files again."""
        return type(self), (self.store, self.split)

    def __len__(self) -> int:
        """Return the number of records in the split."""
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> StoredRecord:
        """Decode one record. A negative index counts from the end, as for a list.

        Raises IndexError for a record that the split does not have, and StoreError for a damaged record. The StoreError
        names the location of the record.
        """
        number, count = whole_number(index), len(self)
        if not -count <= number < count:
            raise IndexError(f"record {number}: split {self.split} of {self.store.root} has {count:,} records")
        number %= count
        image, label = self._records.pixels(number), self._records.label(number)
        extra: dict[str, Value] = {}
        if self._records.extra_fields:
            columns = self._records.extra(np.array([number]))
            extra = {name: columns[name].value(0) for name in sorted(columns)}
        return StoredRecord(image, label, self._records.key(number), self._records.source(number), extra)

    def close(self) -> None:
        """Close the files. Records that were read before stay valid. A later access opens the files again."""
        self._records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
