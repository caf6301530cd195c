"""What torchrun tells the processes that it starts, and what these processes tell torchrun about an error.

This module must load quickly, because every command of alextrain imports it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress

from prep.console import Terminated

_STOPPED_END_S = 1.0  # the same time after a stop, for rank 0's message that the command was interrupted
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

    As soon as one rank has ended with an error, torchrun terminates all ranks of the machine. A rank that ended at once
    could therefore prevent the message. When torchrun terminates the ranks, this wait also ends.
    """
    with suppress(KeyboardInterrupt, Terminated):
        time.sleep(_STOPPED_END_S if is_stop else _QUIET_END_S)


def write_error_file(text: str, is_own: bool) -> None:
    """Let torchrun's report of failed processes show `text` for this process.

    Without torchrun, this function does nothing. torchrun gives each process the name of a file for its error. torchrun
    calls the error with the earliest time the root cause. An error of this process (`is_own`) gets a time one second
    before now. Other processes that ended in the same second because of this error are then not the root cause. The
    format is the format of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()) + (-1 if is_own else 1))}
    with suppress(OSError), open(path, "w") as file:
        json.dump({"message": {"message": text, "extraInfo": extra}}, file)
