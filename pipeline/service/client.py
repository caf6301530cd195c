"""The side of the loader: asks the coordinator for blocks and gets their pixels from Ray's object store."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.service.errors import ServiceError, ServiceLost, last_line
from pipeline.service.protocol import (
    PROTOCOL_VERSION,
    Answer,
    Call,
    Fetch,
    Health,
    ServiceConfig,
    StreamKey,
    actor_name,
    block_steps,
    request_digest,
)
from pipeline.service.status import ServiceStatus
from pipeline.windows import WindowRequest, Windows
from prep.cluster import AUTO, NAMESPACE, connected
from prep.store.manifest import StoreError
from prep.version import package_version

_POLL_S = 0.5  # time between two looks at whether the loader was closed
_ALIVE_S = 2.0  # time between two signs of life
# Longest wait for an object in one call of Ray. After this time, Ray begins the transfer between nodes anew.
_GET_S = 4.0
_TRANSFER_S = 12.0  # a block that has not arrived after this time is asked for again, from another worker
# A service that answers nothing for this time is lost. Ray needs up to 30 s to notice that a node is gone and a few
# seconds to start the coordinator on another node.
LOST_S = float(os.environ.get("ALEXSTREAM_LOST_S", "60"))
_MAX_BLOCKS = 32  # number of blocks that a loader asks for at the same time


def parse_service(service: str) -> tuple[str, str]:
    """Name and cluster address of `NAME` or `NAME@HOST:PORT`. Raises UserError if one of them is empty."""
    name, separator, address = service.partition("@")
    if not name or (separator and not address):
        raise ServiceError(f"service {service!r}: expected NAME or NAME@HOST:PORT.")
    return name, address or AUTO


def service_names(ray: ModuleType) -> list[str]:
    """The names of the services of the cluster, sorted."""
    prefix = actor_name("")
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"].removeprefix(prefix) for actor in actors if actor["name"].startswith(prefix))


def find_service(ray: ModuleType, name: str, address: str) -> Any:
    """The coordinator of a service. Raises ServiceError with the services that the cluster has."""
    try:
        return ray.get_actor(actor_name(name), NAMESPACE)
    except ValueError:
        names = service_names(ray)
        raise ServiceError(
            f"service {name}: cluster {address} has no such service (it has: {', '.join(names) or 'none'}). Start it "
            f"with: alexstream serve --store STORE --name {name} --cluster {address}"
        ) from None


class ServiceClient:
    """One consumer of a service. Several threads may call `fetch` at the same time."""

    def __init__(self, service: str, stream: StreamKey, waited_s: Callable[[], float]) -> None:
        """Connect to the cluster and to the service.

        `waited_s` gives the time for which the training loop has waited for batches since the start. Raises
        ServiceError if there is no such service, if its store has another fingerprint, or if it runs another version.
        """
        self.name, self._address = parse_service(service)
        self._stream, self._waited_s, self._reported_s = stream, waited_s, 0.0
        self._consumer = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._first_needed, self._received = 0, set[int]()
        self._generation = 0  # counts the calls of `start`
        self._calls = 0  # number of calls of the coordinator that tell a position
        self._closed = threading.Event()
        self._lost = ""  # why the service is lost
        self._health = Health(0, 0)
        self._exit = ExitStack()
        self._ray = self._exit.enter_context(connected(self._address))
        try:
            self._coordinator = find_service(self._ray, self.name, self._address)
            self._heard_s = time.monotonic()
            version = self._call(self._coordinator.begin.remote)
            config: ServiceConfig = self._call(self._coordinator.config.remote)
            self._check(version, config)
        except BaseException:
            self._exit.close()
            raise
        self._ahead = config.ahead
        self.block_steps = block_steps(stream.batch_size, config.ahead, config.max_workers)
        # Number of batches that are asked for at the same time: enough for all workers, within what the service keeps.
        blocks = min(2 * config.max_workers + 2, _MAX_BLOCKS)
        self.read_ahead = min(blocks * self.block_steps, config.ahead)
        self._thread = threading.Thread(target=self._show_life, daemon=True, name="alexstream-alive")
        self._thread.start()

    @property
    def status(self) -> ServiceStatus:
        """The state of the service as of its last answer."""
        return ServiceStatus(self.name, self._health.workers, self._health.queue, "connected")

    def start(self, position: int) -> None:
        """Begin to read at a position. Calls of `fetch` that are under way end."""
        with self._lock:
            self._generation += 1
            self._first_needed, self._received = position, set()

    def fetch(self, position: int, requests: Sequence[WindowRequest]) -> Windows:
        """The windows of consecutive batches, the first of which is at a position; waits until they are made.

        Raises StoreError for a damaged record, ServiceLost if the service no longer answers, and ServiceError if the
        service has a fault or sends something that is not what was asked for.
        """
        request, steps = WindowRequest.joined(requests), len(requests)
        generation, digest, lost = self._generation, request_digest(request), ""
        while True:
            # A job that began before `start` and runs after it has a position that the service does not keep.
            if generation != self._generation or not 0 <= position - self._first_needed <= self._ahead:
                raise ServiceError(f"service {self.name}: the loader continued at another position.")
            fetch = Fetch(position, steps, request, digest, lost)
            answer: Answer = self._call(partial(self._ask, fetch))
            if answer.damage:
                raise StoreError(answer.damage)
            if answer.fault:
                raise ServiceError(f"service {self.name}: {answer.fault}. See: alexstream status --name {self.name}")
            if not answer.pixels:
                continue
            pixels = self._get(answer.pixels[0])
            if pixels is None:
                lost = answer.pixels[0].hex()
                continue
            windows = self._checked(pixels, answer.labels, request)
            with self._lock:
                if generation == self._generation:
                    self._received.update(range(position, position + steps))
                    while self._first_needed in self._received:
                        self._received.remove(self._first_needed)
                        self._first_needed += 1
            return windows

    def finish(self) -> None:
        """Tell the service that this consumer needs no further batch for now."""
        with suppress(Exception):  # the service forgets a consumer that says nothing, too
            self._coordinator.leave.options(max_task_retries=0).remote(self._consumer)

    def stop(self) -> None:
        """End all calls of `fetch`."""
        self._closed.set()

    def close(self) -> None:
        """Leave the service and the cluster."""
        self.stop()
        self._thread.join()
        if not self._lost:
            self.finish()
        self._exit.close()

    def _ask(self, fetch: Fetch) -> Any:
        return self._coordinator.fetch.remote(self._say(), fetch)

    def _say(self) -> Call:
        with self._lock:
            self._calls += 1
            return Call(self._consumer, self._stream, self._first_needed, 0.0, self._calls)

    def _call(self, method: Callable[[], Any]) -> Any:
        """The result of a call of the coordinator. Raises ServiceLost if the service does not answer for LOST_S."""
        exceptions = self._ray.exceptions
        reference = None
        while not self._closed.is_set() and not self._lost:
            try:
                reference = method() if reference is None else reference
                value = self._ray.get(reference, timeout=_POLL_S)
                self._heard_s = time.monotonic()
                return value
            except exceptions.GetTimeoutError:
                pass
            except exceptions.ActorUnavailableError:
                reference = None
                time.sleep(_POLL_S)
            except exceptions.ActorDiedError:
                self._lost = "it was stopped, or its node was removed"
            except exceptions.RayTaskError as error:
                raise ServiceError(f"service {self.name}: {last_line(error)}") from None
            except (exceptions.RayError, ConnectionError, RuntimeError, OSError) as error:
                self._lost = last_line(error)
            silent_s = time.monotonic() - self._heard_s
            if silent_s > LOST_S:
                self._lost = f"it has not answered for {silent_s:.0f} s (limit: {LOST_S:.0f} s)"
        if self._closed.is_set():
            raise ServiceError(f"service {self.name}: the loader is closed.")
        raise ServiceLost(
            f"service {self.name} is lost: {self._lost}. Start the service again (alexstream serve), or go on without "
            "it: --service-fallback local, or no --service."
        )

    def _get(self, reference: Any) -> Any:
        """The pixels of a reference; None if they are lost or do not arrive in time."""
        exceptions = self._ray.exceptions
        deadline = time.monotonic() + _TRANSFER_S
        while time.monotonic() < deadline and not self._closed.is_set():
            try:
                return self._ray.get(reference, timeout=_GET_S)
            except exceptions.GetTimeoutError:
                continue
            except exceptions.RayError:
                return None
            except (ConnectionError, RuntimeError, OSError) as error:
                self._lost = last_line(error)
                return None
        return None

    def _checked(self, pixels: Any, labels: Any, request: WindowRequest) -> Windows:
        """The arrays of an answer, if they have the type and shape that the request asks for."""
        count, side = len(request.numbers), request.window_px
        _expect(self.name, "pixels", pixels, np.dtype(np.uint8), (count, side, side, 3))
        _expect(self.name, "labels", labels, np.dtype(np.int64), (count,))
        return Windows(pixels, labels)

    def _check(self, version: tuple[int, str], config: ServiceConfig) -> None:
        ours = PROTOCOL_VERSION, package_version()
        if tuple(version) != ours:
            raise ServiceError(
                f"service {self.name} runs alexnet {version[1]} (protocol {version[0]}), this program is {ours[1]} "
                f"({ours[0]}). Install the same version on all machines."
            )
        theirs = config.fingerprints.get(self._stream.split)
        if theirs != self._stream.fingerprint:
            raise ServiceError(
                f"service {self.name} serves another store: split {self._stream.split} has fingerprint "
                f"{(theirs or 'none')[:16]} in {config.store}, the store of this loader has "
                f"{self._stream.fingerprint[:16]}. Name the service of this store, or the store of this service."
            )

    def _show_life(self) -> None:
        """Tell the service every few seconds that this consumer lives, until the client is closed.

        If the service is lost, the client leaves the cluster.
        """
        while not self._closed.wait(_ALIVE_S) and not self._lost:
            total_s = self._waited_s()
            call = self._say()._replace(waited_s=total_s - self._reported_s)
            with suppress(ServiceError):  # `fetch` raises it
                self._health = self._call(partial(self._coordinator.alive.remote, call))
                self._reported_s = total_s
        if not self._closed.is_set():
            # Ray ends a process that uses the object store of its node after the node has ended, and the node may end
            # soon. Arrays that this process still uses stay valid.
            self._exit.close()


def _expect(service: str, what: str, array: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != dtype
        or array.shape != shape
        or not array.flags.c_contiguous
    ):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ServiceError(
            f"service {service} sent {what} as {found}, expected {dtype} {shape}. Install the same version of alexnet "
            "on all machines."
        )
    return array
