"""Starts, describes and stops services in a cluster."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.service.client import find_service
from pipeline.service.coordinator import Coordinator
from pipeline.service.errors import ServiceError
from pipeline.service.protocol import ServiceConfig, actor_name
from prep.cluster import NAMESPACE
from prep.store.manifest import Store

CALL_S = 30.0  # time after which a service that does not answer is reported


def make_config(store: Path, name: str, min_workers: int, max_workers: int, threads: int, **more: Any) -> ServiceConfig:
    """The settings of a service for a store. Raises StoreError for a store that is missing or incomplete.

    `more` sets further fields of ServiceConfig.
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
            f"service {config.name}: the cluster already has a service of this name. Stop it with: alexstream stop "
            f"--name {config.name}, or choose another --name."
        ) from None
    call(ray, config.name, coordinator.begin)
    return coordinator


def stop_service(ray: ModuleType, name: str, address: str) -> None:
    """Stop a service and its workers. Raises ServiceError if there is no such service."""
    coordinator = find_service(ray, name, address)
    try:
        call(ray, name, coordinator.close)
    finally:
        ray.kill(coordinator, no_restart=True)
    deadline = time.monotonic() + CALL_S
    while time.monotonic() < deadline:  # the name is free only when Ray has removed the actor
        try:
            ray.get_actor(actor_name(name), NAMESPACE)
        except ValueError:
            return
        time.sleep(0.05)


def service_status(ray: ModuleType, name: str, address: str) -> dict[str, Any]:
    """What `alexstream status` prints. Raises ServiceError if there is no such service or if it does not answer."""
    status: dict[str, Any] = call(ray, name, find_service(ray, name, address).status)
    return status


def call(ray: ModuleType, name: str, method: Any) -> Any:
    """The result of a method of a coordinator. Raises ServiceError if it does not answer within CALL_S."""
    try:
        return ray.get(method.remote(), timeout=CALL_S)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ServiceError(
            f"service {name} does not answer within {CALL_S:.0f} s: {(lines or [repr(error)])[-1][:300]} Look at the "
            "cluster with: ray status"
        ) from None
