"""Fixtures: a Ray cluster on this machine for the tests of the service, and services in this cluster.

All tests of this folder share one cluster, except the tests in own_cluster/. Those start other clusters on simulated
machines (faults.Machine).
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.service.control import make_config, service_status, start_service, stop_service
from pipeline.service.errors import ServiceError
from prep.cluster import NAMESPACE, connected, ray_module

DEADLINE_S = 120.0  # longest time of each wait; on an idle machine, the longest wait takes 10 s
_OBJECT_STORE_BYTES = 150_000_000
# Number of attempts to start a node. On a busy machine, Ray kills a new node if its agents need more than 15 s.
_ATTEMPTS = 4


class TestCluster:
    """Nodes of one Ray cluster, all on this machine. This process is connected to the head node."""

    __test__ = False

    def __init__(self, ray: ModuleType, cluster: Any) -> None:
        self.ray, self._cluster = ray, cluster
        self.address: str = cluster.address
        self.add_second_node()

    def add_second_node(self) -> None:
        """Start the second node of the cluster. Ray's id of the node is `second_node.node_id`."""
        for attempt in range(_ATTEMPTS):
            try:
                self.second_node = self._cluster.add_node(num_cpus=3, object_store_memory=_OBJECT_STORE_BYTES)
                return
            except Exception:
                if attempt == _ATTEMPTS - 1:
                    raise

    def kill_second_node(self) -> None:
        """Kill all processes of the second node at once, as a power failure does."""
        self._cluster.remove_node(self.second_node, allow_graceful=False)

    @property
    def head_node(self) -> Any:
        return self._cluster.head_node

    def wait_for_nodes(self, count: int) -> None:
        """Wait until the cluster has `count` nodes."""
        deadline = time.monotonic() + DEADLINE_S
        while (alive := sum(node["Alive"] for node in self.ray.nodes())) != count:
            assert time.monotonic() < deadline, f"{alive} nodes"
            time.sleep(0.1)

    def used_bytes(self) -> int:
        """Return the number of bytes that are in use in the object stores of all nodes together."""
        from ray._private.internal_api import node_stats

        return sum(
            node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats.object_store_bytes_used
            for node in self.ray.nodes()
            if node["Alive"]
        )


class Service:
    """A service in the cluster that the tests share."""

    def __init__(self, cluster: TestCluster, store: Path, name: str) -> None:
        self.cluster, self.store, self.name = cluster, store, name
        self.at = f"{name}@{cluster.address}"  # the value for the loaders' argument `service`

    def status(self) -> dict[str, Any]:
        return service_status(self.cluster.ray, self.name, self.cluster.address)

    def workers(self) -> list[int]:
        """Return the process ids of the workers that are ready."""
        return [worker["pid"] for worker in self.status()["workers"]]

    def coordinator_pid(self) -> int:
        ray = self.cluster.ray
        coordinator = ray.get_actor(f"alexstream:{self.name}", NAMESPACE)
        return int(ray.get(coordinator.__ray_call__.remote(lambda actor: os.getpid()), timeout=DEADLINE_S))

    def stop(self) -> None:
        stop_service(self.cluster.ray, self.name, self.cluster.address)

    def wait_for(
        self, what: str, reached: Callable[[dict[str, Any]], bool], limit_s: float = DEADLINE_S
    ) -> dict[str, Any]:
        """Wait until `reached(status)` is true, and return the status.

        After `limit_s` seconds, the test fails with a message that contains `what`.
        """
        deadline = time.monotonic() + limit_s
        while not reached(status := self.status()):
            assert time.monotonic() < deadline, f"not reached: {what}. The status is {status}"
            time.sleep(0.1)
        return status


@pytest.fixture(scope="package")
def cluster() -> Iterator[TestCluster]:
    """A cluster of two nodes: the head node has two cores for Ray, and the other node has three."""
    ray_module()  # this call sets environment variables that Ray reads when it is imported
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.cluster_utils import Cluster

    # If this machine has a Ray token, all nodes of the cluster use the token. Otherwise no node uses a token.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    nodes = _start_head(Cluster)
    try:
        with connected(nodes.address) as ray:
            yield TestCluster(ray, nodes)
    finally:
        nodes.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_head(cluster_class: Any) -> Any:
    """Start a cluster that consists of a head node."""
    # To shorten the tests, processes send their metrics to the agent of their node every second instead of every 10 s,
    # and Ray frees objects without references every 100 ms instead of every second.
    often = {"metrics_report_interval_ms": 1000, "free_objects_period_milliseconds": 100}
    options = {"num_cpus": 2, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    for attempt in range(_ATTEMPTS):
        nodes = cluster_class()
        try:
            nodes.add_node(**options, _system_config=often)
            return nodes
        except Exception:
            nodes.shutdown()
            if attempt == _ATTEMPTS - 1:
                raise


Serve = Callable[..., Service]


def serving(cluster: TestCluster) -> Iterator[Serve]:
    """Yield a function that starts services, and stop all started services at the end.

    The fixtures `serve` and `module_serve` use this function.
    """
    with ExitStack() as exit_stack:

        def start(store: Path, workers: int = 1, most: int | None = None, threads: int = 1, **more: Any) -> Service:
            service = Service(cluster, store, f"s{next(_numbers)}")
            start_service(cluster.ray, make_config(store, service.name, workers, most or workers, threads, **more))
            exit_stack.callback(_stop, service)
            return service

        yield start


_numbers = itertools.count()


def _stop(service: Service) -> None:
    with suppress(ServiceError):  # the test itself may have stopped the service
        service.stop()


@pytest.fixture
def serve(cluster: TestCluster) -> Iterator[Serve]:
    """A function `serve(store, workers, most, **fields of ServiceConfig)`. It starts a service for one test."""
    yield from serving(cluster)


@pytest.fixture(scope="module")
def module_serve(cluster: TestCluster) -> Iterator[Serve]:
    """The same function as `serve`, for all tests of a module.

    All tests of the module share the services, which are stopped after the last test.
    """
    yield from serving(cluster)
