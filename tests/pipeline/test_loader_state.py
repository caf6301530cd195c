"""A stream resumes from a saved state, bit for bit, in a new process or with another world size.

A loader refuses the state of another stream.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.augment import Augmentation
from pipeline.loader import STREAM_VERSION, Batch, eval_loader, train_loader
from prep.console import UserError, WrongArgument
from prep.store.manifest import ChannelStats, Store
from tests.pipeline.augment_formula import stored_squares
from tests.pipeline.streaming import batches_equal, concatenate_ranks, take_batches

# Numbers of batches that are served before the state is saved. An epoch has three batches.
POSITIONS = [0, 1, 2, 3, 4, 7]


def test_a_state_resumes_bit_for_bit_in_a_new_process(numbered_store: Path, tmp_path: Path) -> None:
    """States are taken before the first batch, within an epoch, at the end of an epoch, and in later epochs."""
    with train_loader(numbered_store, 10, seed=2**63) as loader:
        states = [loader.state_dict()]
        served = []
        for batch in (batch for _ in range(4) for batch in loader):
            served.append(batch)
            states.append(loader.state_dict())
    (tmp_path / "states.json").write_text(json.dumps([states[position] for position in POSITIONS]))
    script = (
        "import itertools, json, sys, torch\n"
        "from pipeline.loader import train_loader\n"
        "for state in json.load(open(sys.argv[2] + '/states.json')):\n"
        "    with train_loader(sys.argv[1], 10, seed=2**63) as loader:\n"
        "        loader.load_state_dict(state)\n"
        "        batches = [tuple(b) for _ in range(2) for b in loader]\n"
        "        position = 3 * state['epoch'] + state['step']\n"
        "        torch.save((batches, loader.state_dict()), f'{sys.argv[2]}/{position}.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(numbered_store), str(tmp_path)], check=True, timeout=120)
    for position in POSITIONS:
        batches, state = torch.load(tmp_path / f"{position}.pt")
        assert len(batches) == 6 - position % 3
        assert batches_equal([Batch(*batch) for batch in batches], served[position : position + len(batches)])
        assert state == states[position + len(batches)]


def test_a_state_is_small_and_survives_json(numbered_store: Path) -> None:
    with train_loader(
        numbered_store, 10, seed=2**64 - 1, augmentation=Augmentation(mean="image", strength=0.3)
    ) as loader:
        take_batches(loader, 4)
        state = loader.state_dict()
        assert (state["epoch"], state["step"]) == (1, 1)
        text = json.dumps(state)
        assert json.loads(text) == state and len(text) < 1000
        loader.load_state_dict(json.loads(text))
        assert loader.state_dict() == state


def test_a_state_may_be_loaded_while_iterating(numbered_store: Path) -> None:
    with train_loader(numbered_store, 6, seed=3) as loader:
        batches = take_batches(loader, 8)
    with train_loader(numbered_store, 6, seed=3) as loader:
        start = loader.state_dict()
        for count, _ in enumerate(loader, 1):
            if count == 2:
                middle = loader.state_dict()
            if count == 4:
                break
        loader.load_state_dict(middle)
        assert batches_equal(list(loader), batches[2:6])
        loader.load_state_dict(start)
        assert batches_equal(take_batches(loader, 8), batches)


def test_an_iterator_continues_from_a_state_that_was_loaded_after_it_was_made(numbered_store: Path) -> None:
    with train_loader(numbered_store, 6, seed=3) as loader:
        batches = take_batches(loader, 6)
    with train_loader(numbered_store, 6, seed=3) as loader:
        start = loader.state_dict()
        iterator = iter(loader)
        next(iterator), next(iterator)
        loader.load_state_dict(start)
        assert batches_equal([next(iterator)], batches[:1])


def test_iteration_may_stop_within_an_epoch_and_continue_there(numbered_store: Path) -> None:
    with train_loader(numbered_store, 6, seed=3) as loader:
        batches = take_batches(loader, 9)
    with train_loader(numbered_store, 6, seed=3) as loader:
        assert batches_equal(list(itertools.islice(loader, 2)), batches[:2])
        assert batches_equal(list(loader), batches[2:6])
        assert batches_equal(list(itertools.islice(loader, 3)), batches[6:9])


@pytest.mark.parametrize(("epoch", "step"), [(0, 3), (2, 0), (0, 0)])
def test_seek_continues_at_any_batch(numbered_store: Path, epoch: int, step: int) -> None:
    with train_loader(numbered_store, 6, seed=3) as loader:
        batches = take_batches(loader, 15)
        loader.seek(epoch, step)
        assert batches_equal(take_batches(loader, 3), batches[6 * epoch + step :][:3])


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, 6), (0, -1)])
def test_seek_refuses_a_step_that_an_epoch_does_not_have(numbered_store: Path, epoch: int, step: int) -> None:
    with train_loader(numbered_store, 6) as loader, pytest.raises(UserError, match="a step of 0 to 5"):
        loader.seek(epoch, step)


IDENTITY = {
    "graph_version": STREAM_VERSION + 1,
    "store_fingerprint": "0" * 64,
    "split": "val",
    "seed": 3,
    "augmentation": {},
    "layout": "NHWC",
    "dtype": "float16",
}


def test_a_state_holds_the_position_and_the_identity_of_its_stream(numbered_store: Path) -> None:
    with train_loader(numbered_store, 10) as loader:
        assert set(loader.state_dict()) == {*IDENTITY, "batch_size", "world_size", "shard", "epoch", "step"}


@pytest.mark.parametrize(("name", "other"), IDENTITY.items())
@pytest.mark.parametrize("step", [0, 2])
def test_a_state_of_another_stream_is_refused_with_the_name_of_what_differs(
    numbered_store: Path, name: str, other: object, step: int
) -> None:
    with train_loader(numbered_store, 10, seed=2) as loader:
        for state in ({**loader.state_dict(), "step": step, name: other}, {**loader.state_dict(), "step": step}):
            if state[name] != other:
                del state[name]
            with pytest.raises(UserError, match=f"another {name.replace('_', ' ')}"):
                loader.load_state_dict(state)
            assert (loader.epoch, loader.step) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"layout": "NHWC"},
        {"dtype": "bfloat16"},
        {"augmentation": Augmentation(shared_by=2)},
        {"split": "val"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_states_of_loaders_with_different_settings_are_not_exchangeable(
    numbered_store: Path, options: dict
) -> None:
    with train_loader(numbered_store, 10) as loader, train_loader(numbered_store, 10, **options) as other:
        with pytest.raises(UserError, match="stream state with another"):
            loader.load_state_dict(other.state_dict())
        with pytest.raises(UserError, match="stream state with another"):
            other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("own", "other_sizes", "changed"),
    [((10, 1), (11, 1), "batch size"), ((4, 3), (4, 2), "world size"), ((6, 1), (6, 2), "world size")],
)
def test_the_records_of_a_step_may_change_only_between_epochs(
    numbered_store: Path, own: tuple[int, int], other_sizes: tuple[int, int], changed: str
) -> None:
    with (
        train_loader(numbered_store, own[0], world_size=own[1]) as loader,
        train_loader(numbered_store, other_sizes[0], world_size=other_sizes[1]) as other,
    ):
        next(iter(other))
        with pytest.raises(UserError, match=f"another {changed} within an epoch"):
            loader.load_state_dict(other.state_dict())
        other.seek(3)
        loader.load_state_dict(other.state_dict())
        assert (loader.epoch, loader.step) == (3, 0)


# ---- with another world size


@pytest.mark.parametrize("batches", [2, 4, 7])
def test_two_ranks_with_half_the_batch_size_resume_the_state_of_one_loader(numbered_store: Path, batches: int) -> None:
    with train_loader(numbered_store, 8, seed=8) as loader:
        take_batches(loader, batches)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = take_batches(loader, 5)
    ranks = []
    for rank in range(2):
        with train_loader(numbered_store, 4, seed=8, shard=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            ranks.append(take_batches(loader, 5))
            after = loader.state_dict()
    assert batches_equal(concatenate_ranks(ranks), expected)
    with train_loader(numbered_store, 8, seed=8) as loader:
        loader.load_state_dict(after)
        loader.load_state_dict({**after, "step": 0, "epoch": 0})
        take_batches(loader, batches)
        assert batches_equal(take_batches(loader, 5), expected)


def test_between_epochs_two_ranks_with_the_same_batch_size_resume_the_state_of_one_loader(numbered_store: Path) -> None:
    with train_loader(numbered_store, 8, seed=8) as loader:
        list(loader)
        state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0)
    with train_loader(numbered_store, 16, seed=8) as loader:
        loader.load_state_dict(state)
        expected = list(loader)
    ranks = []
    for rank in range(2):
        with train_loader(numbered_store, 8, seed=8, shard=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            ranks.append(list(loader))
    assert len(expected) == 2 and batches_equal(concatenate_ranks(ranks), expected)


def test_a_loop_after_a_break_goes_on_and_set_epoch_begins_an_epoch(numbered_store: Path) -> None:
    with train_loader(numbered_store, 10, seed=3, threads=1) as loader:
        epochs = [list(loader) for _ in range(2)]
        loader.set_epoch(0)
        first = next(iter(loader))
        assert batches_equal([first, *loader], epochs[0])  # the second loop continues after the first batch
        assert (loader.epoch, loader.step) == (1, 0)
        loader.set_epoch(1)  # changes nothing, because the loader is already at the beginning of epoch 1
        next(iter(loader))
        loader.set_epoch(1)  # the loader begins epoch 1 again
        assert batches_equal(list(loader), epochs[1])
        loader.set_epoch(0)
        assert batches_equal(list(loader), epochs[0])
        for epoch in (-1, 1.5, "1", None):
            with pytest.raises(WrongArgument, match=f"epoch {epoch}, step 0: expected whole numbers"):
                loader.set_epoch(epoch)  # type: ignore[arg-type]
        loader.set_epoch(np.int64(1))
        assert type(loader.epoch) is int and batches_equal(list(loader), epochs[1])


def test_dtype_and_device_are_names_or_objects_of_torch(numbered_store: Path) -> None:
    batches = {}
    for dtype, device in (("float16", "cpu"), (torch.float16, torch.device("cpu"))):
        with train_loader(numbered_store, 5, device, dtype=dtype, threads=1) as loader:
            batches[dtype], state = next(iter(loader)), loader.state_dict()
            assert state["dtype"] == "float16" and json.loads(json.dumps(state)) == state
    assert batches_equal([batches["float16"]], [batches[torch.float16]])
    for make in (train_loader, eval_loader):
        with pytest.raises(UserError, match=r"dtype 'float64'.*Did you mean "):
            make(numbered_store, 5, dtype=torch.float64)


def test_channel_stats_are_mean_and_std_of_the_training_pixels(stores: dict[str, Path]) -> None:
    """A store of PPM records holds exactly the pixels whose moments the build computed."""
    with train_loader(stores["ppm"], 5, threads=1) as loader:
        levels, unit = loader.channel_stats(), loader.channel_stats(max_value=1)
    squares = stored_squares(Store.open(stores["ppm"]), "train")
    pixels = np.concatenate([square.reshape(-1, 3) for _, square in squares])
    assert np.allclose(levels.mean, pixels.mean(0)) and np.allclose(levels.std, pixels.std(0))
    assert np.allclose(unit.mean, pixels.mean(0) / 255) and np.allclose(unit.std, pixels.std(0) / 255)


IMAGENET = ChannelStats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1)  # torchvision's mean and std of ImageNet


@pytest.mark.parametrize(("layout", "dtype"), [("NCHW", "float32"), ("NHWC", torch.float16)])
def test_normalize_gives_pixels_minus_mean_divided_by_std(
    stores: dict[str, Path], layout: str, dtype: str | torch.dtype
) -> None:
    """ToTensor and Normalize of torchvision compute (pixel / 255 − mean) / std."""
    quiet = Augmentation(colour="off")
    plain = {"layout": layout, "dtype": dtype, "threads": 1, "augmentation": replace(quiet, mean="none")}
    for make, batch_size in ((eval_loader, 12), (train_loader, 10)):
        with (
            make(stores["ppm"], batch_size, **plain) as pixels,
            make(stores["ppm"], batch_size, **{**plain, "augmentation": quiet}, normalize=IMAGENET) as normalized,
        ):
            original, images = (next(iter(loader)).images.double() for loader in (pixels, normalized))
        shape = (3, 1, 1) if layout == "NCHW" else (3,)
        mean, std = (torch.tensor(numbers).double().view(shape) for numbers in IMAGENET[:2])
        assert (images - (original / 255 - mean) / std).abs().max() < (1e-5 if dtype == "float32" else 3e-3)


def test_the_normalization_is_part_of_the_state(numbered_store: Path) -> None:
    with train_loader(numbered_store, 5, threads=1, normalize=IMAGENET) as loader:
        state = json.loads(json.dumps(loader.state_dict()))
        loader.load_state_dict(state)
        own = loader.channel_stats()
    for other in (None, own):
        with train_loader(numbered_store, 5, threads=1, normalize=other) as loader:
            with pytest.raises(UserError, match="another normalize"):
                loader.load_state_dict(state)
            del state["normalize"]
            assert other is not None or loader.load_state_dict(state) is None
            state["normalize"] = [*map(list, IMAGENET[:2]), 1]


@pytest.mark.parametrize(
    ("stats", "augmentation"),
    [
        (IMAGENET._replace(std=(0.2, 0.0, 0.2)), None),
        (IMAGENET._replace(mean=(0.5,)), None),
        (IMAGENET._replace(max_value=0), None),
        (IMAGENET._replace(mean=(0.5, float("nan"), 0.5)), None),
        (IMAGENET._replace(std="abc"), None),
        (True, None),
        ("imagenet", None),
        ((IMAGENET.mean, IMAGENET.std), None),
        (IMAGENET, Augmentation(mean="image")),
        (IMAGENET, Augmentation(divisor=2.0)),
    ],
)
def test_a_normalization_that_is_not_possible_is_refused(
    numbered_store: Path, stats: ChannelStats, augmentation: Augmentation | None
) -> None:
    for make in (train_loader, eval_loader):
        with pytest.raises(WrongArgument, match="normalize"):
            make(numbered_store, 5, normalize=stats, augmentation=augmentation)
