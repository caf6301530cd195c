"""Tests that the number of workers stays within its limits, and that workers run only on nodes that have the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.loader import train_loader
from tests.pipeline.service.conftest import DEADLINE_S, Serve, TestCluster
from tests.pipeline.service.faults import Machine, node_commands, until_shut_down
from tests.pipeline.streaming import batches_equal, take_batches


def test_workers_grow_under_load_and_shrink_without_it(store: Path, serve: Serve) -> None:
    service = serve(store, 0, 3, idle_s=2.0)
    status = service.status()
    assert not status["workers"] and not status["starting"]
    most = 0
    with (
        train_loader(store, 4, seed=11, service=service.at, threads=1) as remote,
        train_loader(store, 4, seed=11, threads=1) as local,
    ):
        while most < 3:
            assert batches_equal(take_batches(remote, 7), take_batches(local, 7))
            status = service.status()
            assert len(status["workers"]) + status["starting"] <= 3
            most = max(most, len(status["workers"]))
        status = service.wait_for("no worker", lambda status: not status["workers"] and not status["starting"])
        assert status["consumers"]
        assert batches_equal(take_batches(remote, 7), take_batches(local, 7))


@pytest.mark.soak
def test_the_least_number_of_workers_stays(store: Path, serve: Serve) -> None:
    service = serve(store, 1, 2, idle_s=0.5)
    with train_loader(store, 4, service=service.at, threads=1) as loader:
        while len(service.status()["workers"]) < 2:
            take_batches(loader, 7)
    service.wait_for("one worker", lambda status: len(status["workers"]) == 1)
    with pytest.raises(AssertionError):
        service.wait_for("no worker", lambda status: not status["workers"], limit_s=3.0)


@pytest.mark.soak
def test_workers_that_find_no_core_are_given_up_without_load(store: Path, serve: Serve) -> None:
    """The service may start up to nine workers, but the cluster has only five cores."""
    service = serve(store, 0, 9, idle_s=1.0, ahead=20)
    with train_loader(store, 2, service=service.at, threads=1) as loader:
        while service.status()["starting"] < 2:
            take_batches(loader, 10)
    status = service.wait_for("no worker", lambda status: not status["workers"] and not status["starting"])
    assert not status["last_fault"]


@pytest.mark.soak
def test_a_node_without_the_store_and_a_node_with_another_store_are_not_used(
    cluster: TestCluster, stores: dict[str, Path], serve: Serve
) -> None:
    """The folder of the store is empty on one simulated machine, and has another store on another simulated machine."""
    store, other = stores["jpeg"], stores["ppm"]
    join = until_shut_down(node_commands(cluster.address, cores=2))
    without = Machine(f"mount -t tmpfs none {store} && {join}")
    with_other = Machine(f"mount --bind {other} {store} && {join}")
    try:
        cluster.wait_for_nodes(4)
        service = serve(store, 4, threads=2)
        status = service.wait_for("two nodes that are not used", lambda status: len(status["unused_nodes"]) == 2)
        reasons = sorted(node["why"] for node in status["unused_nodes"])
        service.wait_for("two workers", lambda status: len(status["workers"]) == 2)
        with (
            train_loader(store, 4, seed=5, service=service.at, threads=1) as remote,
            train_loader(store, 4, seed=5, threads=1) as local,
        ):
            assert batches_equal(take_batches(remote, 20), take_batches(local, 20))
        good = {cluster.head_node.node_id, cluster.second_node.node_id}
        assert {worker["node"] for worker in service.status()["workers"]} == good
        assert not good & {node["node"] for node in status["unused_nodes"]}
        assert any("manifest.json" in reason or "no store" in reason for reason in reasons), reasons
        assert any(f"{store} differs: split" in reason and "fingerprint" in reason for reason in reasons), reasons
    finally:
        for machine in (without, with_other):
            machine.shut_down(DEADLINE_S)
        cluster.wait_for_nodes(2)
