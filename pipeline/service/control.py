"""Functions that start and stop services in a Ray cluster, and functions that return the state of a service."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.service.client import find_service
from pipeline.service.coordinator import Coordinator
from pipeline.service.errors import ServiceError, last_line
from pipeline.service.protocol import ServiceConfig, actor_name
from pipeline.windows import LABEL_BYTES
from prep.cluster import NAMESPACE
from prep.console import bytes_text, say
from prep.store.manifest import Store

CALL_S = 30.0  # if a service does not answer a call within this time, an error is raised
BEGIN_S = 120.0  # longest time for the first call of a new service, whose process must start first
READY_S = 60.0  # longest time for which `alexstream serve` waits until the workers are ready
# `alexstream serve` ends with an error if no worker is ready after this time and the last start of a worker failed.
FAULT_S = 10.0
# With --cluster local, the object store has room for two streams (training and validation) with batches of 512 images.
_STREAMS, _BATCH_IMAGES = 2, 512
_IN_USE = 4  # number of batches that a consumer has received and still uses, so that they stay in the object store
_LEAST_BYTES = 80_000_000  # Ray refuses a smaller object store


def make_config(store: Path, name: str, min_workers: int, max_workers: int, threads: int, **more: Any) -> ServiceConfig:
    """Return the settings of a service for a store. `more` sets further fields of ServiceConfig.

    Raises StoreError if the store is missing or incomplete.
    """
    opened = Store.open(store)
    for split in opened.splits:
        opened.shard_paths(split)
    fingerprints = {split: opened.split(split).fingerprint for split in opened.splits}
    return ServiceConfig(name, str(store.absolute()), fingerprints, min_workers, max_workers, threads, **more)


def start_service(ray: ModuleType, config: ServiceConfig) -> Any:
    """Start a service and return its coordinator. Raises ServiceError if the cluster has a service of this name."""
    options: dict[str, Any] = {
        "name": actor_name(config.name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 10_000,
    }
    try:
        coordinator = ray.remote(Coordinator).options(**options).remote(config)
    except ValueError:
        raise ServiceError(
            f"service {config.name}: the cluster already has a service of this name. Stop the service with: "
            f"alexstream stop --name {config.name}, or choose another --name."
        ) from None
    try:
        call(ray, config.name, coordinator.begin, BEGIN_S)
    except BaseException:
        ray.kill(coordinator, no_restart=True)
        raise
    return coordinator


def most_workers(ray: ModuleType, threads: int) -> int:
    """Return how many workers with `threads` cores each fit on the nodes that the cluster has now; at least 1."""
    return max(1, sum(cores // threads for cores in _cores(ray)))


def check_cores(ray: ModuleType, config: ServiceConfig, address: str) -> None:
    """Raise ServiceError if no node has enough cores for one worker.

    If `min_workers` is 0, nothing is checked, because an autoscaler may add a larger node later.
    """
    largest = max(_cores(ray), default=0)
    if config.min_workers and largest < config.threads:
        advice = f"Choose --threads {largest} or less, or start" if largest else "Start"
        raise ServiceError(
            f"service {config.name}: a worker needs a node with {config.threads} cores, but the largest node of "
            f"cluster {address} has {largest}. {advice} a larger node (ray start --address HOST:PORT --num-cpus N). If "
            "the cluster has an autoscaler, pass --workers 0:MAX."
        )


def await_workers(ray: ModuleType, config: ServiceConfig, address: str) -> dict[str, Any]:
    """Wait up to READY_S until `min_workers` workers are ready. Returns the state of the service.

    Raises ServiceError if no node of the cluster can serve the store. The error names each node and the reason. Also
    raises ServiceError if no worker is ready after FAULT_S and the last start of a worker failed.
    """
    begun_s = time.monotonic()
    while True:
        status = service_status(ray, config.name, address)
        waited_s = time.monotonic() - begun_s
        if len(status["workers"]) >= config.min_workers or waited_s > READY_S:
            return status
        if not status["workers"]:
            unused = status["unused_nodes"]
            fitting = sum(cores >= config.threads for cores in _cores(ray))
            if unused and len(unused) >= fitting:
                reasons = "; ".join(f"{node['host']}: {node['why']}" for node in unused)
                raise ServiceError(f"service {config.name}: no node can serve {config.store}. {reasons}")
            if status["last_fault"] and waited_s > FAULT_S:
                raise ServiceError(f"service {config.name}: {status['last_fault']}")
        time.sleep(0.2)


def object_store_bytes(ahead: int) -> int:
    """Return the size in bytes of the object store for a Ray cluster that has only this machine.

    The object store has room for the batches of two streams with 512 images in each batch. The object store takes at
    most 30 % of the memory and at most 90 % of the free space in /dev/shm, but never less than 80 MB. Prints a warning
    if 90 % of the free space in /dev/shm is less than 80 MB. `ahead` is ServiceConfig.ahead.
    """
    wanted = _STREAMS * (ahead + _IN_USE) * _BATCH_IMAGES * (3 * 224**2 + LABEL_BYTES)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else memory
    if 0.9 * free < _LEAST_BYTES:
        say(
            f"Warning: /dev/shm has {bytes_text(free)} free, expected {bytes_text(_LEAST_BYTES)} or more. Ray "
            "therefore keeps batches in files, which is slow. In a container: start the container with --shm-size 4gb."
        )
        free = memory
    return max(_LEAST_BYTES, min(wanted, int(0.3 * memory), int(0.9 * free)))


def _cores(ray: ModuleType) -> list[int]:
    """Return the number of CPU cores of each living node of the cluster."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def stop_service(ray: ModuleType, name: str, address: str) -> None:
    """Stop a service and its workers. Raises ServiceError if there is no such service."""
    coordinator = find_service(ray, name, address)
    try:
        call(ray, name, coordinator.close)
    finally:
        ray.kill(coordinator, no_restart=True)
    deadline = time.monotonic() + CALL_S
    while time.monotonic() < deadline:  # a new service can use the name only after Ray has removed the old actor
        try:
            ray.get_actor(actor_name(name), NAMESPACE)
        except ValueError:
            return
        time.sleep(0.05)


def service_status(ray: ModuleType, name: str, address: str) -> dict[str, Any]:
    """Return the state of a service, which `alexstream status` prints.

    Raises ServiceError if there is no such service, or if the service does not answer.
    """
    status: dict[str, Any] = call(ray, name, find_service(ray, name, address).status)
    return status


def call(ray: ModuleType, name: str, method: Any, timeout_s: float = CALL_S) -> Any:
    """Call a method of a coordinator. Raises ServiceError if the coordinator does not answer within `timeout_s`."""
    try:
        return ray.get(method.remote(), timeout=timeout_s)
    except ray.exceptions.RayError as error:
        raise ServiceError(
            f"service {name} did not answer within {timeout_s:.0f} s: {last_line(error)} Check the nodes of the "
            "cluster with: ray status"
        ) from None
