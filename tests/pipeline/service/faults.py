"""Faults for the tests: machines that can be switched off, and a service whose workers die at a record."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.service import coordinator, worker_group
from pipeline.service.coordinator import Coordinator
from pipeline.service.worker import Worker
from tests.helpers.project import own_namespaces

DEADLY_RECORD = 13
MAX_TRIES = 3
HOST = "127.0.0.1"
# Ray's variables of the environment for a cluster of simulated machines
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-thirty-two-characters"}
RAY_FOLDER = Path(tempfile.gettempdir()) / "ray"  # of Ray's own files, and of the address that `auto` finds
RAY = str(Path(sys.executable).with_name("ray"))


class DeadlyWorker(Worker):
    """A worker that a record ends, as a fault of a decoder in C would."""

    def make(self, request):  # type: ignore[no-untyped-def]
        if request.split == "train" and DEADLY_RECORD in request.numbers:
            signal.raise_signal(signal.SIGSEGV)  # ends this thread at once; os.kill lets it go on for a moment
        return super().make(request)


class DeadlyCoordinator(Coordinator):
    """The coordinator of a service of deadly workers. It gives up a batch after MAX_TRIES workers."""

    async def begin(self) -> tuple[int, str]:
        worker_group.Worker = DeadlyWorker  # type: ignore[misc]
        coordinator._MAX_TRIES = MAX_TRIES
        return await super().begin()


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Machine:
    """A simulated machine: shell commands that see only their own processes, and have Ray's folder for themselves.

    The commands run in their own namespaces of Linux, so they can also mount other files. `switch_off` ends all
    processes of the machine at once, by SIGKILL, as a power failure does.
    """

    def __init__(self, commands: str, **environment: str) -> None:
        spaces = own_namespaces("--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
        self.process = subprocess.Popen(
            [*spaces, "sh", "-c", f"mkdir -p {RAY_FOLDER} && mount -t tmpfs none {RAY_FOLDER}\n{commands}"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def switch_off(self) -> tuple[str, str]:
        """Returns what the commands wrote to their standard output and standard error."""
        self.process.kill()
        return self.process.communicate()

    def shut_down(self, timeout_s: float) -> None:
        """Close the standard input, and wait until the commands have ended."""
        self.process.communicate(timeout=timeout_s)

    def wait(self, timeout_s: float) -> tuple[int, str, str]:
        """Wait until the commands have ended: (exit code, standard output, standard error)."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            stdout, stderr = self.switch_off()
            raise AssertionError(f"the machine did not end within {timeout_s} s:\n{stdout}\n{stderr}") from None
        return self.process.returncode, stdout, stderr


def head_commands(port: int, *, host: str = HOST, cores: int = 1, options: str = "") -> str:
    """Commands of a machine that is the head node of a new cluster."""
    return (
        f"{RAY} start --head --block --port {port} --node-ip-address {host} --num-cpus {cores} "
        f"--object-store-memory 100000000 --include-dashboard false --disable-usage-stats {options} >&2"
    )


def node_commands(address: str, *, cores: int = 1, options: str = "") -> str:
    """Commands of a machine that belongs to a cluster."""
    return (
        f"{RAY} start --block --address {address} --node-ip-address {address.partition(':')[0]} --num-cpus {cores} "
        f"--object-store-memory 100000000 --disable-usage-stats {options} >&2"
    )


def until_shut_down(command: str) -> str:
    """Run a command until the standard input is closed, then end it by SIGTERM."""
    return f"{{ {command} & read line; kill $!; wait $!; }}"


def wait_for_file(path: Path, machine: Machine, timeout_s: float) -> str:
    """The text of a file, when the machine has written a whole line to it."""
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text().endswith("\n")):
        ended = machine.process.poll()
        assert ended is None and time.monotonic() < deadline, f"no {path.name}: {machine.switch_off()}"
        time.sleep(0.05)
    return path.read_text()
