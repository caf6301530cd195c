"""Where a stream stands: states that go on to the bit, in a new process or another world, or are refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.augment import Augmentation
from pipeline.loader import STREAM_VERSION, Batch, train_loader
from prep.console import UserError
from tests.helpers.streaming import joined, same, take

PLACES = [0, 1, 2, 3, 4, 7]


def test_a_state_continues_to_the_bit_in_a_new_process(numbered: Path, tmp_path: Path) -> None:
    """Before the first batch, within an epoch, at its end, and in those after it; an epoch has three batches.

    The process imports pipeline.loader and nothing of ours before it.
    """
    with train_loader(numbered, 10, seed=2**63) as loader:
        states = [loader.state_dict()]
        served = []
        for batch in (batch for _ in range(4) for batch in loader):
            served.append(batch)
            states.append(loader.state_dict())
    (tmp_path / "states.json").write_text(json.dumps([states[place] for place in PLACES]))
    script = (
        "import itertools, json, sys, torch\n"
        "from pipeline.loader import train_loader\n"
        "for state in json.load(open(sys.argv[2] + '/states.json')):\n"
        "    with train_loader(sys.argv[1], 10, seed=2**63) as loader:\n"
        "        loader.load_state_dict(state)\n"
        "        batches = [tuple(b) for _ in range(2) for b in loader]\n"
        "        place = 3 * state['epoch'] + state['step']\n"
        "        torch.save((batches, loader.state_dict()), f'{sys.argv[2]}/{place}.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(numbered), str(tmp_path)], check=True, timeout=120)
    for place in PLACES:
        batches, state = torch.load(tmp_path / f"{place}.pt")
        assert len(batches) == 6 - place % 3
        assert same([Batch(*batch) for batch in batches], served[place : place + len(batches)])
        assert state == states[place + len(batches)]


def test_a_state_is_small_and_is_the_same_after_json(numbered: Path) -> None:
    with train_loader(numbered, 10, seed=2**64 - 1, augmentation=Augmentation(mean="image", strength=0.3)) as loader:
        take(loader, 4)
        state = loader.state_dict()
        assert (state["epoch"], state["step"]) == (1, 1)
        text = json.dumps(state)
        assert json.loads(text) == state and len(text) < 1000
        loader.load_state_dict(json.loads(text))
        assert loader.state_dict() == state


def test_a_state_may_be_loaded_while_iterating(numbered: Path) -> None:
    with train_loader(numbered, 6, seed=3) as loader:
        batches = take(loader, 8)
    with train_loader(numbered, 6, seed=3) as loader:
        start = loader.state_dict()
        for count, _ in enumerate(loader, 1):
            if count == 2:
                middle = loader.state_dict()
            if count == 4:
                break
        loader.load_state_dict(middle)
        assert same(list(loader), batches[2:6])
        loader.load_state_dict(start)
        assert same(take(loader, 8), batches)


def test_an_iterator_serves_from_where_the_stream_stands_after_a_state_was_loaded(numbered: Path) -> None:
    with train_loader(numbered, 6, seed=3) as loader:
        batches = take(loader, 6)
    with train_loader(numbered, 6, seed=3) as loader:
        start = loader.state_dict()
        iterator = iter(loader)
        next(iterator), next(iterator)
        loader.load_state_dict(start)
        assert same([next(iterator)], batches[:1])


def test_the_stream_may_be_left_and_taken_up_within_an_epoch(numbered: Path) -> None:
    with train_loader(numbered, 6, seed=3) as loader:
        batches = take(loader, 9)
    with train_loader(numbered, 6, seed=3) as loader:
        assert same(list(itertools.islice(loader, 2)), batches[:2])
        assert same(list(loader), batches[2:6])
        assert same(list(itertools.islice(loader, 3)), batches[6:9])


@pytest.mark.parametrize(("epoch", "step"), [(0, 3), (2, 0), (0, 0)])
def test_a_stream_may_be_put_anywhere(numbered: Path, epoch: int, step: int) -> None:
    with train_loader(numbered, 6, seed=3) as loader:
        batches = take(loader, 15)
        loader.seek(epoch, step)
        assert same(take(loader, 3), batches[6 * epoch + step :][:3])


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, 6), (0, -1)])
def test_a_place_that_is_not_there_is_refused(numbered: Path, epoch: int, step: int) -> None:
    with train_loader(numbered, 6) as loader, pytest.raises(UserError, match="a step of 0 to 5"):
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


def test_a_state_says_what_it_is_of(numbered: Path) -> None:
    with train_loader(numbered, 10) as loader:
        assert set(loader.state_dict()) == {*IDENTITY, "batch_size", "world_size", "shard", "epoch", "step"}


@pytest.mark.parametrize(("name", "other"), IDENTITY.items())
@pytest.mark.parametrize("step", [0, 2])
def test_a_state_of_something_else_is_refused_by_name(numbered: Path, name: str, other: object, step: int) -> None:
    with train_loader(numbered, 10, seed=2) as loader:
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
def test_a_loader_of_other_settings_gives_another_state(numbered: Path, options: dict) -> None:
    with train_loader(numbered, 10) as loader, train_loader(numbered, 10, **options) as other:
        with pytest.raises(UserError, match="stream state of another"):
            loader.load_state_dict(other.state_dict())
        with pytest.raises(UserError, match="stream state of another"):
            other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("mine", "theirs", "named"),
    [((10, 1), (11, 1), "batch size"), ((4, 3), (4, 2), "world size"), ((6, 1), (6, 2), "world size")],
)
def test_the_records_of_a_step_may_change_only_between_epochs(
    numbered: Path, mine: tuple[int, int], theirs: tuple[int, int], named: str
) -> None:
    with (
        train_loader(numbered, mine[0], world_size=mine[1]) as loader,
        train_loader(numbered, theirs[0], world_size=theirs[1]) as other,
    ):
        next(iter(other))
        with pytest.raises(UserError, match=f"another {named} within an epoch"):
            loader.load_state_dict(other.state_dict())
        other.seek(3)
        loader.load_state_dict(other.state_dict())
        assert (loader.epoch, loader.step) == (3, 0)


# ---- in another world


@pytest.mark.parametrize("batches", [2, 4, 7])
def test_a_state_of_one_loader_continues_with_two_of_half_its_batch(numbered: Path, batches: int) -> None:
    with train_loader(numbered, 8, seed=8) as loader:
        take(loader, batches)
        state = json.loads(json.dumps(loader.state_dict()))
        wanted = take(loader, 5)
    ranks = []
    for rank in range(2):
        with train_loader(numbered, 4, seed=8, shard=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            ranks.append(take(loader, 5))
            after = loader.state_dict()
    assert same(joined(ranks), wanted)
    with train_loader(numbered, 8, seed=8) as loader:
        loader.load_state_dict(after)
        loader.load_state_dict({**after, "step": 0, "epoch": 0})
        take(loader, batches)
        assert same(take(loader, 5), wanted)


def test_between_epochs_a_world_may_take_over_with_the_same_batch(numbered: Path) -> None:
    with train_loader(numbered, 8, seed=8) as loader:
        list(loader)
        state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0)
    with train_loader(numbered, 16, seed=8) as loader:
        loader.load_state_dict(state)
        wanted = list(loader)
    ranks = []
    for rank in range(2):
        with train_loader(numbered, 8, seed=8, shard=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            ranks.append(list(loader))
    assert len(wanted) == 2 and same(joined(ranks), wanted)
