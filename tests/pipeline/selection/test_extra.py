"""Extra fields in batches: their values equal the values that the CSV file has for the path of each photograph."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline import Augmentation, RecordDataset, eval_loader, train_loader
from pipeline.selection.fields import FieldBatch
from pipeline.windows import WindowMaker, WindowRequest
from prep.console import WrongArgument
from prep.store import kernels
from prep.store.manifest import Store, StoreError
from tests.prep.extra.tables import FIELDS, build_with, make_photos, write_table

Values = dict[str, dict[str, Any]]
OPTIONS: dict[str, Any] = {
    "augmentation": Augmentation(size_px=32, mean="channel"),
    "threads": 1,
    "fields": ("images", "keys", "index", "extra"),
}
DTYPES = {"age": torch.int64, "weight": torch.float32, "box": torch.float32}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Values]]:
    """A store with the splits train (70 records) and val (20 records), and for each split the values of its records."""
    folder = tmp_path_factory.mktemp("extra")
    values = {}
    for split, count in (("train", 70), ("val", 20)):
        photos = make_photos(folder / split, count)
        values[split] = write_table(folder / f"{split}.csv", photos, seed=count)
        build_with(photos, folder / "store", [f"{name}={folder / split}.csv" for name in FIELDS], split)
    return folder / "store", values


def assert_values(batch: FieldBatch, values: Values) -> None:
    """Assert that the extra fields of a batch have the values of the photographs that its field `keys` names."""
    keys, extra = batch["keys"], batch["extra"]
    assert list(extra) == sorted(FIELDS)
    assert extra["caption"] == [values[key]["caption"] for key in keys]
    for name, dtype in DTYPES.items():
        tensor = extra[name]
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == dtype
        assert np.array_equal(tensor.numpy(), np.array([values[key][name] for key in keys]))


def test_batches_of_both_loaders_have_the_values_of_their_keys(built: tuple[Path, dict[str, Values]]) -> None:
    store, values = built
    with train_loader(store, 8, **OPTIONS) as loader, train_loader(store, 8, **{**OPTIONS, "fields": None}) as plain:
        assert loader.state_dict() == plain.state_dict()
        batches = list(loader)
    train = {key for batch in batches for key in batch["keys"]}
    assert len(train) == 64
    with eval_loader(store, 8, **OPTIONS) as loader:
        val = list(loader)
    for batch in batches:
        assert_values(batch, values["train"])
    assert sum(len(batch["keys"]) for batch in val) == 20
    for batch in val:
        assert_values(batch, values["val"])


@pytest.mark.parametrize(
    "options",
    [
        {"views": 3},
        {"subset": np.arange(40, 60)},
        {"weights": "balanced"},
        {"shard": 1, "world_size": 2},
        {"views": 2, "weights": np.arange(70.0), "subset": np.arange(5, 70)},
    ],
    ids=str,
)
def test_selections_of_records(built: tuple[Path, dict[str, Values]], options: dict[str, Any]) -> None:
    store, values = built
    own = values["train"]
    with train_loader(store, 6, **OPTIONS, **options) as loader:
        batches = list(loader)
        resumed = loader.state_dict()
    for batch in batches:
        assert len(batch["keys"]) == 6 and batch["index"].shape == (6,)
        assert_values(batch, own)
    with train_loader(store, 6, **{**OPTIONS, "fields": ("extra",)}, **options) as loader:
        loader.load_state_dict({**resumed, "epoch": 0, "step": 1})
        again = next(iter(loader))
    assert list(again) == ["extra"]
    assert again["extra"]["caption"] == batches[1]["extra"]["caption"]


def test_evaluation_with_ten_views_and_a_subset(built: tuple[Path, dict[str, Values]]) -> None:
    store, values = built
    with eval_loader(store, 4, views=10, subset=[3, 17, 5, 0, 11], **OPTIONS) as loader:
        batches = list(loader)
    assert [len(batch["keys"]) for batch in batches] == [4, 1]
    for batch in batches:
        assert_values(batch, values["val"])


def test_mixed_stores(built: tuple[Path, dict[str, Values]], tmp_path: Path) -> None:
    store, values = built
    photos = make_photos(tmp_path / "train", 30)
    more = write_table(tmp_path / "more.csv", photos, seed=9)
    other = tmp_path / "other"
    build_with(photos, other, [f"{name}={tmp_path / 'more.csv'}" for name in FIELDS[:3]])
    stores = [(store, 0.5), (other, 0.5)]
    with pytest.raises(WrongArgument, match=r"extra fields age .* caption .*, .*other has age"):
        train_loader(stores=stores, batch_size=10, **OPTIONS)
    build_with(photos, other, [f"caption={tmp_path / 'more.csv'}"])
    both = (values["train"], more)
    with train_loader(stores=stores, batch_size=10, **OPTIONS) as loader:
        for batch in loader:
            for position, (part, _) in enumerate(batch["index"].tolist()):
                row = both[part][batch["keys"][position]]
                assert batch["extra"]["caption"][position] == row["caption"]
                assert all(np.array_equal(batch["extra"][n][position], row[n]) for n in DTYPES)  # type: ignore[arg-type]


def test_single_records_have_the_values_of_their_source(built: tuple[Path, dict[str, Values]]) -> None:
    store, values = built
    own = values["train"]
    with RecordDataset(store) as dataset, pickle.loads(pickle.dumps(dataset)) as copy:
        for number in (0, 17, -1):
            record = copy[number]
            expected = own[record.source]
            assert list(record.extra) == sorted(FIELDS)
            assert [type(record.extra[name]) for name in FIELDS] == [int, float, np.ndarray, str]
            assert all(np.array_equal(record.extra[name], expected[name]) for name in FIELDS)
        batch = next(iter(DataLoader(dataset, 4)))
        assert batch.extra["box"].shape == (4, 3) and batch.extra["age"].dtype == torch.int64


def test_a_service_sends_the_values_of_each_batch_of_a_block(built: tuple[Path, dict[str, Values]]) -> None:
    """One call of WindowMaker makes the windows of three requests, as in a worker of a service."""
    store, values = built
    opened, rng = Store.open(store), np.random.default_rng(2)
    numbers = rng.integers(0, 70, 12)
    fields = opened.split("train").extra
    requests = [
        WindowRequest("train", part, np.zeros((4, 2), np.int32), 32, True, extra_fields=fields)
        for part in np.split(numbers, 3)
    ]
    maker = WindowMaker(opened, 1)
    try:
        windows = maker.make(WindowRequest.joined(requests))
    finally:
        maker.close()
    own = values["train"]
    for k, part in enumerate(np.split(numbers, 3)):
        records = windows.part(slice(4 * k, 4 * k + 4)).records(part)
        for row, source in enumerate(records.sources):
            assert all(np.array_equal(records.extra[name].value(row), own[source][name]) for name in FIELDS)


def test_a_store_without_fields_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(WrongArgument, match=r"has no extra fields\. Add a field with: alexprep build-lmdb"):
        train_loader(stores["ppm"], 4, fields=("images", "extra"))
    with pytest.raises(WrongArgument, match="split val of"):
        eval_loader(stores["ppm"], 4, fields=("extra",))
    assert RecordDataset(stores["ppm"])[0].extra == {}


def _change(path: Path, at: int, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= byte
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _change(folder / "age.npy", -5, 8),
        lambda folder: _change(folder / "caption.offsets.npy", -70, 1),
        lambda folder: (folder / "box.npy").write_bytes((folder / "box.npy").read_bytes()[:-4]),
        lambda folder: (folder / "weight.npy").unlink(),
    ],
    ids=range(4),
)
def test_a_damaged_column_is_an_error(
    built: tuple[Path, dict[str, Values]], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    shutil.copytree(built[0], tmp_path / "store")
    damage(tmp_path / "store/train/extra")
    with train_loader(tmp_path / "store", 4, **OPTIONS) as loader, pytest.raises(StoreError) as error:
        next(iter(loader))
    assert "train/extra/" in str(error.value) and len(str(error.value).splitlines()) == 1
    with train_loader(tmp_path / "store", 4, **{**OPTIONS, "fields": ("keys",)}) as loader:
        next(iter(loader))  # this loader does not read the columns of extra fields


@pytest.mark.skipif(kernels.native is None, reason="needs the C kernel: without it, columns are read into memory")
def test_a_column_that_is_truncated_while_it_is_served(built: tuple[Path, dict[str, Values]], tmp_path: Path) -> None:
    shutil.copytree(built[0], tmp_path / "store")
    path = tmp_path / "store/train/extra/box.npy"
    with train_loader(tmp_path / "store", 4, **OPTIONS) as loader:
        iterator = iter(loader)
        next(iterator)
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(StoreError, match=r"box\.npy: truncated or unreadable"):
            for _ in range(40):
                next(iterator)
