"""Test of `alexstream serve --cluster local`: other programs use the service until a signal stops the command."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from prep.console import usable_cores
from tests.helpers.project import ROOT

DEADLINE_S = 150.0  # time limit of each wait; on an idle machine, the longest wait takes 10 s
# The program CONSUMER reads an epoch from the service and prints a digest of the batches. Then it waits for a line on
# standard input, reads a second epoch, and prints the digest of the second epoch.
CONSUMER = """
import hashlib, sys
from pipeline.loader import train_loader
store, service, fallback = sys.argv[1:]
with train_loader(store, 5, seed=3, service=service or None, service_fallback=fallback or None) as loader:
    for epoch in range(2):
        digest = hashlib.sha256()
        for images, labels in loader:
            digest.update(images.numpy().tobytes() + labels.numpy().tobytes())
        print(digest.hexdigest(), flush=True)
        if service and epoch == 0:
            sys.stdin.readline()
"""


class Program:
    """A running Python program whose output can be read line by line.

    The program runs in a session of its own, like a program on a terminal.
    """

    def __init__(self, *words: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            text=True,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            start_new_session=True,
            # In a background job of a shell script, processes ignore SIGINT. The program must not ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._lines = queue.Queue[str | None]()  # the queue holds None after the last line
        self.errors = ""
        assert self.process.stdout is not None and self.process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout,)),
            threading.Thread(target=self._read_errors, args=(self.process.stderr,)),
        ]
        for thread in self._threads:
            thread.start()

    def line(self) -> str:
        try:
            line = self._lines.get(timeout=DEADLINE_S)
        except queue.Empty:
            pytest.fail(f"no line in time. Standard error: {self.errors}")
        assert line is not None, f"exit code {self.end()}, standard error: {self.errors}"
        return line

    def end(self) -> int:
        """Wait until the program has ended, and return its exit code."""
        code = self.process.wait(DEADLINE_S)
        for thread in self._threads:
            thread.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def _read_errors(self, stream: IO[str]) -> None:
        for line in stream:
            self.errors += line


def alexstream(*words: str) -> Program:
    return Program("-m", "pipeline", *words)


def session_of(pid: int) -> int:
    """Return the session ID of a process, or -1 if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] == "Z" else int(fields[3])


def processes_of_session(session: int) -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if session_of(int(path.name)) == session]


@pytest.fixture(scope="module")
def serving(store: Path) -> Iterator[tuple[Program, dict[str, Any]]]:
    """Start a service with its own Ray cluster. Yields the program, and the first JSON object of its output."""
    pytest.importorskip("ray")
    program = alexstream("serve", "--store", str(store), "--name", "here", "--ahead", "4", "--json")
    try:
        yield program, json.loads(program.line())
    finally:
        for pid in processes_of_session(program.process.pid):
            os.kill(pid, signal.SIGKILL)
        program.end()


@pytest.mark.soak
def test_processes_of_this_machine_use_a_local_service_until_it_is_interrupted(
    store: Path, serving: tuple[Program, dict[str, Any]]
) -> None:
    service, state = serving
    address = state["address"]
    assert state["name"] == "here" and len(state["workers"]) == 1 and state["max_workers"] == usable_cores()

    local = Program("-c", CONSUMER, str(store), "", "")
    expected = [local.line(), local.line()]
    assert local.end() == 0 and expected[0] != expected[1]
    consumer = Program("-c", CONSUMER, str(store), f"here@{address}", "local")
    assert consumer.line() == expected[0]
    shown = alexstream("status", "--cluster", address, "--json")
    status = json.loads(shown.line())
    assert shown.end() == 0 and shown.errors == ""
    assert status["images_made"] >= 30 and len(status["consumers"]) == 1

    os.killpg(service.process.pid, signal.SIGINT)  # like Ctrl-C on a terminal, for all processes of the group
    assert service.end() == 0
    assert service.errors.splitlines()[-1] == "Stopping service here and the Ray cluster of this machine."
    assert service.errors.count("\n") <= 3 and "Traceback" not in service.errors

    assert consumer.process.stdin is not None
    consumer.process.stdin.write("\n")
    consumer.process.stdin.flush()
    assert consumer.line() == expected[1]  # the consumer continues with the local store
    assert consumer.end() == 0 and "service here is lost" in consumer.errors
    deadline = time.monotonic() + DEADLINE_S
    while left := processes_of_session(service.process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
