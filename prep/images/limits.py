"""Limits for inputs: number of pixels, number of bytes, CPU time.

This module loads no library, so that --help stays fast.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

MAX_PIXELS = 200_000_000  # default limit for an input; an image with more pixels may be a decompression bomb
MAX_RESCALED_PIXELS = 100_000_000  # largest number of pixels of a rescaled image
MAX_FILE_BYTES = 256_000_000  # largest size of an input
TIME_LIMIT_S = 30.0  # default limit for decoding an image; an image of 200 million pixels takes up to 10 s


def too_slow_text(seconds: float) -> str:
    """Return the reason for refusing an image whose decoding takes more CPU time than `seconds`."""
    return f"decoding took more than {seconds:g} s of CPU time"


class _TimeIsUp(BaseException):
    """The exception that stops a slow decoder.

    _TimeIsUp is not a subclass of Exception, so a handler `except Exception` inside a library does not catch _TimeIsUp.
    """


@contextmanager
def cpu_time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` in a `with` block when this process has used `seconds` of CPU time since the block began.

    The CPU time is the time of all threads of the process. Waiting for a disk does not count. There is no limit if
    `seconds` is 0, or if the block does not run in the main thread, because only the main thread receives signals.
    Python can stop the block only between two of its own instructions. A long call of a C function is therefore not
    interrupted; prep.workers ends a process that such a call keeps busy for too long. If a library catches the
    exception that stops the block, `error` is raised at the end of the block.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    is_up = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal is_up
        is_up = True
        raise _TimeIsUp

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _TimeIsUp:
        pass  # `stop` has set `is_up`
    finally:
        signal.signal(signal.SIGPROF, before)
        if is_up:
            raise error from None
