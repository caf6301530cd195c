"""A limit for the CPU time of a computation in the main thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def cpu_time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` in a `with` block when this process has used `seconds` of CPU time since the block began.

    CPU time is that of all threads of the process; waiting for a disk does not count. There is no limit if `seconds` is
    0 or if the block does not run in the main thread, which alone receives signals. Python raises `error` between two
    of its own instructions, so a long call of a C function is not interrupted: prep.workers ends the process then.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
