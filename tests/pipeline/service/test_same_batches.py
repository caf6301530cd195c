"""Tests that a loader with a service has the same batches, order and states as a loader without a service.

Each test compares two loaders with the same arguments, one with a service and one without.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.augment import Augmentation
from pipeline.loader import eval_loader, train_loader
from pipeline.selection.fields import FIELDS
from tests.conftest import CLASSES
from tests.pipeline.service.conftest import Serve, Service
from tests.pipeline.streaming import batches_equal, concatenate_ranks, take_batches
from tests.prep.extra.tables import FIELDS as EXTRA
from tests.prep.extra.tables import build_with, make_photos, write_table

Loader = Callable[..., Any]


@pytest.fixture(scope="module")
def service(store: Path, module_serve: Serve) -> Service:
    """A service with two workers for the JPEG store."""
    return module_serve(store, 2)


def same_training(store: Path, service: str, batches: int, batch_size: int = 8, **options: Any) -> None:
    with (
        train_loader(store, batch_size, service=service, threads=1, **options) as remote,
        train_loader(store, batch_size, threads=1, **options) as local,
    ):
        for _ in range(2):
            assert batches_equal(take_batches(remote, batches), take_batches(local, batches))
            assert remote.state_dict() == local.state_dict()


@pytest.mark.parametrize(("kind", "workers"), [("jpeg-whole", 1), ("ppm", 2), ("ppm-whole", 3)])
def test_training_batches_of_any_store_by_any_number_of_workers(
    stores: dict[str, Path], serve: Serve, kind: str, workers: int
) -> None:
    service = serve(stores[kind], workers)
    service.wait_for("all workers", lambda status: len(status["workers"]) == workers)
    same_training(stores[kind], service.at, 5, seed=7)
    with eval_loader(stores[kind], 5, service=service.at) as remote, eval_loader(stores[kind], 5) as local:
        assert batches_equal(list(remote), list(local))


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 2**64 - 1},
        {"layout": "NHWC", "dtype": "float16"},
        {"dtype": "bfloat16"},
        {"augmentation": Augmentation(mean="image")},
        {"augmentation": Augmentation(mean="aligned", colour="off")},
        {"augmentation": Augmentation(shared_by=4)},
        {"split": "val", "augmentation": Augmentation(divisor=255.0)},
        {"augmentation": Augmentation(size_px=64, window="resized", std=(9.0, 8.0, 7.0)), "views": 2},
        {"augmentation": Augmentation(size_px=100, window="centre", flip=0.2)},
        {"augmentation": Augmentation.preset("resnet")},
        {"augmentation": replace(Augmentation.preset("simclr"), erase=0.5), "layout": "NHWC"},
        {"augmentation": Augmentation.preset("simclr"), "views": 2},
        {"augmentation": Augmentation(size_px=64, jitter=(0.4, 0.4, 0.4, 0.1)), "views": 2, "weights": "balanced"},
    ],
    ids=str,
)
def test_training_batches_of_any_settings(store: Path, service: Service, options: dict[str, Any]) -> None:
    same_training(store, service.at, 3, 4, **options)


@pytest.mark.parametrize("views", [1, 10, "square"])
def test_evaluation_batches(store: Path, service: Service, views: int | str) -> None:
    """The batch size does not divide the number of records. Each loader is iterated twice."""
    with (
        eval_loader(store, 5, views=views, service=service.at, threads=1) as remote,
        eval_loader(store, 5, views=views, threads=1) as local,
    ):
        for _ in range(2):
            assert batches_equal(list(remote), list(local))
        next(iter(remote))  # an iteration that stops early must not change the next iteration
        assert batches_equal(list(remote), list(local))


def test_the_ranks_of_a_step(store: Path, service: Service) -> None:
    """Together, the ranks serve the batches of one loader whose batch size is the sum of the ranks' batch sizes."""
    ranks = []
    for shard in range(2):
        with train_loader(store, 4, seed=3, shard=shard, world_size=2, service=service.at, threads=1) as remote:
            ranks.append(take_batches(remote, 5))
    with train_loader(store, 8, seed=3, threads=1) as local:
        assert batches_equal(concatenate_ranks(ranks), take_batches(local, 5))
    evaluated = []
    for shard in range(3):
        with eval_loader(store, 3, shard=shard, world_size=3, service=service.at, threads=1) as remote_part:
            evaluated += [label for batch in remote_part for label in batch.labels.tolist()]
    with eval_loader(store, 12, threads=1) as local_part:
        assert evaluated == next(iter(local_part)).labels.tolist()


