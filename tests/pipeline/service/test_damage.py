"""Tests of damaged records: a consumer of a service gets the same error as a loader without a service."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from pipeline.loader import eval_loader, train_loader
from pipeline.sampling import epoch_permutation
from pipeline.service.control import make_config
from pipeline.service.errors import ServiceError
from pipeline.service.protocol import actor_name
from prep.cluster import NAMESPACE
from prep.store.lmdb_file import ShardBroken
from prep.store.manifest import StoreError
from tests.conftest import TRAIN_RECORDS
from tests.pipeline.service.conftest import Serve, Service, TestCluster
from tests.pipeline.service.faults import DEADLY_RECORD, MAX_TRIES, DeadlyCoordinator
from tests.pipeline.streaming import batches_equal, stored_labels, take_batches
from tests.pipeline.test_damaged_store import DAMAGE, change, stopped_with

# {kind of damage: index of the damaged record in split val}. Each third of the split has one damaged record.
DAMAGED = {"flipped bit": 3, "label": 9, "cut off": 17}
STEP = 4  # with batches of 4 and seed 0, this step needs the damaged record of split train


@pytest.fixture(scope="module")
def broken(numbered_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Path(shutil.copytree(numbered_store, tmp_path_factory.mktemp("broken") / "store"))
    for damage, position in DAMAGED.items():
        change(store, "val", position, DAMAGE[damage])
    change(store, "train", int(epoch_permutation(TRAIN_RECORDS, 0, 0)[4 * STEP + 1]), DAMAGE["flipped bit"])
    return store


@pytest.fixture(scope="module")
def service(broken: Path, module_serve: Serve) -> Service:
    return module_serve(broken, 2)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record_ends_an_evaluation_with_the_error_of_the_local_stream(
    broken: Path, service: Service, damage: str
) -> None:
    third = list(DAMAGED).index(damage)
    messages = []
    for at in (service.at, None):
        with eval_loader(broken, 2, shard=third, world_size=3, service=at, threads=1) as loader:
            messages.append(stopped_with(loader)[0])
            # The second pass over the loader fails at the same record, because a loader skips no record.
            assert stopped_with(loader) == (messages[-1], 0)
    assert messages[0] == messages[1]
    assert f"{broken}/val/00000, key 000000{DAMAGED[damage]:02d}" in messages[0] and "alexprep verify" in messages[0]
    assert damage == "cut off" or ", source " in messages[0]


def test_batches_before_a_damaged_record_are_served_and_other_consumers_go_on(
    numbered_store: Path, broken: Path, service: Service
) -> None:
    with (
        train_loader(broken, 4, seed=5, service=service.at, threads=1) as other,
        train_loader(broken, 4, seed=0, service=service.at, threads=1) as remote,
        train_loader(broken, 4, seed=0, threads=1) as local,
    ):
        take_batches(other, 1)
        assert batches_equal(take_batches(remote, STEP), take_batches(local, STEP))
        message, served = stopped_with(remote)
        assert (message, served) == (stopped_with(local)[0], 0)
        assert (remote.epoch, remote.step) == (0, STEP)
        damaged = int(epoch_permutation(TRAIN_RECORDS, 0, 0)[4 * STEP + 1])
        other_step = epoch_permutation(TRAIN_RECORDS, 5, 0).tolist().index(damaged) // 4
        with train_loader(numbered_store, 4, seed=5, threads=1) as undamaged:
            expected = take_batches(undamaged, other_step)
        assert other_step > 1 and batches_equal(take_batches(other, other_step - 1), expected[1:])
    assert service.status()["last_fault"] == "" and service.status()["retries"] == 0


def test_a_store_that_is_cut_while_workers_read_it_ends_in_an_error(
    numbered_store: Path, tmp_path: Path, serve: Serve
) -> None:
    """A worker that reads the missing part of the shard does not die, and its error names the shard.

    The test then kills the worker. New workers detect the damage at their start, so no node can serve the store. A
    consumer must not wait for a worker forever.
    """
    store = Path(shutil.copytree(numbered_store, tmp_path / "store"))
    service = serve(store, 1, start_s=2.0)
    with eval_loader(store, 1, service=service.at, threads=1) as first:
        assert next(iter(first)).labels.tolist() == stored_labels(numbered_store, "val")[:1]
    file = store / "val" / "00000" / "data.mdb"
    os.truncate(file, file.stat().st_size // 4)
    with (
        eval_loader(store, 4, service=service.at, threads=1) as loader,
        pytest.raises(ShardBroken, match=f"{re.escape(str(file.parent))}: data.mdb was changed or became unreadable"),
    ):
        list(loader)
    assert service.status()["retries"] == 0
    for worker in service.workers():
        os.kill(worker, signal.SIGKILL)
    with (
        eval_loader(store, 4, service=service.at, threads=1) as loader,
        pytest.raises(ServiceError, match=f"no worker can start: node .*{re.escape(str(file))} has ") as stopped,
    ):
        list(loader)
    assert "\n" not in str(stopped.value)


@pytest.mark.soak
def test_a_record_that_kills_every_worker_ends_in_an_error(cluster: TestCluster, numbered_store: Path) -> None:
    """Other consumers continue, because the service replaces every dead worker."""
    ray, name = cluster.ray, "deadly"
    options = {"name": actor_name(name), "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 100}
    config = make_config(numbered_store, name, 1, 1, 1)
    coordinator = ray.remote(DeadlyCoordinator).options(**options).remote(config)
    service = Service(cluster, numbered_store, name)
    try:
        ray.get(coordinator.begin.remote())
        step = int(np.flatnonzero(epoch_permutation(TRAIN_RECORDS, 0, 0) == DEADLY_RECORD)[0]) // 4
        with (
            train_loader(numbered_store, 4, seed=0, service=service.at, threads=1) as remote,
            eval_loader(numbered_store, 4, service=service.at, threads=1) as other,
            eval_loader(numbered_store, 4, threads=1) as local,
        ):
            with pytest.raises(ServiceError, match=f"{MAX_TRIES} workers died while making") as stopped:
                remote.seek(0, step)
                take_batches(remote, 1)
            assert not isinstance(stopped.value, StoreError) and "\n" not in str(stopped.value)
            assert f"alexstream status --name {name}" in str(stopped.value)
            assert batches_equal(list(other), list(local))
        assert service.status()["retries"] >= MAX_TRIES - 1
    finally:
        service.stop()
