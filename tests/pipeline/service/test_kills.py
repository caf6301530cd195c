"""Tests that a stream keeps its bits while workers, nodes and the coordinator are killed at random moments.

Every batch is compared with the batch of a local stream at the same position. No batch may be lost, repeated or
changed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.loader import train_loader
from tests.pipeline.service.conftest import Serve, Service, TestCluster
from tests.pipeline.streaming import batches_equal, take_batches


class Killer(threading.Thread):
    """Kills parts of a service, one after another: a worker, the coordinator, or a node with all of its processes."""

    def __init__(self, service: Service, victims: list[str], seed: int) -> None:
        super().__init__()
        self._service, self._victims, self._rng = service, victims, random.Random(seed)
        self.killed: list[str] = []
        # This event asks the main thread to start a new node. Ray does not allow other threads to start a node.
        self.node_is_missing = threading.Event()

    def run(self) -> None:
        for victim in self._victims:
            while not self._kill(victim):
                pass
            self.killed.append(victim)

    def _kill(self, victim: str) -> bool:
        status = self._service.wait_for("a worker", lambda status: bool(status["workers"]))
        time.sleep(self._rng.uniform(0, 0.2))
        if victim == "node":
            self._service.cluster.kill_second_node()
            self.node_is_missing.set()
            while self.node_is_missing.is_set():
                time.sleep(0.01)
            return True
        pid = self._rng.choice(status["workers"])["pid"]
        if victim == "coordinator":
            pid = self._service.coordinator_pid()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # the process had already ended
            return False
        return True


def stream_during_kills(service: Service, store: Path, victims: list[str], seed: int) -> int:
    """Compare a stream with a local stream while a Killer runs, and for one epoch afterwards.

    Returns the number of compared batches.
    """
    killer, steps = Killer(service, victims, seed), 0
    with (
        train_loader(store, 2, seed=seed, service=service.at, threads=1) as remote,
        train_loader(store, 2, seed=seed, threads=1) as local,
    ):
        killer.start()
        rest = len(local)
        while rest:
            rest = len(local) if killer.is_alive() else rest - 1
            batch, expected = take_batches(remote, 1), take_batches(local, 1)
            assert batches_equal(batch, expected), f"step {steps}, seed {seed}"
            assert remote.state_dict() == local.state_dict()
            steps += 1
            if killer.node_is_missing.is_set():
                service.cluster.add_second_node()
                killer.node_is_missing.clear()
        killer.join()
    assert killer.killed == victims
    return steps


def shuffled(seed: int, workers: int, coordinators: int, nodes: int) -> list[str]:
    victims = ["worker"] * workers + ["coordinator"] * coordinators + ["node"] * nodes
    random.Random(seed).shuffle(victims)
    return victims


def test_twenty_kills(store: Path, serve: Serve) -> None:
    service = serve(store, 3)
    assert stream_during_kills(service, store, shuffled(20, 16, 3, 1), 20) > 0
    assert service.wait_for("an empty queue", lambda status: not status["queue"])["min_workers"] == 3


@pytest.mark.soak
def test_two_hundred_kills(store: Path, serve: Serve) -> None:
    for seed in range(10):
        service = serve(store, 3)
        stream_during_kills(service, store, shuffled(seed, 14, 4, 2), seed)
        service.stop()


@pytest.mark.soak
def test_an_object_that_is_lost_with_its_node_is_made_again(cluster: TestCluster, store: Path, serve: Serve) -> None:
    """The second node makes batches ahead of time, and then dies before the consumer has read them."""
    service = serve(store, 3)
    service.wait_for("all workers", lambda status: len(status["workers"]) == 3)
    second = cluster.second_node.node_id
    assert any(worker["node"] == second for worker in service.status()["workers"])
    with (
        train_loader(store, 4, seed=2, service=service.at, threads=1) as remote,
        train_loader(store, 4, seed=2, threads=1) as local,
    ):
        assert batches_equal(take_batches(remote, 1), take_batches(local, 1))
        cluster.kill_second_node()
        assert batches_equal(take_batches(remote, 20), take_batches(local, 20))
        cluster.add_second_node()
        second = cluster.second_node.node_id
        service.wait_for("a worker on the new node", lambda s: any(w["node"] == second for w in s["workers"]))
        assert batches_equal(take_batches(remote, 20), take_batches(local, 20))
