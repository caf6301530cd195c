"""Starts worker processes that ignore Ctrl-C, use one BLAS thread and do not import the main program.

What a worker prints while it starts is kept. If the worker does not start, the error has the last line of this output.
"""

from __future__ import annotations

import mmap
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import Any

from prep.console import UserError, address_space_text, is_memory_error


@contextmanager
def start_options() -> Iterator[None]:
    """Let processes that are started in a `with` block ignore Ctrl-C, use one BLAS thread and not import `__main__`."""
    with _main_module_hidden(), _one_blas_thread(), _ctrl_c_blocked():
        yield


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Prevent processes that are started in a `with` block from importing the main program.

    A new process imports the main program to find its functions. If the program does not test `__name__ == "__main__"`,
    the whole program would run again. Workers need only functions of modules, not of the main program.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {
        name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__
    }
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Block SIGINT in a `with` block.

    Processes that are started in the block inherit the signal mask, and never receive SIGINT. If SIGINT is sent to this
    process during the block, this process receives it at the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread in processes that are started in a `with` block.

    A BLAS library reads the limit from environment variables when the library is loaded.
    """
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class SharedIntegers:
    """64-bit integers in memory that this process and its workers share. A worker gets the object as an argument.

    Unlike the memory of a multiprocessing.RawArray, this memory needs no folder for temporary files.
    """

    def __init__(self, count: int, descriptor: int | None = None) -> None:
        """Share `count` integers, which are zero at first. In a worker, `descriptor` refers to the parent's memory."""
        self._count = count
        self._descriptor = os.memfd_create("counters") if descriptor is None else descriptor
        os.ftruncate(self._descriptor, 8 * count)
        self._values = memoryview(mmap.mmap(self._descriptor, 8 * count)).cast("q")

    def __reduce__(self) -> tuple[Any, ...]:
        return _inherited_integers, (self._count, DupFd(self._descriptor))

    def __getitem__(self, index: int) -> int:
        return self._values[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._values[index] = value

    def close(self) -> None:
        """Close the descriptor of the memory. The integers stay readable."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def _inherited_integers(count: int, descriptor: Any) -> SharedIntegers:
    return SharedIntegers(count, descriptor.detach())


class WorkerNotStarted(UserError):
    """A worker process ended before it received its first task. The message has the error of the process."""


class StartOutput:
    """Standard error of a process that starts, kept in memory until the process has received its first task.

    The process gets an object of this class as an argument, and calls `restore` after it has received a task.
    """

    def __init__(self) -> None:
        self._kept = os.memfd_create("start")
        self._stderr = -1  # in the started process: descriptor of the standard error of the parent

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Keep the standard error of a process that is started in the `with` block.

        Text that another thread of this process prints during the block is also kept, and therefore not shown.
        """
        self._stderr = os.dup(2)
        os.dup2(self._kept, 2)
        try:
            yield
        finally:
            os.dup2(self._stderr, 2)
            os.close(self._stderr)

    def __reduce__(self) -> tuple[Any, ...]:
        return _inherited_output, (DupFd(self._stderr),)

    def restore(self) -> None:
        """In the started process: print to the standard error of the parent from now on."""
        if self._stderr >= 0:
            os.dup2(self._stderr, 2)
            os.close(self._stderr)
            self._stderr = -1

    def close(self) -> None:
        """Free the memory of the output."""
        if self._kept >= 0:
            os.close(self._kept)
            self._kept = -1

    def reason(self) -> str:
        """Return the error that kept the process from starting: the last line of its output, or an OS error.

        Returns "" if the error is not known.
        """
        content = os.pread(self._kept, 1 << 20, 0) if self._kept >= 0 else b""
        lines = [line.strip() for line in content.decode("utf-8", "backslashreplace").splitlines()]
        # Lines of Python's resource tracker, which does not start either, are left out.
        lines = [line for line in lines if line and "resource_tracker" not in line and "warnings.warn(" not in line]
        if lines:
            return lines[-1]
        executable = os.fsdecode(multiprocessing.spawn.get_executable())
        try:  # the library multiprocessing does not say why the interpreter could not be executed
            subprocess.run([executable, "-c", ""], capture_output=True, timeout=60, check=False)
        except OSError as error:
            return f"{executable}: {error.strerror or error}"
        except subprocess.TimeoutExpired:
            pass
        return ""


def _inherited_output(stderr: Any) -> StartOutput:
    output = StartOutput.__new__(StartOutput)
    output._kept, output._stderr = -1, stderr.detach()
    return output


def start_error(described: str, was_killed: bool, output: StartOutput) -> WorkerNotStarted:
    """Return the error of a worker that ended before its first task. `described` says how the process ended."""
    reason = output.reason()
    text = f"A worker process {described} as it started{': ' if reason else ''}{reason.removesuffix('.')}."
    if was_killed or is_memory_error(reason):
        return WorkerNotStarted(f"{text} If memory ran out, pass fewer --jobs.{address_space_text()}")
    return WorkerNotStarted(f"{text} Correct the cause, and run the same command again.")
