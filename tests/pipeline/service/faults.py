"""Faults for the tests: simulated machines that can be switched off, and workers that die when they read a record."""

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
# Environment variables of Ray for a cluster of simulated machines.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-thirty-two-characters"}
RAY_FOLDER = Path(tempfile.gettempdir()) / "ray"  # Ray's files; `--cluster auto` reads an address here
RAY = str(Path(sys.executable).with_name("ray"))


class DeadlyWorker(Worker):
    """A worker that crashes when it reads the record DEADLY_RECORD, as if a decoder in C had a bug."""

    def make(self, request):  # type: ignore[no-untyped-def]
        if request.split == "train" and DEADLY_RECORD in request.numbers:
            signal.raise_signal(signal.SIGSEGV)  # unlike os.kill, raise_signal stops this thread at once
        return super().make(request)


class DeadlyCoordinator(Coordinator):
    """A coordinator whose workers are DeadlyWorkers.

    After MAX_TRIES workers have died while making a batch, the batch fails.
    """

    async def begin(self) -> tuple[int, str]:
        worker_group.Worker = DeadlyWorker  # type: ignore[misc]
        coordinator._MAX_TRIES = MAX_TRIES
        return await super().begin()


def free_port() -> int:
    """Return a port of this machine on which no process listens."""
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Machine:
    """A simulated machine: its shell commands see only their own processes, and have their own folder for Ray.

    The commands run in their own Linux namespaces. In these namespaces, the commands can mount a folder over another
    folder. `switch_off` kills all processes of the machine at once, as a power failure does.
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
        """Kill all processes of the machine. Returns the processes' standard output and standard error."""
        self.process.kill()
        return self.process.communicate()

    def shut_down(self, timeout_s: float) -> None:
        """Close the standard input of the commands, and wait until the commands have ended."""
        self.process.communicate(timeout=timeout_s)

    def wait(self, timeout_s: float) -> tuple[int, str, str]:
        """Wait until the commands have ended. Returns (exit code, standard output, standard error)."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            stdout, stderr = self.switch_off()
            raise AssertionError(f"the machine did not end within {timeout_s} s:\n{stdout}\n{stderr}") from None
        return self.process.returncode, stdout, stderr


def head_commands(port: int, *, host: str = HOST, cores: int = 1, options: str = "") -> str:
    """Return the shell command that makes a machine the head node of a new cluster."""
    return (
        f"{RAY} start --head --block --port {port} --node-ip-address {host} --num-cpus {cores} "
        f"--object-store-memory 100000000 --include-dashboard false --disable-usage-stats {options} >&2"
    )


def node_commands(address: str, *, cores: int = 1, options: str = "") -> str:
    """Return the shell command that makes a machine a node of the cluster at `address`."""
    return (
        f"{RAY} start --block --address {address} --node-ip-address {address.partition(':')[0]} --num-cpus {cores} "
        f"--object-store-memory 100000000 --disable-usage-stats {options} >&2"
    )


def until_shut_down(command: str) -> str:
    """Return a shell command that runs `command`, and sends SIGTERM to `command` when the standard input is closed."""
    return f"{{ {command} & read line; kill $!; wait $!; }}"


def wait_for_file(path: Path, machine: Machine, timeout_s: float) -> str:
    """Wait until the machine has written a complete line to a file, and return the file's text."""
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text().endswith("\n")):
        ended = machine.process.poll()
        assert ended is None and time.monotonic() < deadline, f"no {path.name}: {machine.switch_off()}"
        time.sleep(0.05)
    return path.read_text()
