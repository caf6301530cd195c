"""Connection to a Ray cluster. Ray is imported only when a cluster is used, so work on one machine does not need Ray.

The user names a cluster by its address:

    local        a new cluster of this machine alone, which ends with the connection
    auto         the cluster that this machine belongs to (`ray start`), or the address in RAY_ADDRESS
    HOST:PORT    the cluster whose head node listens at this address. This machine must belong to the cluster, because a
                 program reads the cluster's objects from the shared memory of its own machine
"""

from __future__ import annotations

import errno
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

from prep.console import Terminated, UserError, WrongArgument
from prep.version import pip_command

NAMESPACE = "alexnet"  # Ray namespace of this project's named actors
LOCAL, AUTO = "local", "auto"
# Ray kills a program that cannot reach the head node for this number of seconds. A training run must survive the loss
# of the head node, so the time is practically unlimited. Programs that need the head node have a time limit of their
# own.
_NEVER_S = str(10**8)
_CONNECT_S = 20.0  # a head node that does not accept a connection within this time is reported as an error
_TOKEN = Path("~/.ray/auth_token")  # file in which Ray looks for the authentication token


def ray_module() -> ModuleType:
    """Return the module ray. If Ray is not installed, raises UserError with the command that installs Ray."""
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", _NEVER_S)
    # Without this setting, a call after the end of the connection makes Ray connect to any cluster of this machine.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # If the head node refuses the connection, Ray tries three times, for 40 s each. Ray's default is 20 attempts.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError(f"Ray is not installed. Install Ray with: {pip_command('cluster')}") from None
    module: ModuleType = ray
    return module


def check_address(address: str) -> None:
    """Raise UserError unless `address` is local, auto or HOST:PORT."""
    if address.startswith("ray://"):
        raise WrongArgument(
            f"cluster {address}: Ray Client is not supported, because it cannot share memory with the cluster. Let "
            "this machine join the cluster (ray start --address HOST:PORT --num-cpus 0), then pass auto."
        )
    if address not in (LOCAL, AUTO) and not re.fullmatch(r"\S+:\d{1,5}", address):
        raise WrongArgument(f"cluster {address!r}: expected local, auto or HOST:PORT.")


class _Connection:
    """The Ray connection of this process, which several `with` blocks can use at the same time."""

    lock = threading.Lock()
    users = 0  # number of `with` blocks that use the connection
    is_ours = False  # whether `connected` opened the connection; False if the process was already connected


@contextmanager
def connected(
    address: str, *, cores: int | None = None, dashboard: bool = False, object_store_bytes: int | None = None
) -> Iterator[ModuleType]:
    """Connect this process to a cluster during a `with` block. `with connected(…) as ray` gives the module ray.

    address             the cluster: local, auto or HOST:PORT
    cores               number of CPU cores of a local cluster; None: all usable cores
    dashboard           whether a local cluster starts Ray's dashboard
    object_store_bytes  size of the object store of a local cluster; None: 30 % of the memory

    A process has one connection, which all its `with` blocks share. The first block connects, and the last block
    disconnects. If the process was connected before the first block, the blocks use that connection and leave it open.
    The signal handlers of the process stay installed. Raises UserError if Ray is not installed, if no cluster answers,
    or if the cluster refuses this process.
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
    """Use the user's authentication token if the head node of the cluster is on this machine.

    Ray itself uses the token only for the address `auto`. A head node on another machine gets the token only if the
    user has set RAY_AUTH_MODE. Without this rule, a mistyped address would reveal the token to a stranger.
    """
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or _TOKEN.expanduser().is_file()
    if address in (LOCAL, AUTO) or not has_token:
        return
    # The call of create_server fails if HOST is not an address of this machine.
    with suppress(OSError), socket.create_server((address.rpartition(":")[0], 0)):
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
    except Exception as error:  # Ray raises a plain Exception if a process of a new cluster takes over 30 s to start
        raise UserError(f"cluster {address}: {_reason(error, address)}") from None
    # By default, Ray prints the messages of all nodes to standard output, and prints many lines when a node dies.
    ray._private.worker._worker_logs_enabled = False


def _check_listens(address: str) -> None:
    """Raise UserError if no program listens at HOST:PORT. Without this check, Ray tries to connect for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"cluster {address}: no program answers at this address ({error}). Check that this is the address of the "
            "head node (ray status), and that the head node runs."
        ) from None


def _reason(error: Exception, address: str) -> str:
    """Return the text of Ray's error in one line, followed by advice to the user."""
    text = " ".join(str(error).split())
    if isinstance(error, ConnectionError) and "Could not find any running Ray instance" in text:
        return (
            "no Ray cluster runs on this machine. Start one (ray start --head), join one (ray start --address "
            "HOST:PORT), or pass local."
        )
    if address == LOCAL and isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.ENOSPC):
        return f"{text[:400]}. Set the variable TMPDIR to a folder in which you can write: Ray keeps its files there."
    if address == LOCAL:
        return f"{text[:400]} Run the command again when the machine is less busy."
    token = " If the cluster uses a token: export RAY_AUTH_MODE=token."
    if os.environ.get("RAY_AUTH_MODE") == "token":
        token = " Check that this machine (~/.ray/auth_token or RAY_AUTH_TOKEN) has the token of the cluster."
    return f"{text[:400]}. Check the address, and check that this machine has joined the cluster (ray status).{token}"


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restore this process's handlers of SIGINT and SIGTERM after the block, because Ray installs its own handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as stop:  # while Ray starts, Ray's own handler turns SIGTERM into SystemExit
        if stop.code == signal.SIGTERM:
            raise Terminated from None
        raise
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # a handler that was not installed from Python cannot be restored
                signal.signal(number, handler)
