"""Run commands under torchrun, with real processes and gloo. A job starts in a fraction of a second (server.py).

    job = torchrun("--nproc-per-node", 2, "-m", "train", "run", "--gpus", "cpu", …)
    assert job.wait() == 0, job.stderr

`torchrun` is a fixture of tests/conftest.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.helpers.project import ROOT

Torchrun = Callable[..., "Job"]


class Job:
    """A torchrun process that was started, with its ranks (the processes that torchrun starts)."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def messages(self) -> list[str]:
        """The lines that the ranks printed to standard error, without the log, traceback and report of torchrun."""
        own = re.split(r"^Traceback \(most recent call last\):$", self.stderr, maxsplit=1, flags=re.MULTILINE)[0]
        return [line for line in own.splitlines() if not re.match(r"[IWE]\d{4} |\[(W|I|E)\d+|\[Gloo\]", line)]

    @property
    def exit_code(self) -> int | None:
        """Exit code of torchrun; None while it runs."""
        path = self.folder / "exit_code"
        return int(path.read_text()) if path.exists() else None

    @property
    def rank_exit_codes(self) -> dict[int, list[int]]:
        """{rank: exit codes}, with one exit code for each attempt that has ended; −9 if SIGKILL ended the attempt."""
        codes: dict[int, list[int]] = {}
        for line in (self.folder / "rank_ends").read_text().splitlines():
            rank, code = map(int, line.split())
            codes.setdefault(rank, []).append(code)
        return codes

    def wait(self, timeout_s: float = 60) -> int:
        """Wait until torchrun ends, and return its exit code.

        After `timeout_s`, kills the job and raises TimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        while self.exit_code is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"torchrun has not ended within {timeout_s} s:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.02)
        return self.exit_code

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 60) -> None:
        """Wait until `condition()` is true.

        Fails if torchrun ends before the condition is true, or if `timeout_s` has passed.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.exit_code is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"torchrun ended too early or hangs:\n{self.stdout}\n{self.stderr}")
            time.sleep(0.005)

    def ranks(self) -> list[int]:
        """Return the process IDs of the living ranks, in the order of the ranks; [] after torchrun has ended."""
        parent = _stat(self.pid)[1]  # the starter of server.py, which forks torchrun and the ranks
        if not parent:
            return []
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [pid for pid in map(int, children) if pid != self.pid and _stat(pid)[0] not in "ZX"]

    def kill(self) -> None:
        """Kill torchrun and its ranks."""
        for pid in (*self.ranks(), self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> tuple[str, str]:
    """Return the state of a process and the ID of its parent, from /proc; ("X", "") if there is no such process."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except OSError:
        return "X", ""
    return state, parent


class TorchrunServer:
    """A process that starts torchrun on request (tests/helpers/torchrun/server.py)."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._jobs = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/helpers/torchrun/server.py")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: object, env: dict[str, str] | None = None) -> Job:
        """Start `torchrun ARGUMENTS` with `env` added to the environment."""
        folder = self._folder / str(self._jobs)
        self._jobs += 1
        folder.mkdir()
        names = {name: str(folder / name) for name in ("stdout", "stderr", "exit_code", "rank_ends")}
        request = {"arguments": [str(word) for word in arguments], "env": env or {}, **names}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Job(int(self._process.stdout.readline()), folder)

    def __enter__(self) -> TorchrunServer:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, and all jobs that still run."""
        self._process.communicate()
