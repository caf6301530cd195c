"""Connection to a Ray cluster. No other module imports Ray at the start: without Ray, everything on one machine works.

A cluster is named by its address:

    local        a cluster of this machine alone, which starts now and ends with the connection
    auto         the cluster that this machine belongs to (`ray start`), or the address in RAY_ADDRESS
    HOST:PORT    the cluster whose head node listens there. This machine must belong to the cluster, because a program
                 reads the objects of a cluster from the shared memory of its own machine
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from prep.console import UserError

NAMESPACE = "alexnet"  # Ray's namespace of the named actors
LOCAL, AUTO = "local", "auto"
_INSTALL = "Install it with: pip install 'alexnet[cluster]'"
# Ray ends a program that has not reached the head node for this time. A training must outlive the head node, so the
# program itself decides how long it waits.
_NEVER_S = str(10**8)


def ray_module() -> ModuleType:
    """The module ray. Raises UserError with the command that installs Ray if it is missing."""
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", _NEVER_S)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError(f"Ray is not installed. {_INSTALL}") from None
    module: ModuleType = ray
    return module


def check_address(address: str) -> None:
    """Raise UserError unless `address` has a form that the module's docstring lists."""
    if address.startswith("ray://"):
        raise UserError(
            f"cluster {address}: Ray Client is not supported, because it cannot share memory with the cluster. Let "
            "this machine join the cluster (ray start --address HOST:PORT --num-cpus 0), then pass auto."
        )
    if address not in (LOCAL, AUTO) and not re.fullmatch(r"\S+:\d{1,5}", address):
        raise UserError(f"cluster {address!r}: expected local, auto or HOST:PORT.")


class _Connection:
    """The connection of this process, which several `with` blocks can use at the same time."""

    lock = threading.Lock()
    users = 0
    is_ours = False  # whether the first user connected the process


@contextmanager
def connected(address: str, *, cores: int | None = None, dashboard: bool = False) -> Iterator[ModuleType]:
    """Connect this process to a cluster during a `with` block. The value is the module ray.

    address    the cluster: local, auto or HOST:PORT
    cores      number of CPU cores of a local cluster; None: all usable cores
    dashboard  whether a local cluster starts Ray's dashboard

    A process has one connection. The first block connects, the last block disconnects. A connection that the process
    already had is used and stays open. The process keeps its signal handlers. Raises UserError if Ray is missing, if no
    cluster answers, or if the cluster refuses this process.
    """
    check_address(address)
    ray = ray_module()
    with _Connection.lock:
        if not _Connection.users:
            _Connection.is_ours = not ray.is_initialized()
            if _Connection.is_ours:
                _connect(ray, address, cores, dashboard)
        _Connection.users += 1
    try:
        yield ray
    finally:
        with _Connection.lock:
            _Connection.users -= 1
            if not _Connection.users and _Connection.is_ours:
                with _handlers_kept():
                    ray.shutdown()


def _connect(ray: ModuleType, address: str, cores: int | None, dashboard: bool) -> None:
    options: dict[str, Any] = {}
    if address == LOCAL:
        options = {"num_cpus": cores, "include_dashboard": dashboard}
    try:
        with _handlers_kept():
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"cluster {address}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """First sentence of Ray's error, and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, ConnectionError) and "Could not find any running Ray instance" in text:
        return (
            "no Ray cluster runs on this machine. Start one (ray start --head), join one (ray start --address "
            "HOST:PORT), or pass local."
        )
    return f"{text[:400]} Check the address and that this machine has joined the cluster (ray status)."


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep this process's handlers of SIGINT and SIGTERM. Ray's handlers would print a stack and exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # a handler that was not installed from Python
                signal.signal(number, handler)
