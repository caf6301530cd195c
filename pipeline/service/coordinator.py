"""The coordinator of a service: a named actor that gives each batch to a worker, once, and hands it to all who ask.

    loader ── Fetch: record numbers and window positions ──▶ coordinator ── request ──▶ worker, on any node
    loader ◀── reference and labels ────────────────────────    │      ◀── labels ──       │
       └──────── pixels, through Ray's object store, from the worker's node ◀──────────────┘

A batch is a pure function of the records and positions in its request. So whoever is lost is asked again: a worker or a
node that dies (the coordinator gives the batch to another worker), an object that is lost with its node (the loader
asks again), the coordinator itself (Ray starts it again; it learns the consumers from their next calls). The order of a
stream is that of the loader's requests. It depends neither on the number of workers nor on who makes a batch.

The coordinator sees no pixels. It owns the references, so Ray frees a batch when the coordinator drops it and no
consumer uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pipeline.service.errors import last_line
from pipeline.service.metrics import Metrics
from pipeline.service.protocol import PROTOCOL_VERSION, Answer, Call, Fetch, Health, ServiceConfig, StreamKey
from pipeline.service.sharing import Sharing
from pipeline.service.worker import Made
from pipeline.service.worker_group import WorkerGroup, WorkerHandle
from pipeline.windows import LABEL_BYTES
from prep.cluster import ray_module
from prep.version import package_version

_ANSWER_S = 1.0  # a call that must wait is answered after this time, so that the consumer knows that it is heard
_TICK_S = 0.25  # time between two looks at consumers and workers
_MAX_TRIES = 20  # number of workers that may be lost with a batch before its consumers get an error


@dataclass
class _Batch:
    """A batch that waits, is being made, or is made."""

    stream: StreamKey
    fetch: Fetch
    tries: int = 0  # number of workers that were lost with this batch
    pixels: Any = None  # reference of the made windows
    labels: Any = None
    damage: str = ""
    fault: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def size_bytes(self) -> int:
        """Bytes of the windows and labels."""
        request = self.fetch.request
        return request.window_bytes + LABEL_BYTES * len(request.numbers)


_Key = tuple[StreamKey, int, bytes]  # stream, position, digest of the request


class Coordinator:
    """The actor's class. All methods run in one event loop."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._ray = ray_module()
        import ray.util.metrics

        self._metrics = Metrics(ray.util.metrics, config.name)
        self._sharing = Sharing(config.ahead, config.consumers, config.patience_s, config.forget_s)
        self._batches: dict[_Key, _Batch] = {}
        self._queue: deque[_Batch] = deque()
        self._making = 0  # number of batches in workers
        self._made = self._retried = 0  # numbers of images and batches since the start
        self._started_s = time.time()
        self._worked_s = time.monotonic()  # time at which there was a worker last, or no batch to make
        self._group: WorkerGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self) -> tuple[int, str]:
        """Start the workers, if they are not started yet. Returns PROTOCOL_VERSION and the package's version."""
        if self._group is None:
            self._group = WorkerGroup(self._ray, self._config, self._dispatch)
            self._spawn(self._tick())
            self._spawn(self._group.watch())
            self._group.adjust(0)
        return PROTOCOL_VERSION, package_version()

    async def config(self) -> ServiceConfig:
        """The settings of the service."""
        return self._config

    async def fetch(self, call: Call, fetch: Fetch) -> Answer:
        """The batch at a position; an empty Answer if it is not ready or the consumer must wait for others."""
        await self._hear(call)
        deadline = time.monotonic() + _ANSWER_S
        while not self._sharing.may_have(call.consumer, fetch.position, time.monotonic()):
            if time.monotonic() > deadline:
                return Answer()
            await asyncio.sleep(0.02)
            if call.consumer not in self._sharing.consumers:  # it has left meanwhile
                return Answer()
        batch = self._batch(call.stream, fetch)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(batch.done.wait(), max(0.01, deadline - time.monotonic()))
        if not batch.done.is_set():
            return Answer()
        if batch.damage or batch.fault:  # not kept: the store may be repaired
            self._drop((call.stream, fetch.position, fetch.digest), batch)
            return Answer(damage=batch.damage, fault=batch.fault)
        self._metrics.served(len(fetch.request.numbers), batch.size_bytes)
        return Answer((batch.pixels,), batch.labels)

    async def alive(self, call: Call) -> Health:
        """Note that a consumer lives. Consumers call this every few seconds."""
        await self._hear(call)
        self._metrics.waited(call.waited_s)
        assert self._group is not None
        return Health(len(self._group.ready), len(self._queue))

    async def leave(self, consumer: str) -> None:
        """Forget a consumer that has ended."""
        self._sharing.leave(consumer)
        self._drop_unneeded()

    async def status(self) -> dict[str, Any]:
        """What `alexstream status` prints."""
        await self.begin()
        assert self._group is not None
        return {
            "name": self._config.name,
            "store": self._config.store,
            "fingerprints": dict(self._config.fingerprints),
            "min_workers": self._config.min_workers,
            "max_workers": self._config.max_workers,
            "threads": self._config.threads,
            "ahead": self._config.ahead,
            "up_s": round(time.time() - self._started_s, 1),
            "workers": [
                {"host": worker.info.host, "node": worker.info.node, "pid": worker.info.pid, "batches": worker.busy}
                for worker in self._group.ready
            ],
            "starting": len(self._group.starting),
            "unused_nodes": [
                {"node": node, "host": host, "why": why} for node, (host, why, _) in self._group.bad_nodes.items()
            ],
            "last_fault": self._group.last_fault,
            "consumers": [
                {
                    "name": name,
                    "split": known.stream.split,
                    "seed": known.stream.seed,
                    "position": known.first_needed,
                    "shares": known.in_group,
                }
                for name, known in self._sharing.consumers.items()
            ],
            "queue": len(self._queue),
            "kept_bytes": self._kept_bytes(),
            "images_made": self._made,
            "retries": self._retried,
        }

    async def close(self) -> None:
        """End the workers, before the actor is killed."""
        for task in self._tasks:
            task.cancel()
        if self._group is not None:
            self._group.close()

    async def _hear(self, call: Call) -> None:
        await self.begin()
        if self._sharing.touch(call, time.monotonic()):
            self._drop_unneeded()

    def _batch(self, stream: StreamKey, fetch: Fetch) -> _Batch:
        """The batch of a request, put into the queue if nobody has asked for it."""
        key = stream, fetch.position, fetch.digest
        batch = self._batches.get(key)
        if batch is not None and fetch.lost and batch.pixels is not None and batch.pixels.hex() == fetch.lost:
            self._count_retry()
            batch = None
        if batch is None:
            batch = self._batches[key] = _Batch(stream, fetch)
            self._queue.append(batch)
            self._dispatch()
        return batch

    def _dispatch(self) -> None:
        """Give waiting batches to free workers."""
        assert self._group is not None
        while self._queue and (worker := self._group.free()) is not None:
            batch = self._queue.popleft()
            if not self._is_needed(batch):  # its consumers have ended
                self._drop((batch.stream, batch.fetch.position, batch.fetch.digest), batch)
                continue
            worker.busy += 1
            worker.used_s = time.monotonic()
            self._making += 1
            self._spawn(self._make(batch, worker))

    async def _make(self, batch: _Batch, worker: WorkerHandle) -> None:
        """Let a worker make a batch. If the worker is lost, the batch is the next to be made."""
        assert self._group is not None
        try:
            pixels, about = worker.actor.make.options(num_returns=2).remote(batch.fetch.request)
            made: Made = await about
            batch.pixels, batch.labels, batch.damage = pixels, made.labels, made.damage
            batch.done.set()
            if not made.damage:
                self._made += len(batch.fetch.request.numbers)
                self._metrics.made(len(batch.fetch.request.numbers), batch.size_bytes)
        except Exception as error:  # the worker, its node or its memory is lost, or it has a fault of its own
            self._group.remove(worker)
            batch.tries += 1
            if batch.tries < _MAX_TRIES:
                self._count_retry()
                self._queue.appendleft(batch)
            else:
                batch.fault = f"{_MAX_TRIES} workers were lost with one batch. The last: {last_line(error)}"
                batch.done.set()
        finally:
            worker.busy -= 1
            self._making -= 1
            self._dispatch()

    async def _tick(self) -> None:
        """Forget silent consumers, drop batches that nobody needs, start or end workers."""
        while True:
            self._sharing.forget_silent(time.monotonic())
            self._drop_unneeded()
            assert self._group is not None
            self._group.adjust(len(self._queue) + self._making)
            self._dispatch()
            self._give_up_without_workers()
            kept_bytes, consumers = self._kept_bytes(), len(self._sharing.consumers)
            self._metrics.show(len(self._queue), len(self._group.ready), consumers, kept_bytes)
            await asyncio.sleep(_TICK_S)

    def _give_up_without_workers(self) -> None:
        """Give the consumers an error if workers cannot start, and none has been ready for `start_s`."""
        assert self._group is not None
        now, fault = time.monotonic(), self._group.fault()
        if self._group.ready or not self._queue or not fault:
            self._worked_s = now
        elif now - self._worked_s > self._config.start_s:
            for batch in self._queue:
                batch.fault = f"no worker can start: {fault}"
                batch.done.set()
            self._queue.clear()

    def _drop_unneeded(self) -> None:
        for key, batch in list(self._batches.items()):
            if not self._is_needed(batch):
                self._drop(key, batch)

    def _drop(self, key: _Key, batch: _Batch) -> None:
        if self._batches.get(key) is batch:
            del self._batches[key]

    def _is_needed(self, batch: _Batch) -> bool:
        return self._sharing.is_needed(batch.stream, batch.fetch.position)

    def _kept_bytes(self) -> int:
        return sum(batch.size_bytes for batch in self._batches.values() if batch.pixels is not None)

    def _count_retry(self) -> None:
        self._retried += 1
        self._metrics.retried()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
