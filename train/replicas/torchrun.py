"""What torchrun tells the processes that it starts, and what they tell torchrun about an error.

This module loads quickly, because every command of alextrain imports it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress

from prep.console import Terminated

_STOPPED_END_S = 1.0  # the same after a stop, for the message of rank 0 that the command was interrupted
_QUIET_END_S = 10.0  # longest time for which a rank that prints nothing waits for the rank that prints the error


def torchrun_rank(environ: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Return (rank, number of ranks) of this process; (0, 1) if torchrun did not start it."""
    environ = os.environ if environ is None else environ
    rank, size = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    if "TORCHELASTIC_RUN_ID" in environ and rank.isdecimal() and size.isdecimal():
        return int(rank), int(size)
    return 0, 1


def wait_for_message(is_stop: bool = False) -> None:
    """Wait until another rank has printed its error, before this rank ends without a message.

    torchrun terminates all ranks of a machine as soon as one of them has ended with an error, so a rank that ended at
    once could prevent the message. The termination also ends this wait.
    """
    with suppress(KeyboardInterrupt, Terminated):
        time.sleep(_STOPPED_END_S if is_stop else _QUIET_END_S)


def write_error_file(text: str, is_own: bool) -> None:
    """Let torchrun's report of failed processes show `text` for this process. Does nothing without torchrun.

    torchrun gives each process the name of a file for its error, and calls the error with the smallest time the root
    cause. An error of this process (`is_own`) gets a time one second earlier than now, so that processes that ended in
    the same second because of this error are not the root cause. The format is that of
    torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()) + (-1 if is_own else 1))}
    with suppress(OSError), open(path, "w") as file:
        json.dump({"message": {"message": text, "extraInfo": extra}}, file)
