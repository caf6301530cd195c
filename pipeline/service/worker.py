"""A worker: an actor on one node that decodes and cuts the blocks that the coordinator gives it."""

from __future__ import annotations

import os
import socket
from typing import Any, NamedTuple

from pipeline.service.protocol import PROTOCOL_VERSION, ServiceConfig
from pipeline.windows import WindowMaker, WindowRequest
from prep.cluster import ray_module
from prep.console import keep_freed_memory
from prep.store.manifest import Store, StoreError
from prep.version import package_version

_KEEP_BYTES = 512_000_000  # freed memory that a worker keeps for the next blocks
CONCURRENCY = 2  # number of blocks in a worker: one is decoded while another one is copied to shared memory


class WorkerInfo(NamedTuple):
    """Where a worker runs, and whether it can work."""

    node: str  # Ray's id of the node
    host: str  # name of the machine
    pid: int
    fault: str  # why the node cannot be used; empty if it can


class Made(NamedTuple):
    """What a worker says about a block, beside its pixels."""

    labels: Any  # int64 (N,); None after damage
    damage: str  # text of the StoreError, or empty


class Worker:
    """Reads the store at the service's path on its own node."""

    def __init__(self, config: ServiceConfig, versions: tuple[int, str]) -> None:
        """`versions` are those of the coordinator: PROTOCOL_VERSION and the package's version."""
        keep_freed_memory(_KEEP_BYTES, map_large_blocks=False)
        self._config, self._versions = config, versions
        self._maker: WindowMaker | None = None

    def open(self) -> WorkerInfo:
        """Open the store and compare it with the service's store."""
        fault = self._fault()
        node = ray_module().get_runtime_context().get_node_id()
        return WorkerInfo(node, socket.gethostname(), os.getpid(), fault)

    def ping(self) -> bool:
        """Answers if the worker lives."""
        return True

    def make(self, request: WindowRequest) -> tuple[Any, Made]:
        """The pixels of a block, and its labels. Ray returns them as two objects."""
        assert self._maker is not None
        try:
            windows = self._maker.make(request)
        except StoreError as error:
            return None, Made(None, str(error))
        return windows.pixels, Made(windows.labels, "")

    def _fault(self) -> str:
        if self._versions != (PROTOCOL_VERSION, package_version()):
            return (
                f"alexnet {package_version()} (service protocol {PROTOCOL_VERSION}) is installed, the service runs "
                f"{self._versions[1]} ({self._versions[0]})"
            )
        try:
            store = Store.open(self._config.store)
            for name, fingerprint in self._config.fingerprints.items():
                found = store.split(name).fingerprint
                if found != fingerprint:
                    return (
                        f"{store.root} has another split {name}: fingerprint {found[:16]}, the service has "
                        f"{fingerprint[:16]}"
                    )
                store.shard_paths(name)
        except (StoreError, OSError) as error:
            return str(error)
        self._maker = WindowMaker(store, self._config.threads)
        return ""