def same_fields(first: Any, second: Any) -> bool:
    """Return whether two batches are equal. Their fields are tensors, strings, and dicts of tensors."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same_fields(first[name], second[name]) for name in first)
    return first.equal(second) if isinstance(first, torch.Tensor) else bool(first == second)


def test_fields_of_a_subset_with_weights(store: Path, service: Service) -> None:
    """Two more loaders use the service at the same time: one without `fields`, and one with another subset."""
    selection: dict[str, Any] = {"subset": CLASSES[:2], "weights": "balanced", "threads": 1}
    with (
        train_loader(store, 4, service=service.at, fields=FIELDS, **selection) as remote,
        train_loader(store, 4, service=service.at, **selection) as unnamed,
        train_loader(store, 4, service=service.at, subset=CLASSES[1:], threads=1) as other,
        train_loader(store, 4, fields=FIELDS, **selection) as local,
        train_loader(store, 4, subset=CLASSES[1:], threads=1) as other_local,
    ):
        for ours, theirs, plain in zip(remote, local, unnamed, strict=True):
            assert same_fields(ours, theirs)
            assert plain.images.equal(theirs["images"])
        assert batches_equal(list(other), list(other_local)) and remote.state_dict() == local.state_dict()
    fields: Any = ("index", "keys", "labels")
    with (
        eval_loader(store, 5, subset=[1, 4, 9], service=service.at, fields=fields) as remote_part,
        eval_loader(store, 5, subset=[1, 4, 9], fields=fields) as local_part,
    ):
        for ours, theirs in zip(remote_part, local_part, strict=True):
            assert same_fields(ours, theirs)


def test_extra_fields(serve: Serve, tmp_path: Path) -> None:
    """The consumer sees only the manifest and the colour statistics of its store, so the workers send the values of the
    extra fields.

    A consumer without extra fields reads the same blocks.
    """
    photos = make_photos(tmp_path / "train", 40)
    write_table(tmp_path / "values.csv", photos)
    built = tmp_path / "store"
    build_with(photos, built, [f"{name}={tmp_path / 'values.csv'}" for name in EXTRA])
    without = shutil.copytree(built, tmp_path / "without", ignore=shutil.ignore_patterns("0*", "extra"))
    at = serve(built, 1).at
    options: dict[str, Any] = {"augmentation": Augmentation(size_px=32), "threads": 1}
    fields: Any = ("labels", "extra", "keys")
    with (
        train_loader(without, 4, service=at, views=2, fields=fields, **options) as remote,
        train_loader(built, 4, views=2, fields=fields, **options) as local,
        train_loader(without, 4, service=at, views=2, **options) as unnamed,
    ):
        for ours, theirs, plain in zip(remote, local, unnamed, strict=True):
            assert same_fields(ours, theirs) and len(ours["extra"]["caption"]) == 4
            assert plain.labels.equal(theirs["labels"])
    with (
        eval_loader(without, 3, split="train", service=at, fields=fields, **options) as remote_part,
        eval_loader(built, 3, split="train", fields=fields, **options) as local_part,
    ):
        for ours, theirs in zip(remote_part, local_part, strict=True):
            assert same_fields(ours, theirs)


SMALL = {name: replace(Augmentation.preset(name), size_px=64) for name in ("resnet", "simclr")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augmentation": SMALL["resnet"]},
        {"augmentation": SMALL["simclr"], "views": 2},
        {"augmentation": SMALL["simclr"], "views": 2, "weights": "balanced", "subset": CLASSES[:2]},
    ],
    ids=["default", "resnet", "simclr", "weights"],
)
def test_a_state_continues_with_and_without_a_service(store: Path, service: Service, options: dict[str, Any]) -> None:
    """A loader with a service continues from a state that a loader without a service has saved, and vice versa.

    The states are saved in the middle of an epoch.
    """
    at = {"remote": service.at, "local": None}
    options = {"seed": 5, "threads": 1, **options}
    for saved_by, loaded_by in (("remote", "local"), ("local", "remote"), ("remote", "remote")):
        with train_loader(store, 4, service=at[saved_by], **options) as first:
            take_batches(first, 9)
            state, expected = first.state_dict(), take_batches(first, 8)
        with train_loader(store, 4, service=at[loaded_by], **options) as second:
            second.load_state_dict(state)
            assert batches_equal(take_batches(second, 8), expected)


def test_seek_back_and_forth(store: Path, service: Service) -> None:
    with (
        train_loader(store, 4, seed=1, service=service.at, threads=1) as remote,
        train_loader(store, 4, seed=1, threads=1) as local,
    ):
        for epoch, step in ((0, 3), (4, 0), (0, 3), (0, 2), (900_000, 6), (0, 0), (1, 1)):
            remote.seek(epoch, step)
            local.seek(epoch, step)
            assert batches_equal(take_batches(remote, 2), take_batches(local, 2)), (epoch, step)


def test_the_number_of_workers_changes_during_a_stream(store: Path, serve: Serve) -> None:
    """The service begins with one worker and has three workers under load. The test then kills two of the workers."""
    service = serve(store, 1, 3)
    with (
        train_loader(store, 4, seed=11, service=service.at, threads=1) as remote,
        train_loader(store, 4, seed=11, threads=1) as local,
    ):
        seen = set()
        while 3 not in seen:
            assert batches_equal(take_batches(remote, 7), take_batches(local, 7))
            seen.add(len(service.status()["workers"]))
        for pid in service.workers()[:2]:
            os.kill(pid, signal.SIGKILL)
        assert batches_equal(take_batches(remote, 28), take_batches(local, 28))
        assert remote.state_dict() == local.state_dict()


def test_the_batches_of_a_service_can_be_changed_and_kept(store: Path, service: Service) -> None:
    with train_loader(store, 4, service=service.at, threads=1) as remote:
        batches = take_batches(remote, 6)
        copies = [batch.images.clone() for batch in batches]
        batches[0].images.zero_()
        batches[0].labels.zero_()
    with train_loader(store, 4, threads=1) as local:
        expected = take_batches(local, 6)
    assert all(bool((copy == batch.images).all()) for copy, batch in zip(copies, expected, strict=True))
    assert batches_equal(batches[1:], expected[1:])


def test_a_loader_tells_the_state_of_its_service(store: Path, service: Service) -> None:
    with train_loader(store, 4, service=service.at, threads=1) as remote, train_loader(store, 4, threads=1) as local:
        take_batches(remote, 2)
        status = remote.service_status()
        assert status is not None and (status.name, status.state) == (service.name, "connected")
        assert local.service_status() is None
