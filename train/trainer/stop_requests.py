"""Signals that ask a training to stop: Ctrl-C, SIGTERM, and SIGHUP from a terminal that was closed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

from prep.console import Terminated, say
from train.replicas.torchrun import is_of_torchrun

REPEATED_BY_TORCHRUN_S = 5.0  # time within which torchrun passes on a signal


class StopRequests:
    """The signal handler of a training. `requested` is the exception to raise after the current step, or None."""

    def __init__(self, repeats_within_s: float = 0.0) -> None:
        """A second signal within `repeats_within_s` after the first counts as a repetition, and is ignored."""
        self.requested: BaseException | None = None
        self._repeats_within_s, self._requested_at = repeats_within_s, 0.0
        self.on_request: Callable[[], None] = lambda: None  # called in another thread when a stop is requested
        self._deferred = True
        self._message: Thread | None = None

    @contextmanager
    def raised_at_once(self) -> Iterator[None]:
        """Return a context in which a signal raises its exception at once.

        If a stop was requested earlier, entering the context raises the exception.
        """
        self._deferred = False
        try:
            if self.requested is not None:
                raise self.requested
            yield
        finally:
            self._deferred = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal.

        The first signal requests a stop, and the second signal raises its exception. In `raised_at_once`, every signal
        raises its exception.
        """
        stop = KeyboardInterrupt() if signum == signal.SIGINT else Terminated(signum)
        now = time.monotonic()
        if self.requested is not None and now - self._requested_at < self._repeats_within_s:
            return
        if self.requested is not None or not self._deferred:
            raise stop
        self.requested, self._requested_at = stop, now
        # `_announce` runs in a thread, because the signal may have interrupted a print to the same stream. The
        # interrupted print must end first.
        self._message = Thread(target=self._announce)
        self._message.start()

    def _announce(self) -> None:
        say("Stopping after this step, with a checkpoint.")
        self.on_request()

    def wait_for_message(self) -> None:
        """Wait until the message about the stop has been printed, if there is one."""
        if self._message is not None:
            self._message.join()


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Return a context in which StopRequests handles SIGINT, SIGTERM and SIGHUP.

    An ignored SIGHUP, as under nohup, stays ignored. A process that torchrun started can get one signal twice. For
    example, SLURM signals all processes of a job, and torchrun passes on the signal that it gets.
    """
    stop = StopRequests(REPEATED_BY_TORCHRUN_S if is_of_torchrun() else 0.0)
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, stop) for signum in signals}
    try:
        yield stop
    finally:
        stop.wait_for_message()
        for signum, handler in before.items():
            signal.signal(signum, handler)
