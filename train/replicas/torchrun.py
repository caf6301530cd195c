"""The rank that torchrun passes to a process in the environment, and the error file that a process writes for torchrun.

This module must load quickly, because every command of alextrain imports it.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress

from prep.console import Terminated

# True after this process has joined its group: from then on, the ranks agree which of them prints an error.
_has_joined = False
_QUIET_END_S = 10.0  # longest time for which a rank that prints nothing waits for the rank that prints the error
_STOPPED_END_S = 1.0  # after a stop: longest wait for rank 0, which prints that the command was interrupted


def is_of_torchrun() -> bool:
    """Return True if torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_rank() -> tuple[int, int]:
    """Return (rank, number of ranks) of this process; (0, 1) if torchrun did not start it."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if is_of_torchrun() and rank.isdecimal() and size.isdecimal():
        return int(rank), int(size)
    return 0, 1


def note_joined() -> None:
    """Record that this process has joined its group."""
    global _has_joined
    _has_joined = True


def prints_errors() -> bool:
    """Return True if this process prints its errors: on rank 0, and on all ranks after they have joined their group.

    Before the ranks have joined, all have the same errors, for example in the command line.
    """
    return _has_joined or torchrun_rank()[0] == 0


def wait_for_message(is_stop: bool = False) -> bool:
    """Wait until another rank has printed its error, before this rank ends without a message.

    As soon as one rank has ended with an error, torchrun terminates all ranks of the machine. A rank that ended at once
    could therefore prevent the message. When torchrun terminates the ranks, this wait also ends. Returns True if
    torchrun has terminated this process during the wait.
    """
    try:
        time.sleep(_STOPPED_END_S if is_stop else _QUIET_END_S)
    except (KeyboardInterrupt, Terminated):
        return True
    return False


def write_error_file(text: str, is_own: bool) -> None:
    """Let torchrun's report of failed processes show `text` for this process.

    Without torchrun, this function does nothing. torchrun gives each process the name of a file for its error. In the
    report, the error with the earliest time is the root cause. An error of this process (`is_own`) gets a time one
    second before now. This error is then reported as the root cause, even if another process ends in the same second.
    The format of the file is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": text, "timestamp": str(int(time.time()) + (-1 if is_own else 1))}
    with suppress(OSError):
        with open(f"{path}.partial", "w") as file:
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)
        os.replace(f"{path}.partial", path)  # torchrun ends with a traceback if a kill leaves an incomplete file
