"""The workers of a service: starts, watches and ends them, between the least and the largest number.

Ray places the workers on the nodes, spread evenly. A worker that waits for a node is what Ray's autoscaler sees: it
adds a node if the cluster has an autoscaler. A node whose store is missing or different is remembered with the reason
and gets no further worker for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pipeline.service.protocol import PROTOCOL_VERSION, ServiceConfig
from pipeline.service.worker import CONCURRENCY, Worker, WorkerInfo
from prep.version import package_version

_CHECK_S = 2.0  # time between two pings of a worker
_SILENT_S = 30.0  # a worker that answers no ping for this time is replaced
_BAD_NODE_S = 60.0  # time after which a node that could not be used is tried again


class WorkerHandle:
    """A worker as the coordinator sees it."""

    def __init__(self, actor: Any, info: WorkerInfo) -> None:
        self.actor, self.info = actor, info
        self.busy = 0  # number of blocks in the worker
        self.used_s = time.monotonic()  # time at which it last got a block


class WorkerGroup:
    """Keeps the wanted number of workers ready. Runs in the event loop of the coordinator."""

    def __init__(self, ray: ModuleType, config: ServiceConfig, on_change: Callable[[], None]) -> None:
        """`on_change` is called when a worker becomes ready."""
        self._ray, self._config, self._on_change = ray, config, on_change
        self.ready: list[WorkerHandle] = []
        # actor -> (task that waits until the worker is ready, nodes on which it must not start)
        self.starting: dict[Any, tuple[asyncio.Task[None], frozenset[str]]] = {}
        self.bad_nodes: dict[str, tuple[str, str, float]] = {}  # node -> (host, reason, time)
        self.last_fault = ""  # why the last worker could not start at all
        self._full_s = time.monotonic()  # time at which all workers, ready or starting, were wanted last

    def free(self) -> WorkerHandle | None:
        """The least busy worker that can take a block; None if there is none."""
        worker = min(self.ready, key=lambda handle: handle.busy, default=None)
        return worker if worker is not None and worker.busy < CONCURRENCY else None

    def fault(self) -> str:
        """Why a worker could not start; empty if all could."""
        reasons = [f"node {host}: {why}" for host, why, _ in self.bad_nodes.values()]
        return "; ".join(dict.fromkeys(reasons)) or self.last_fault

    def adjust(self, load: int) -> None:
        """Start or end workers for `load` blocks that wait or are being made."""
        now = time.monotonic()
        least, most = self._config.min_workers, self._config.max_workers
        wanted = max(least, min(most, -(-load // CONCURRENCY)))
        self.bad_nodes = {node: bad for node, bad in self.bad_nodes.items() if now - bad[2] < _BAD_NODE_S}
        for actor, (task, excluded) in list(self.starting.items()):
            if excluded - self.bad_nodes.keys():  # a node may be tried again: let the worker start there too
                self._cancel_start(actor, task)
        for _ in range(wanted - len(self.ready) - len(self.starting)):
            self._start()
        if wanted >= len(self.ready) + len(self.starting):
            self._full_s = now
        idle = [handle for handle in self.ready if not handle.busy and now - handle.used_s > self._config.idle_s]
        for handle in idle[: max(0, len(self.ready) - wanted)]:
            self.remove(handle)
        if now - self._full_s > self._config.idle_s:  # for example, Ray has no node for these workers
            for actor, (task, _) in list(self.starting.items())[: len(self.ready) + len(self.starting) - wanted]:
                self._cancel_start(actor, task)

    def remove(self, handle: WorkerHandle) -> None:
        """End a worker that is lost or no longer needed."""
        if handle in self.ready:
            self.ready.remove(handle)
        with contextlib.suppress(Exception):
            self._ray.kill(handle.actor)

    async def watch(self) -> None:
        """Ping the workers until the task is cancelled, and remove those that do not answer."""
        while True:
            await asyncio.sleep(_CHECK_S)
            await asyncio.gather(*(self._ping(handle) for handle in list(self.ready)))

    def close(self) -> None:
        """End all workers."""
        for handle in list(self.ready):
            self.remove(handle)
        for actor, (task, _) in list(self.starting.items()):
            self._cancel_start(actor, task)

    def _start(self) -> None:
        options: dict[str, Any] = {
            "num_cpus": self._config.threads,
            "max_concurrency": CONCURRENCY + 1,  # pings are answered while blocks are made
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
        }
        if self.bad_nodes:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self.bad_nodes)})"}
        worker_class = self._ray.remote(Worker)
        actor = worker_class.options(**options).remote(self._config, (PROTOCOL_VERSION, package_version()))
        task = asyncio.get_running_loop().create_task(self._await_start(actor))
        self.starting[actor] = task, frozenset(self.bad_nodes)

    def _cancel_start(self, actor: Any, task: asyncio.Task[None]) -> None:
        task.cancel()
        self.starting.pop(actor, None)
        with contextlib.suppress(Exception):
            self._ray.kill(actor)

    async def _await_start(self, actor: Any) -> None:
        info: WorkerInfo | None = None
        try:
            info = await actor.open.remote()
        except Exception as error:  # any failure of the worker's process, its node or its imports
            self.last_fault = f"a worker could not start: {' '.join(str(error).split())[-300:]}"
            await asyncio.sleep(1)  # a worker that can never start must not be started in a busy loop
        self.starting.pop(actor, None)
        if info is None:
            pass
        elif info.fault:
            self.bad_nodes[info.node] = (info.host, info.fault, time.monotonic())
            self._ray.kill(actor)
        else:
            self.ready.append(WorkerHandle(actor, info))
            self.last_fault = ""
        self._on_change()

    async def _ping(self, handle: WorkerHandle) -> None:
        try:
            await asyncio.wait_for(handle.actor.ping.remote(), _SILENT_S)
        except Exception:  # the worker or its node is gone, or it hangs
            self.remove(handle)
            self._on_change()
