"""Coordinator of a service, a named Ray actor.

The coordinator lets a worker make each block once, and gives the block to every consumer that requests it. A consumer
is a loader that reads from the service. A block is one batch of a stream, or several consecutive batches
(pipeline.service.protocol.block_steps).

    loader ── Fetch: record numbers and window positions ──▶ coordinator ── request ──▶ worker, on any node
    loader ◀── reference to the pixels, and labels ─────────    │      ◀── labels ──       │
       └──────── pixels, through Ray's object store, from the worker's node ◀──────────────┘

A block is a pure function of the records and window positions in its request. A lost block can therefore be made again
with the same bits. If a worker or its node dies, the coordinator gives the block to another worker. If the pixels of a
block are lost with a node, the loader requests the block again. If the coordinator dies, Ray starts it again. The next
calls of the consumers then tell the new coordinator which consumers exist.

The loader determines the order of the blocks of a stream by the order of its requests. The number of workers has no
influence on this order.

The coordinator does not read the pixels, and only keeps references to them. Ray frees the pixels of a block when the
coordinator has dropped the reference and no consumer uses the pixels.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Mapping
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
from prep.store.extra import Column
from prep.version import package_version

# If a block is not ready within this time, the coordinator returns an empty Answer, which shows that the service still
# runs.
_ANSWER_S = 1.0
_TICK_S = 0.25  # interval at which the coordinator checks consumers and workers
# When this number of workers have died while making the same block, the consumers of the block get an error.
_MAX_TRIES = 20


@dataclass
class _Block:
    """A block of batches: waiting in the queue, being made by a worker, or ready."""

    stream: StreamKey
    fetch: Fetch
    tries: int = 0  # number of workers that have died while making this block
    pixels: Any = None  # reference to the windows in Ray's object store; None until the block is ready
    labels: Any = None
    sources: tuple[str, ...] = ()
    extra: Mapping[str, Column] = field(default_factory=dict)
    damage: str = ""
    fault: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def size_bytes(self) -> int:
        """Size of the windows and labels in bytes."""
        request = self.fetch.request
        return request.window_bytes + LABEL_BYTES * len(request.numbers)


_Key = tuple[StreamKey, int, bytes]  # stream, position of the block's first batch, digest of the request


class Coordinator:
    """Class of the coordinator's Ray actor. All methods run in one asyncio event loop."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._ray = ray_module()
        import ray.util.metrics

        self._metrics = Metrics(ray.util.metrics, config.name)
        self._sharing = Sharing(config.ahead, config.consumers, config.patience_s, config.forget_s)
        self._blocks: dict[_Key, _Block] = {}
        self._queue: deque[_Block] = deque()
        self._making = 0  # number of blocks that workers are making
        self._made = 0  # number of images made since the start
        self._retried = 0  # number of batches made again since the start
        self._started_s = time.time()
        # Last time at which workers were not known to be missing: a worker was ready, the queue was empty, or no start
        # of a worker had failed.
        self._worked_s = time.monotonic()
        self._group: WorkerGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self) -> tuple[int, str]:
        """Start the workers, unless they are already running. Returns PROTOCOL_VERSION and the package's version."""
        if self._group is None:
            self._group = WorkerGroup(self._ray, self._config, self._dispatch)
            self._spawn(self._tick())
            self._spawn(self._group.watch())
            self._group.adjust(0)
        return PROTOCOL_VERSION, package_version()

    async def config(self) -> ServiceConfig:
        """Return the settings of the service."""
        return self._config

    async def fetch(self, call: Call, fetch: Fetch) -> Answer:
        """Return the block of a request.

        The returned Answer is empty if the block is not ready within _ANSWER_S, or if the consumer must wait for slower
        consumers. After an empty Answer, the consumer calls `fetch` again.
        """
        await self._hear(call)
        deadline = time.monotonic() + _ANSWER_S
        last = fetch.position + fetch.steps - 1
        while not self._sharing.may_have(call.consumer, last, time.monotonic()):
            if time.monotonic() > deadline:
                return Answer()
            await asyncio.sleep(0.02)
            if call.consumer not in self._sharing.consumers:  # the consumer has left while the call was waiting
                return Answer()
        block = self._block(call.stream, fetch)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(block.done.wait(), max(0.01, deadline - time.monotonic()))
        if not block.done.is_set():
            return Answer()
        if block.damage or block.fault:  # a failed block is not kept, because the store may be repaired later
            self._drop((call.stream, fetch.position, fetch.digest), block)
            return Answer(damage=block.damage, fault=block.fault)
        self._metrics.served(len(fetch.request.numbers), block.size_bytes)
        return Answer((block.pixels,), block.labels, block.sources, block.extra)

    async def alive(self, call: Call) -> Health:
        """Record that a consumer is still running. Each consumer calls this method every few seconds."""
        await self._hear(call)
        self._metrics.waited(call.waited_s)
        assert self._group is not None
        return Health(len(self._group.ready), self._queued_batches())

    async def leave(self, consumer: str) -> None:
        """Remove a consumer that has ended, and drop the blocks that only this consumer needed."""
        self._sharing.leave(consumer)
        self._drop_unneeded()

    async def status(self) -> dict[str, Any]:
        """Return the state of the service, which `alexstream status` prints."""
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
                {"host": worker.info.host, "node": worker.info.node, "pid": worker.info.pid, "blocks": worker.busy}
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
            "queue": self._queued_batches(),
            "kept_bytes": self._kept_bytes(),
            "images_made": self._made,
            "retries": self._retried,
        }

    async def close(self) -> None:
        """Stop the workers. Call this method before the actor of the coordinator is killed."""
        for task in self._tasks:
            task.cancel()
        if self._group is not None:
            self._group.close()

    async def _hear(self, call: Call) -> None:
        await self.begin()
        if self._sharing.touch(call, time.monotonic()):
            self._drop_unneeded()

    def _block(self, stream: StreamKey, fetch: Fetch) -> _Block:
        """Return the block of a request.

        If the block is new, or if its pixels were lost, the block is put into the queue.
        """
        key = stream, fetch.position, fetch.digest
        block = self._blocks.get(key)
        if block is not None and fetch.lost and block.pixels is not None and block.pixels.hex() == fetch.lost:
            self._count_retry(block)
            block = None
        if block is None:
            block = self._blocks[key] = _Block(stream, fetch)
            self._queue.append(block)
            self._dispatch()
        return block

    def _dispatch(self) -> None:
        """Give blocks from the queue to free workers.

        If a worker has died, one of the blocks that the worker was making may be the cause. Each of these blocks is
        then given to a worker that makes no other block at the same time, so that a block that crashes its worker does
        not affect other blocks.
        """
        assert self._group is not None
        while self._queue and (worker := self._group.free(alone=self._queue[0].tries > 0)) is not None:
            block = self._queue.popleft()
            if not self._is_needed(block):  # all consumers of the block have ended
                self._drop((block.stream, block.fetch.position, block.fetch.digest), block)
                continue
            worker.busy += 1
            worker.is_alone = block.tries > 0
            worker.used_s = time.monotonic()
            self._making += 1
            self._spawn(self._make(block, worker))

    async def _make(self, block: _Block, worker: WorkerHandle) -> None:
        """Let a worker make a block. If the worker dies, put the block at the front of the queue."""
        assert self._group is not None
        try:
            pixels, about = worker.actor.make.options(num_returns=2).remote(block.fetch.request)
            made: Made = await about
            block.pixels, block.labels, block.damage = pixels, made.labels, made.damage
            block.sources, block.extra = made.sources, made.extra
            block.done.set()
            if not made.damage:
                self._made += len(block.fetch.request.numbers)
                self._metrics.made(len(block.fetch.request.numbers), block.size_bytes)
        except Exception as error:  # the worker or its node has died, or the worker raised an unexpected error
            self._group.remove(worker)
            block.tries += 1
            if block.tries < _MAX_TRIES:
                self._count_retry(block)
                self._queue.appendleft(block)
            else:
                block.fault = f"{_MAX_TRIES} workers died while making the same batches. Last error: {last_line(error)}"
                block.done.set()
        finally:
            worker.busy -= 1
            worker.is_alone = False
            self._making -= 1
            self._dispatch()

    async def _tick(self) -> None:
        """Update consumers, blocks and workers every _TICK_S.

        Removes consumers that have stopped calling, drops blocks that no consumer needs, and starts or stops workers.
        """
        while True:
            self._sharing.forget_silent(time.monotonic())
            self._drop_unneeded()
            assert self._group is not None
            self._group.adjust(len(self._queue) + self._making)
            self._dispatch()
            self._give_up_without_workers()
            kept_bytes, consumers = self._kept_bytes(), len(self._sharing.consumers)
            self._metrics.show(self._queued_batches(), len(self._group.ready), consumers, kept_bytes)
            await asyncio.sleep(_TICK_S)

    def _give_up_without_workers(self) -> None:
        """Let all queued blocks fail if workers cannot start and no worker has been ready for `start_s` seconds."""
        assert self._group is not None
        now, fault = time.monotonic(), self._group.fault()
        if self._group.ready or not self._queue or not fault:
            self._worked_s = now
        elif now - self._worked_s > self._config.start_s:
            for block in self._queue:
                block.fault = f"no worker can start: {fault}"
                block.done.set()
            self._queue.clear()

    def _drop_unneeded(self) -> None:
        for key, block in list(self._blocks.items()):
            if not self._is_needed(block):
                self._drop(key, block)

    def _drop(self, key: _Key, block: _Block) -> None:
        if self._blocks.get(key) is block:
            del self._blocks[key]

    def _is_needed(self, block: _Block) -> bool:
        return self._sharing.is_needed(block.stream, block.fetch.position, block.fetch.steps)

    def _kept_bytes(self) -> int:
        return sum(block.size_bytes for block in self._blocks.values() if block.pixels is not None)

    def _count_retry(self, block: _Block) -> None:
        self._retried += block.fetch.steps
        self._metrics.retried(block.fetch.steps)

    def _queued_batches(self) -> int:
        return sum(block.fetch.steps for block in self._queue)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
