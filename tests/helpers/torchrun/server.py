"""Program that starts torchrun quickly; tests/helpers/torchrun/job.py starts it and sends it requests.

The import of torch, DALI and alextrain takes a process several seconds. This program imports these three packages only
once. For each request, a fork of this program calls torchrun's `main`. Arguments, environment, rendezvous, monitoring,
signals, restarts and reports work as in the command torchrun. Only the start of a rank differs from the command
torchrun. Instead of executing `python -m MODULE ARGUMENTS` or `python FILE ARGUMENTS`, a fork of this program runs the
module or the file.

For each request, this program forks a process that is called the starter. The starter forks torchrun. When torchrun
asks for ranks, the starter also forks the ranks, because torchrun has threads and therefore cannot fork safely.

A request is a line of JSON on standard input with these keys: `arguments` (of torchrun), `env` (added to the
environment), `stdout`, `stderr` (files), `exit_code` (a file, written at the end) and `rank_ends` (a file with a line
`RANK CODE` for each rank that has ended). The answer is the process ID of torchrun, on a line of standard output. In
the ranks, the variable TORCHRUN_PID is the process ID of torchrun. The program needs OMP_NUM_THREADS=1, because threads
do not survive a fork.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

import pipeline.device
from tests.helpers.small_training import load_modules_of_a_training

_PR_SET_PDEATHSIG = 1
starter: Any = None  # in the process of torchrun: a file for requests to the starter
rank_ends = ""  # in the process of torchrun: name of the file for the exit codes of the ranks


class Rank:
    """A rank that the starter has forked. The class has those attributes of subprocess.Popen that torchrun uses."""

    def __init__(self, command: tuple[str, ...], env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.rank = env["RANK"]
        self.pid = ask_starter({"command": command[1:], "env": {**env, "TORCHRUN_PID": str(os.getpid())}})

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask_starter({"poll": self.pid})
            if self.returncode is not None:
                with open(rank_ends, "a") as file:
                    file.write(f"{self.rank} {self.returncode}\n")
        return self.returncode

    def wait(self, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutExpired("rank", timeout_s)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def ask_starter(request: dict[str, Any]) -> Any:
    starter.write(json.dumps(request) + "\n")
    starter.flush()
    return json.loads(starter.readline())


def answer_torchrun(request: dict[str, Any]) -> int | None:
    """Answer a request of torchrun: fork a rank and return its process ID, or return the exit code of a rank.

    The exit code is None while the rank runs.
    """
    if "poll" in request:
        pid, status = os.waitpid(request["poll"], os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
    pid = os.fork()
    if pid == 0:
        end_with_parent()
        os.setsid()
        os.environ.clear()
        os.environ.update(request["env"])
        exit_with(lambda: run_python(request["command"]))
    return pid


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_python(arguments: list[str]) -> None:
    """Do in this process what `python ARGUMENTS` does. The arguments are `-u -m MODULE …` or `-u FILE …`."""
    words = [word for word in arguments if word != "-u"]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def exit_with(function: Callable[[], object]) -> NoReturn:
    """Call `function`, and end this process as Python ends after a script, but without running exit handlers."""
    code: Any = 0
    try:
        function()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError):
            file.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def run_torchrun(request: dict[str, Any], connection: socket.socket) -> NoReturn:
    """Run torchrun in this process, and end the process."""
    global starter, rank_ends
    end_with_parent()
    os.setsid()
    starter, rank_ends = connection.makefile("rw"), request["rank_ends"]
    SubprocessHandler._popen = Rank  # type: ignore[assignment, method-assign]
    exit_with(lambda: torchrun.main(request["arguments"]))


def start(request: dict[str, Any]) -> int:
    """Start torchrun, and return its process ID. The starter writes the exit code of torchrun into a file."""
    read_fd, write_fd = os.pipe()
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_with_parent()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), fd)
        os.environ.update(request["env"])
        own, others = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            own.close()
            os.close(write_fd)
            run_torchrun(request, others)
        others.close()
        os.write(write_fd, str(pid).encode())
        os.close(write_fd)
        with own.makefile("rw") as file:
            for line in file:
                file.write(json.dumps(answer_torchrun(json.loads(line))) + "\n")
                file.flush()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        partial = Path(request["exit_code"] + ".partial")
        partial.write_text(str(code))
        partial.rename(request["exit_code"])
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd) as pipe:
        return int(pipe.read())


def main() -> None:
    pipeline.device.dali()
    load_modules_of_a_training()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the starters leave no zombie processes
    for line in sys.stdin:
        pid = start(json.loads(line))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    os._exit(0)  # skips exit handlers of libraries; the kernel then kills the starters, torchrun and the ranks


if __name__ == "__main__":
    main()
