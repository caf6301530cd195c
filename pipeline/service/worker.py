"""Worker of a service: a Ray actor on one node that decodes and crops blocks of batches for the coordinator."""

from __future__ import annotations

import math
import mmap
import os
import socket
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.service.protocol import PROTOCOL_VERSION, ServiceConfig
from pipeline.windows import WindowMaker, WindowRequest
from prep.cluster import ray_module
from prep.store.extra import Column
from prep.store.manifest import Store, StoreError
from prep.version import package_version

CONCURRENCY = 2  # number of blocks in a worker: one is decoded while the other is copied to shared memory


class WorkerInfo(NamedTuple):
    """Location of a worker, and whether the worker can serve the store."""

    node: str  # Ray's id of the node
    host: str  # name of the machine
    pid: int
    fault: str  # why the store cannot be served on this node; empty if it can be served


class Made(NamedTuple):
    """The part of a worker's result that is sent to the coordinator. The pixels stay in Ray's object store."""

    labels: Any  # int64 (N,); None if a record is damaged
    damage: str  # text of the StoreError for a damaged record; empty if no record is damaged
    sources: tuple[str, ...] = ()  # Windows.sources
    extra: Mapping[str, Column] = {}  # Windows.extra


class BlockMemory:
    """Memory for the pixels of blocks. The memory of a block is reused after the array of the block was deleted.

    In threads other than the main thread, malloc returns freed memory of more than 64 MB to the operating system, which
    then has to clear all pages of every new block. This would take 5 % of a worker's time.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def array(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return a uint8 array of undefined values. Several threads may call this method at the same time."""
        size = math.prod(shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = mmap.mmap(-1, max(size, 1))
        if len(memory) < size:
            memory = mmap.mmap(-1, size)
        array = np.ndarray(shape, np.uint8, memory)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array


class Worker:
    """Reads the store on the worker's own node, at the path in the service's settings."""

    def __init__(self, config: ServiceConfig, versions: tuple[int, str]) -> None:
        """`versions` are the coordinator's PROTOCOL_VERSION and package version."""
        self._config, self._versions = config, versions
        self._memory = BlockMemory()
        self._maker: WindowMaker | None = None

    def open(self) -> WorkerInfo:
        """Open the store on this node, and compare its fingerprints with those in the settings of the service."""
        fault = self._fault()
        node = ray_module().get_runtime_context().get_node_id()
        return WorkerInfo(node, socket.gethostname(), os.getpid(), fault)

    def ping(self) -> bool:
        """Return True. The coordinator calls this method to check that the worker still responds."""
        return True

    def make(self, request: WindowRequest) -> tuple[Any, Made]:
        """Decode and crop a block. Ray returns the pixels and the other values as two separate objects."""
        assert self._maker is not None
        try:
            windows = self._maker.make(request, self._memory.array)
        except StoreError as error:
            return None, Made(None, str(error))
        return windows.pixels, Made(windows.labels, "", windows.sources, windows.extra)

    def _fault(self) -> str:
        if self._versions != (PROTOCOL_VERSION, package_version()):
            return (
                f"alexnet {package_version()} (protocol {PROTOCOL_VERSION}) is installed, the service runs alexnet "
                f"{self._versions[1]} (protocol {self._versions[0]})"
            )
        try:
            store = Store.open(self._config.store)
            for name, fingerprint in self._config.fingerprints.items():
                found = store.split(name).fingerprint
                if found != fingerprint:
                    return (
                        f"the store at {store.root} differs: split {name} has fingerprint {found[:16]}, the service "
                        f"expects {fingerprint[:16]}"
                    )
                store.shard_paths(name)
        except (StoreError, OSError) as error:
            return str(error)
        self._maker = WindowMaker(store, self._config.threads)
        return ""
