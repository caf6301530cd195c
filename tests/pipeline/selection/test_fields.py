"""Fields of batches: their values, their types, the fields of each rank, and names that are refused."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch.utils._pytree import tree_map_only

from pipeline import eval_loader, train_loader
from pipeline.sampling import draw_params, epoch_permutation
from pipeline.selection.fields import FIELDS, EvalOptions, FieldBatch, TrainOptions
from prep.console import WrongArgument
from tests.pipeline.streaming import batches_equal, take_batches


def test_the_fields_of_training_batches(
    stores: dict[str, Path], records_of: Callable[[Path, str], list[tuple[bytes, Any]]]
) -> None:
    """The test computes the expected record numbers and draws of each step with pipeline.sampling."""
    expected = records_of(stores["ppm"], "train")
    with (
        train_loader(stores["ppm"], 4, seed=9, threads=1) as plain,
        train_loader(stores["ppm"], 4, seed=9, threads=1, fields=FIELDS) as loader,
    ):
        assert loader.state_dict() == plain.state_dict()
        batches = [batch for _ in range(2) for batch in loader]
        pairs = take_batches(plain, len(batches))
    assert batches_equal([type(pairs[0])(batch["images"], batch["labels"]) for batch in batches], pairs)
    for number, batch in enumerate(batches):
        epoch, step = divmod(number, len(batches) // 2)
        numbers = epoch_permutation(30, 9, epoch)[4 * step : 4 * step + 4]
        assert list(batch) == list(FIELDS)
        assert batch["index"].dtype == torch.int64 and batch["index"].tolist() == numbers.tolist()
        assert batch["keys"] == [expected[n][1].source.decode() for n in numbers]
        draws = draw_params(9, epoch, step, 4, 32)._asdict()
        assert batch["draws"].keys() == draws.keys()
        for name, values in draws.items():
            assert torch.equal(batch["draws"][name], torch.from_numpy(values))


def test_a_changed_field_changes_no_later_batch(numbered_store: Path) -> None:
    """The test changes the fields of five batches. When these batches are read again, they have the original values."""
    with train_loader(numbered_store, 1, threads=1, fields=("index", "draws")) as loader:
        for batch in itertools.islice(loader, 5):
            batch["index"].fill_(99)
            batch["draws"]["offset"].fill_(99)
        loader.set_epoch(0)
        again = list(itertools.islice(loader, 10))
    assert [int(batch["index"]) for batch in again] == epoch_permutation(37, 0, 0)[:10].tolist()
    assert all(int(batch["draws"]["offset"].max()) <= 32 for batch in again)


@pytest.mark.parametrize("views", [1, 10, "square"])
def test_the_fields_of_evaluation_batches_in_the_order_of_the_names(store: Path, views: int | str) -> None:
    with (
        eval_loader(store, 5, threads=1, views=views, fields=("keys", "index", "labels")) as loader,
        eval_loader(store, 5, threads=1, views=views) as plain,
    ):
        batches, labels = list(loader), [batch.labels.tolist() for batch in plain]
        records = [loader.dataset[number] for number in range(12)]
    assert [list(batch) for batch in batches] == [["keys", "index", "labels"]] * 3
    assert [batch["labels"].tolist() for batch in batches] == labels
    assert [number for batch in batches for number in batch["index"].tolist()] == list(range(12))
    assert [key for batch in batches for key in batch["keys"]] == [record.source for record in records]


def test_the_ranks_of_a_step_serve_their_parts_of_its_fields(numbered_store: Path) -> None:
    def first(**ranks: Any) -> FieldBatch:
        with train_loader(
            numbered_store, 12 // ranks.get("world_size", 1), threads=1, fields=FIELDS, **ranks
        ) as loader:
            return next(iter(loader))

    whole, parts = first(), [first(shard=rank, world_size=3) for rank in range(3)]
    for rank, part in enumerate(parts):
        own = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(part["index"], whole["index"][own]) and part["keys"] == whole["keys"][own]
        assert all(torch.equal(part["draws"][name], values[own]) for name, values in whole["draws"].items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("images", "label"), r"field 'label': expected one of images, labels, .* Did you mean labels"),
        ((), r"fields \(\): expected at least one of images"),
        ("image", r"field 'image'.* Did you mean images"),
        ((3,), r"field 3: expected one of"),
    ],
)
def test_a_name_that_is_no_field_is_refused(numbered_store: Path, fields: Any, message: str) -> None:
    with pytest.raises(WrongArgument, match=message):
        train_loader(numbered_store, 5, fields=fields)
    with pytest.raises(WrongArgument, match=r"field 'draws': .*because evaluation draws no random numbers"):
        eval_loader(numbered_store, 5, fields=("images", "draws"))


@pytest.mark.parametrize(("make", "options"), [(train_loader, TrainOptions), (eval_loader, EvalOptions)])
def test_the_types_of_the_options_are_those_of_the_function(make: Callable[..., Any], options: type) -> None:
    """The overloads of a loader function declare its keyword-only arguments in a TypedDict."""
    named = inspect.signature(make).parameters.values()
    expected = {argument.name for argument in named if argument.kind is argument.KEYWORD_ONLY} - {"fields"}
    assert set(get_type_hints(options)) == expected


def test_a_batch_is_a_dict_of_which_torch_moves_all_tensors(numbered_store: Path) -> None:
    """torch.utils._pytree rebuilds a batch from its moved tensors. The second device is torch's device "meta"."""
    with train_loader(numbered_store, 5, threads=1, fields=FIELDS) as loader:
        batch = next(iter(loader))
    moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), batch)
    assert type(moved) is dict and moved["keys"] == batch["keys"]
    for name in ("images", "labels", "index"):
        assert moved[name].device.type == "meta" and moved[name].shape == batch[name].shape
    assert {name: values.device.type for name, values in moved["draws"].items()} == dict.fromkeys(
        batch["draws"], "meta"
    )
