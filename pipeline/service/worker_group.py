"""Starts, checks and stops the workers of a service.

The number of workers stays between `min_workers` and `max_workers` of ServiceConfig. Ray spreads the workers evenly
over the nodes. If no node has enough free cores for a worker, the start of the worker waits, and an autoscaler, if the
cluster has one, adds a node. A node on which the store is missing or different gets no worker for _BAD_NODE_S, and
`alexstream status` shows the reason.
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

_CHECK_S = 2.0  # interval between two pings of a worker
_SILENT_S = 30.0  # a worker that does not answer a ping within this time is replaced
_BAD_NODE_S = 60.0  # a node on which the store cannot be served gets no worker for this time


class WorkerHandle:
    """What the coordinator knows about one worker."""

    def __init__(self, actor: Any, info: WorkerInfo) -> None:
        self.actor, self.info = actor, info
        self.busy = 0  # number of blocks that the worker is making
        # True while the worker makes a block during which another worker died. The worker then gets no second block.
        self.is_alone = False
        self.used_s = time.monotonic()  # time at which the worker got its latest block


class WorkerGroup:
    """Keeps as many workers running as the load requires. Runs in the asyncio event loop of the coordinator."""

    def __init__(self, ray: ModuleType, config: ServiceConfig, on_change: Callable[[], None]) -> None:
        """`on_change()` is called when a worker has become ready, has failed to start or has been lost."""
        self._ray, self._config, self._on_change = ray, config, on_change
        self.ready: list[WorkerHandle] = []
        # actor -> (task that waits until the worker is ready, ids of the nodes on which the worker must not start)
        self.starting: dict[Any, tuple[asyncio.Task[None], frozenset[str]]] = {}
        # id of a node on which the store cannot be served -> (host name, reason, time of the failed check)
        self.bad_nodes: dict[str, tuple[str, str, float]] = {}
        self.last_fault = ""  # reason why the last start of a worker failed; empty after a worker has started
        self._full_s = time.monotonic()  # last time at which the load required all ready and starting workers

    def free(self, alone: bool) -> WorkerHandle | None:
        """Return the least busy worker that can take another block; None if all workers are busy.

        If `alone` is True, only a worker without a block is returned.
        """
        workers = (worker for worker in self.ready if not worker.is_alone)
        worker = min(workers, key=lambda handle: handle.busy, default=None)
        return worker if worker is not None and worker.busy < (1 if alone else CONCURRENCY) else None

    def fault(self) -> str:
        """Return the reason why workers could not start; empty if no start has failed."""
        reasons = [f"node {host}: {why}" for host, why, _ in self.bad_nodes.values()]
        return "; ".join(dict.fromkeys(reasons)) or self.last_fault

    def adjust(self, load: int) -> None:
        """Start or stop workers. `load` is the number of blocks that wait in the queue or are being made."""
        now = time.monotonic()
        least, most = self._config.min_workers, self._config.max_workers
        wanted = max(least, min(most, -(-load // CONCURRENCY)))
        self.bad_nodes = {node: bad for node, bad in self.bad_nodes.items() if now - bad[2] < _BAD_NODE_S}
        for actor, (task, excluded) in list(self.starting.items()):
            # One of the excluded nodes can be used again. Start the worker anew, so that Ray may choose this node.
            if excluded - self.bad_nodes.keys():
                self._cancel_start(actor, task)
        for _ in range(wanted - len(self.ready) - len(self.starting)):
            self._start()
        if wanted >= len(self.ready) + len(self.starting):
            self._full_s = now
        idle = [handle for handle in self.ready if not handle.busy and now - handle.used_s > self._config.idle_s]
        for handle in idle[: max(0, len(self.ready) - wanted)]:
            self.remove(handle)
        if now - self._full_s > self._config.idle_s:  # these workers are still waiting for a node, but are not needed
            for actor, (task, _) in list(self.starting.items())[: len(self.ready) + len(self.starting) - wanted]:
                self._cancel_start(actor, task)

    def remove(self, handle: WorkerHandle) -> None:
        """Kill a worker, because it does not respond or is no longer needed."""
        if handle in self.ready:
            self.ready.remove(handle)
        with contextlib.suppress(Exception):
            self._ray.kill(handle.actor)

    async def watch(self) -> None:
        """Ping all workers every _CHECK_S until the task is cancelled. Removes workers that do not answer."""
        while True:
            await asyncio.sleep(_CHECK_S)
            await asyncio.gather(*(self._ping(handle) for handle in list(self.ready)))

    def close(self) -> None:
        """Stop all workers, including workers that are starting."""
        for handle in list(self.ready):
            self.remove(handle)
        for actor, (task, _) in list(self.starting.items()):
            self._cancel_start(actor, task)

    def _start(self) -> None:
        options: dict[str, Any] = {
            "num_cpus": self._config.threads,
            "max_concurrency": CONCURRENCY + 1,  # one call more than blocks, so that a busy worker can answer a ping
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
            await asyncio.sleep(1)  # if every start fails, each worker is started at most once a second
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
        except Exception:  # the worker has died, its node has died, or the worker hangs
            self.remove(handle)
            self._on_change()
