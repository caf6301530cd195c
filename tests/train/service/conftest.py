"""Fixtures: a Ray cluster on this machine, services in this cluster, and runs without a service for comparison."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.service.control import make_config, service_status, start_service, stop_service
from pipeline.service.protocol import actor_name
from prep.cluster import NAMESPACE, connected, ray_module
from tests.helpers.small_training import small_config
from train.config.recipe import ScheduleChange
from train.config.run_config import RunConfig
from train.runs.run import Run
from train.trainer.loop import fit

# These ports are fixed. Without fixed ports, Ray kills a new node whose agents need more than 15 s to start.
_PORTS = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")


class Service:
    """A service with one worker for one store. Each method connects to the cluster, and disconnects at the end."""

    def __init__(self, store: Path, address: str, name: str) -> None:
        self.store, self.address, self.name = store, address, name
        self.start()

    @property
    def option(self) -> str:
        """The value for --service."""
        return f"{self.name}@{self.address}"

    def start(self) -> None:
        with connected(self.address) as ray:
            start_service(ray, make_config(self.store, self.name, 1, 1, 1, ahead=4))

    def stop(self) -> None:
        with connected(self.address) as ray:
            stop_service(ray, self.name, self.address)

    def coordinator_pid(self) -> int:
        """Return the process id of the coordinator."""
        with connected(self.address) as ray:
            coordinator = ray.get_actor(actor_name(self.name), NAMESPACE)
            pid: int = ray.get(coordinator.__ray_call__.remote(lambda actor: os.getpid()), timeout=60)
            return pid

    def images_made(self) -> int:
        """Return the number of images that the service has decoded since its start."""
        with connected(self.address) as ray:
            made: int = service_status(ray, self.name, self.address)["images_made"]
            return made


@pytest.fixture(scope="package")
def cluster_address() -> Iterator[str]:
    """The address HOST:PORT of a cluster with one node."""
    ray_module()  # this call sets environment variables that are read when Ray is imported
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.cluster_utils import Cluster

    # If this machine has a Ray token, the node and the runs use the token. Otherwise, no process uses a token.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cluster = started_cluster(Cluster)
    for number, handler in before.items():
        signal.signal(number, handler)
    try:
        yield cluster.address
    finally:
        ray_module().shutdown()  # a Cluster refuses to end while this process is connected to it
        cluster.shutdown()


def started_cluster(cluster_class: Any) -> Any:
    """Start a cluster with a head node. If the node starts too slowly for Ray, the start is tried again."""
    node = {"num_cpus": 2, "object_store_memory": 150_000_000, "include_dashboard": False}
    for attempts_left in reversed(range(4)):
        cluster = cluster_class()
        try:
            cluster.add_node(**node, **dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True)))
            return cluster
        except Exception:  # Ray raises a plain Exception if a node does not start
            cluster.shutdown()
            if not attempts_left:
                raise


def free_ports(count: int) -> list[int]:
    """Return ports of this machine on which no process listens."""
    with ExitStack() as listening:
        listeners = [listening.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


@pytest.fixture(scope="package")
def lasting_service(cluster_address: str, stores: dict[str, Path]) -> Service:
    """A service of the JPEG store. No test stops this service."""
    return Service(stores["jpeg"], cluster_address, "lasting")


@pytest.fixture
def service(cluster_address: str, stores: dict[str, Path]) -> Service:
    """A service of the JPEG store. The test must stop this service."""
    return Service(stores["jpeg"], cluster_address, "stopped")


@pytest.fixture(scope="package")
def store_without_records(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the JPEG store without its shards. A loader can read its records only through a service."""
    folder = tmp_path_factory.mktemp("without-records") / "store"
    return Path(shutil.copytree(stores["jpeg"], folder, ignore=shutil.ignore_patterns("[0-9][0-9][0-9][0-9][0-9]")))


def config_with_two_streams(store: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """Return small_config with colour noise only until epoch 2. Then the run opens a second stream without noise."""
    recipe = small_config(store, run_dir).recipe
    schedule = (ScheduleChange(1.5, lr=0.002), ScheduleChange(2, colour="off"))
    return small_config(store, run_dir, recipe=replace(recipe, schedule=schedule), **changes)


@pytest.fixture(scope="package")
def local_run(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of config_with_two_streams without a service."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    return fit(Run.open(config_with_two_streams(stores["jpeg"], run_dir)))
