"""Signals that ask a training to stop: Ctrl-C, SIGTERM, and SIGHUP from a terminal that was closed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from prep.console import Terminated, say


class StopRequests:
    """The signal handler of a training. `requested` is the exception to raise after the current step, or None."""

    def __init__(self) -> None:
        self.requested: BaseException | None = None
        self._deferred = True

    @contextmanager
    def raised_at_once(self) -> Iterator[None]:
        """A context in which a signal raises its exception at once.

        If a stop was requested earlier, entering the context raises.
        """
        self._deferred = False
        try:
            if self.requested is not None:
                raise self.requested
            yield
        finally:
            self._deferred = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal: the first requests a stop, the second raises. In `raised_at_once`, every signal raises."""
        stop = KeyboardInterrupt() if signum == signal.SIGINT else Terminated(signum)
        if self.requested is not None or not self._deferred:
            raise stop
        self.requested = stop
        with suppress(RuntimeError):  # Python's error if the signal interrupted a print to the same stream
            say("Stopping after this step, with a checkpoint.")


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """A context in which StopRequests handles SIGINT, SIGTERM and SIGHUP. An ignored SIGHUP (nohup) stays ignored."""
    stop, signals = StopRequests(), [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, stop) for signum in signals}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
