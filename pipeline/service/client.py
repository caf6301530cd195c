"""Client of a service, which a loader uses to request blocks of batches from the coordinator and to read their pixels.

The pixels come from Ray's object store. A block is one batch of a stream, or several consecutive batches.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any, cast

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
    checked_windows,
    request_digest,
)
from pipeline.service.status import ServiceStatus
from pipeline.windows import WindowRequest, Windows
from prep.cluster import AUTO, NAMESPACE, connected
from prep.store.lmdb_file import store_error
from prep.version import package_version

_POLL_S = 0.5  # interval at which a waiting call checks whether the loader was closed
_ALIVE_S = 2.0  # interval at which the client tells the service that the consumer is still running
# Longest time that one call of `ray.get` waits for an object. If a call reaches this limit, Ray restarts the transfer
# of an object from another node.
_GET_S = 4.0
_TRANSFER_S = 12.0  # if the pixels of a block do not arrive within this time, the client requests the block again
# A service that gives no answer for this time counts as lost. Ray needs up to 30 s to detect that a node has died, and
# a few seconds to start the coordinator on another node.
LOST_S = float(os.environ.get("ALEXSTREAM_LOST_S", "45"))
_MAX_BLOCKS = 32  # largest number of blocks that a loader requests at the same time


def parse_service(service: str) -> tuple[str, str]:
    """Split `NAME` or `NAME@HOST:PORT` into the name of the service and the address of the cluster.

    Without an address, the address is AUTO. Raises ServiceError if the name or the address is empty.
    """
    name, separator, address = service.partition("@")
    if not name or (separator and not address):
        raise ServiceError(f"service {service!r}: expected NAME or NAME@HOST:PORT.")
    return name, address or AUTO


def service_names(ray: ModuleType) -> list[str]:
    """Return the sorted names of the services that run in the cluster."""
    prefix = actor_name("")
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"].removeprefix(prefix) for actor in actors if actor["name"].startswith(prefix))


def find_service(ray: ModuleType, name: str, address: str) -> Any:
    """Return the coordinator of a service.

    If there is no such service, raises ServiceError with the names that exist.
    """
    try:
        return ray.get_actor(actor_name(name), NAMESPACE)
    except ValueError:
        names = service_names(ray)
        raise ServiceError(
            f"service {name}: cluster {address} has no such service (services of the cluster: "
            f"{', '.join(names) or 'none'}). Start the service with: alexstream serve --store STORE --name {name} "
            f"--cluster {address}"
        ) from None


class ServiceClient:
    """A consumer of a service: one loader that reads from the service.

    Several threads may call `fetch` at the same time.
    """

    def __init__(self, service: str, stream: StreamKey, waited_s: Callable[[], float]) -> None:
        """Connect to the cluster and to the service.

        `waited_s()` returns the seconds for which the training loop has waited for batches of this loader so far.
        Raises ServiceError if there is no such service, if the service's store has another fingerprint, or if the
        service runs another version of this package.
        """
        self.name, self._address = parse_service(service)
        self._stream, self._waited_s, self._reported_s = stream, waited_s, 0.0
        self._consumer = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
        self._lock = threading.Lock()
        self._first_needed, self._received = 0, set[int]()
        self._generation = 0  # number of calls of `start`
        self._calls = 0  # number of Call objects sent to the coordinator
        self._closed = threading.Event()
        self._lost = ""  # why the service is lost; empty while the service answers
        self._health = Health(0, 0)
        self._calls_changed = threading.Condition()
        self._running_calls = 0  # number of threads that are calling Ray
        self._has_left = False  # True after this consumer has left the cluster
        self._exit = ExitStack()
        self._ray = self._exit.enter_context(connected(self._address))
        try:
            self._coordinator = find_service(self._ray, self.name, self._address)
            self._heard_s = time.monotonic()
            version = self._call(self._method("begin"))
            config: ServiceConfig = self._call(self._method("config"))
            self._check(version, config)
        except BaseException:
            self._exit.close()
            raise
        self._ahead = config.ahead
        self.block_steps = block_steps(stream.batch_size, config.ahead, config.max_workers)
        # Number of blocks to request at the same time: enough to keep all workers busy, and at most as many as the
        # service keeps.
        blocks = min(2 * config.max_workers + 2, _MAX_BLOCKS)
        self.read_ahead = min(blocks * self.block_steps, config.ahead)
        self._thread = threading.Thread(target=self._show_life, daemon=True, name="alexstream-alive")
        self._thread.start()

    @property
    def status(self) -> ServiceStatus:
        """The state that the service sent with its last answer."""
        return ServiceStatus(self.name, self._health.workers, self._health.queue, "connected")

    def start(self, position: int) -> None:
        """Start reading at a position of the stream. Calls of `fetch` that are still waiting end with ServiceError."""
        with self._lock:
            self._generation += 1
            self._first_needed, self._received = position, set()

    def fetch(self, position: int, requests: Sequence[WindowRequest]) -> Windows:
        """Wait until the block of `requests` is ready, and return the windows of the block.

        `position` is the position of the block's first batch. Raises StoreError for a damaged record, ServiceLost if
        the service no longer answers, and ServiceError if the service fails or sends arrays of an unexpected type or
        shape.
        """
        request, steps = WindowRequest.joined(requests), len(requests)
        generation, digest, lost = self._generation, request_digest(request), ""
        while True:
            # A call of `fetch` may be scheduled before a call of `start`, and run only after it. The service may then
            # no longer keep the block that the late call of `fetch` requests.
            if generation != self._generation or not 0 <= position - self._first_needed <= self._ahead:
                raise ServiceError(f"service {self.name}: the loader continued at another position.")
            fetch = Fetch(position, steps, request, digest, lost)
            answer: Answer = self._call(partial(self._ask, fetch))
            if answer.damage:
                raise store_error(answer.damage)
            if answer.fault:
                raise ServiceError(f"service {self.name}: {answer.fault}. See: alexstream status --name {self.name}")
            if not answer.pixels:
                continue
            pixels = self._get(answer.pixels[0])
            if pixels is None:
                lost = answer.pixels[0].hex()
                continue
            windows = checked_windows(self.name, pixels, answer, request)
            with self._lock:
                if generation == self._generation:
                    self._received.update(range(position, position + steps))
                    while self._first_needed in self._received:
                        self._received.remove(self._first_needed)
                        self._first_needed += 1
            return windows

    def finish(self) -> None:
        """Tell the service that this consumer needs no further batch for now."""
        with suppress(Exception), self._call_of_ray():
            # If this call fails, the service removes the consumer after `forget_s` seconds.
            self._method("leave")(self._consumer)

    def stop(self) -> None:
        """End all running calls of `fetch` with ServiceError."""
        self._closed.set()

    def close(self) -> None:
        """Leave the service and the cluster."""
        self.stop()
        self._thread.join()
        if not self._lost:
            self.finish()
        self._leave_cluster()

    @contextmanager
    def _call_of_ray(self) -> Iterator[None]:
        """A context in which a thread calls Ray. Raises ConnectionError if this consumer has left the cluster."""
        with self._calls_changed:
            if self._has_left:
                raise ConnectionError("this consumer has left the cluster")
            self._running_calls += 1
        try:
            yield
        finally:
            with self._calls_changed:
                self._running_calls -= 1
                self._calls_changed.notify_all()

    def _leave_cluster(self) -> None:
        """Leave the cluster after all running calls of Ray have ended.

        If Ray disconnects while a thread waits in `ray.get`, the thread never returns, or the process crashes.
        """
        with self._calls_changed:
            self._has_left = True
            self._calls_changed.wait_for(lambda: not self._running_calls)
        self._exit.close()

    def _method(self, name: str) -> Callable[..., Any]:
        """Return a function that calls a method of the coordinator.

        The function returns Ray's reference to the result of the call. A failed call is repeated by the method `_call`,
        and must not be repeated by Ray: if Ray did so while this process leaves the cluster, Ray could end the process.
        """
        return cast(Callable[..., Any], getattr(self._coordinator, name).options(max_task_retries=0).remote)

    def _ask(self, fetch: Fetch) -> Any:
        return self._method("fetch")(self._say(), fetch)

    def _say(self) -> Call:
        with self._lock:
            self._calls += 1
            return Call(self._consumer, self._stream, self._first_needed, 0.0, self._calls)

    def _call(self, method: Callable[[], Any]) -> Any:
        """Call the coordinator and return the result.

        Raises ServiceLost if the service was stopped, or if no answer comes within LOST_S seconds.
        """
        exceptions = self._ray.exceptions
        reference = None
        while not self._closed.is_set() and not self._lost:
            try:
                with self._call_of_ray():
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
                self._lost = "the service was stopped, or its node was removed"
            except exceptions.RayTaskError as error:
                raise ServiceError(f"service {self.name}: {last_line(error)}") from None
            except (exceptions.RayError, ConnectionError, RuntimeError, OSError) as error:
                self._lost = self._lost or last_line(error)
            silent_s = time.monotonic() - self._heard_s
            if silent_s > LOST_S:
                self._lost = f"the service has not answered for {silent_s:.0f} s (limit: {LOST_S:.0f} s)"
        if self._closed.is_set():
            raise ServiceError(f"service {self.name}: the loader is closed.")
        raise ServiceLost(
            f"service {self.name} is lost: {self._lost}. Start the service again (alexstream serve), or train without "
            "the service: pass --service-fallback local, or leave out --service."
        )

    def _get(self, reference: Any) -> Any:
        """Return the pixels to which a reference points; None if they are lost or do not arrive within _TRANSFER_S."""
        exceptions = self._ray.exceptions
        deadline = time.monotonic() + _TRANSFER_S
        while time.monotonic() < deadline and not self._closed.is_set() and not self._lost:
            try:
                with self._call_of_ray():
                    return self._ray.get(reference, timeout=_GET_S)
            except exceptions.GetTimeoutError:
                continue
            except exceptions.RayError:
                return None
            except (ConnectionError, RuntimeError, OSError) as error:
                self._lost = self._lost or last_line(error)
                return None
        return None

    def _check(self, version: tuple[int, str], config: ServiceConfig) -> None:
        ours = PROTOCOL_VERSION, package_version()
        if tuple(version) != ours:
            raise ServiceError(
                f"service {self.name} runs alexnet {version[1]} (protocol {version[0]}), this program is alexnet "
                f"{ours[1]} (protocol {ours[0]}). Install the same version on all machines."
            )
        theirs = config.fingerprints.get(self._stream.split)
        if theirs != self._stream.fingerprint:
            raise ServiceError(
                f"service {self.name} serves another store: split {self._stream.split} has fingerprint "
                f"{(theirs or 'none')[:16]} in {config.store}, the store of this loader has "
                f"{self._stream.fingerprint[:16]}. Choose a service of this loader's store, or choose the store "
                "of this service."
            )

    def _show_life(self) -> None:
        """Tell the service every _ALIVE_S that this consumer is running, until the client is closed.

        If the service is lost, disconnect from the cluster.
        """
        while not self._closed.wait(_ALIVE_S) and not self._lost:
            total_s = self._waited_s()
            call = self._say()._replace(waited_s=total_s - self._reported_s)
            with suppress(ServiceError):  # the next call of `fetch` raises the error
                self._health = self._call(partial(self._method("alive"), call))
                self._reported_s = total_s
        if not self._closed.is_set():
            # The Ray node may end soon. When a Ray node ends, Ray ends every process that is still connected to the
            # object store of the node, so this process disconnects first. Arrays that it still uses stay valid.
            self._leave_cluster()
