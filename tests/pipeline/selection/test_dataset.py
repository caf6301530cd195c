"""Random access to records: contents, len(), damaged records, and worker processes of torch's DataLoader."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pipeline import RecordDataset, StoredRecord, StoreError, eval_loader, train_loader
from prep.store.manifest import Store
from tests.conftest import VAL_RECORDS
from tests.pipeline.streaming import stored_labels


@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_record_is_what_lmdb_protobuf_and_pillow_read(
    stores: dict[str, Path], records_of: Callable[[Path, str], list[tuple[bytes, Any]]], kind: str, split: str
) -> None:
    """In the stores whose kind ends with `-whole`, the images are not square."""
    expected = records_of(stores[kind], split)
    with RecordDataset(stores[kind], split) as dataset:
        assert len(dataset) == len(expected)
        for number, (key, datum) in enumerate(expected):
            record = dataset[number]
            pixels = np.asarray(Image.open(io.BytesIO(datum.data)))
            assert record.image.dtype == np.uint8 and np.array_equal(record.image, pixels)
            assert record.image.shape == (datum.height, datum.width, 3)
            assert record[1:] == (datum.label, key.decode(), datum.source.decode(), {})


def test_numbers_are_those_of_a_list(numbered_store: Path) -> None:
    labels = stored_labels(numbered_store, "val")
    with eval_loader(numbered_store, 5, threads=1) as loader:
        dataset = loader.dataset
        assert dataset is loader.dataset
        for number in (0, 7, VAL_RECORDS - 1, -1, -VAL_RECORDS, np.int64(3), torch.tensor(4)):
            assert dataset[number].label == labels[int(number)]
        for number in (VAL_RECORDS, -VAL_RECORDS - 1):
            with pytest.raises(IndexError, match=rf"record {number}: split val of .* has 23 records"):
                dataset[number]
        with pytest.raises(TypeError):
            dataset["0"]  # type: ignore[index]
    assert [record.label for record in dataset] == labels  # type: ignore[attr-defined]  # the loader is closed


def test_images_of_a_record_are_separate_and_outlive_the_data_set(stores: dict[str, Path]) -> None:
    for kind in ("jpeg", "ppm"):
        dataset = RecordDataset(stores[kind])
        first, second = dataset[2].image, dataset[2].image
        expected = first.copy()
        first[:] = 0
        dataset.close()
        assert np.array_equal(second, expected) and np.array_equal(dataset[2].image, expected)


@pytest.mark.parametrize("kind", ["jpeg", "ppm"])
def test_a_damaged_record_is_an_error_with_its_location(stores: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """One bit of a pixel is flipped, which only the checksum shows. The other records can be read."""
    store = Path(shutil.copytree(stores[kind], tmp_path / "store"))
    (folder,) = Store.open(store).shard_paths("val")
    with lmdb.open(folder, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        key, value = list(txn.cursor())[3]
        txn.put(key, value[:2000] + bytes([value[2000] ^ 1]) + value[2001:])
    dataset = RecordDataset(store, "val")
    with pytest.raises(StoreError, match=rf"val/00000, key 00000003, source .*alexprep verify --store {store}"):
        dataset[3]
    assert dataset[4].key == "00000004"


def test_a_data_loader_of_torch_reads_the_records_in_another_process(store: Path) -> None:
    """A spawned process gets a pickled copy of the data set."""
    with train_loader(store, 4, threads=1) as loader:
        dataset = loader.dataset
        expected = dataset[5]
        copy = pickle.loads(pickle.dumps(dataset))
        assert np.array_equal(copy[5].image, expected.image) and copy[5][1:] == expected[1:]
        batches = list(DataLoader(dataset, 10, num_workers=1, multiprocessing_context="fork"))
    assert [type(batch) for batch in batches] == [StoredRecord] * 3
    assert torch.equal(batches[0].image[5], torch.from_numpy(expected.image))
    assert torch.cat([batch.label for batch in batches]).tolist() == stored_labels(store, "train")
    assert batches[0].key[5] == expected.key and batches[0].source[5] == expected.source


def test_a_store_or_split_that_is_missing_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such store"):
        RecordDataset(tmp_path / "none")
    with pytest.raises(StoreError, match="no split test"):
        RecordDataset(store, "test")
