"""What a new worker process inherits from this process: signals and BLAS threads, but not the main program."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def start_options() -> Iterator[None]:
    """In a `with` block, start processes without Ctrl-C, with one BLAS thread, and without the main program."""
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
