"""Connection to a Ray cluster. Modules import Ray only when a cluster is used: one machine does not need Ray.

A cluster is named by its address:

    local        a cluster of this machine alone, which starts now and ends with the connection
    auto         the cluster that this machine belongs to (`ray start`), or the address in RAY_ADDRESS
    HOST:PORT    the cluster whose head node listens at this address. This machine must belong to it, because a program
                 reads the objects of a cluster from the shared memory of its own machine
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from prep.console import Terminated, UserError

NAMESPACE = "alexnet"  # Ray's namespace of the named actors
LOCAL, AUTO = "local", "auto"
_INSTALL = "Install it with: pip install 'alexnet[cluster]'"
# Ray ends a program that has not reached the head node for this time. A training must continue without the head node.
# Each program therefore decides itself how long to wait.
_NEVER_S = str(10**8)
_CONNECT_S = 20.0  # time after which a head node that does not accept a connection is reported
_TOKEN = Path("~/.ray/auth_token")  # where Ray looks for the token


def ray_module() -> ModuleType:
    """The module ray. Raises UserError with the command that installs Ray if it is missing."""
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", _NEVER_S)
    # Without this, a call after the end of the connection makes Ray connect to any cluster of this machine.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # A head node that refuses the connection is asked three times, 40 s each. Ray's default is 20 times.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")
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
def connected(
    address: str, *, cores: int | None = None, dashboard: bool = False, object_store_bytes: int | None = None
) -> Iterator[ModuleType]:
    """Connect this process to a cluster during a `with` block. The value is the module ray.

    address             the cluster: local, auto or HOST:PORT
    cores               number of CPU cores of a local cluster; None: all usable cores
    dashboard           whether a local cluster starts Ray's dashboard
    object_store_bytes  size of the object store of a local cluster; None: 30 % of the memory

    A process has one connection. The first block connects, the last block disconnects. A connection that the process
    already had is used and stays open. The process keeps its signal handlers. Raises UserError if Ray is missing, if no
    cluster answers, or if the cluster refuses this process.
    """
    check_address(address)
    _use_token(address)
    ray = ray_module()
    with _Connection.lock:
        if not _Connection.users:
            _Connection.is_ours = not ray.is_initialized()
            if _Connection.is_ours:
                _connect(ray, address, cores, dashboard, object_store_bytes)
        _Connection.users += 1
    try:
        yield ray
    finally:
        with _Connection.lock:
            _Connection.users -= 1
            if not _Connection.users and _Connection.is_ours:
                with _handlers_kept():
                    ray.shutdown()


def _use_token(address: str) -> None:
    """Use the user's token for a cluster with a head node on this machine. Ray itself uses the token for `auto` only.

    A head node on another machine gets the token only if the user sets RAY_AUTH_MODE, because a wrong address would
    reveal the token.
    """
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or _TOKEN.expanduser().is_file()
    if address in (LOCAL, AUTO) or not has_token:
        return
    with suppress(OSError), socket.create_server((address.rpartition(":")[0], 0)):  # fails if HOST is another machine
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _connect(ray: ModuleType, address: str, cores: int | None, dashboard: bool, object_store_bytes: int | None) -> None:
    options: dict[str, Any] = {}
    if address == LOCAL:
        options = {"num_cpus": cores, "include_dashboard": dashboard, "object_store_memory": object_store_bytes}
    elif address != AUTO:
        _check_listens(address)
    try:
        with _handlers_kept():
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
    except Exception as error:  # Ray raises Exception itself if a process of a new cluster does not start within 30 s
        raise UserError(f"cluster {address}: {_reason(error, address)}") from None
    # Ray would print its nodes' messages, with many lines for a node that dies, to standard output.
    ray._private.worker._worker_logs_enabled = False


def _check_listens(address: str) -> None:
    """Raise UserError if no program listens at HOST:PORT. Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"cluster {address}: nothing answers there ({error}). Check the address of the head node (ray status), and "
            "that the head node runs."
        ) from None


def _reason(error: Exception, address: str) -> str:
    """First sentence of Ray's error, and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, ConnectionError) and "Could not find any running Ray instance" in text:
        return (
            "no Ray cluster runs on this machine. Start one (ray start --head), join one (ray start --address "
            "HOST:PORT), or pass local."
        )
    if address == LOCAL:
        return f"{text[:400]} Run the command again when the machine is less busy."
    token = " If the cluster uses a token: export RAY_AUTH_MODE=token."
    if os.environ.get("RAY_AUTH_MODE") == "token":
        token = " Check that the token of this machine (~/.ray/auth_token or RAY_AUTH_TOKEN) is the cluster's."
    return f"{text[:400]}. Check the address, and that this machine has joined the cluster (ray status).{token}"


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep this process's handlers of SIGINT and SIGTERM. Ray's handlers would print a stack and exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as stop:  # Ray's handler of SIGTERM, which is in force while Ray starts
        if stop.code == signal.SIGTERM:
            raise Terminated from None
        raise
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # a handler that was not installed from Python
                signal.signal(number, handler)
