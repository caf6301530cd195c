"""The group of replicas of a training: rank and size from torchrun's environment, and exchange of arrays and JSON.

torchrun starts one process for each replica. A process without torchrun is a group of one replica. A group of one
replica exchanges nothing and does not load torch.distributed.

    group = group_from_environment()
    with joined(group, timeout_s=600) as group:
        total = group.sum(counts)          # the same array on every rank
        with group.together():             # an error of one rank ends all ranks, and is printed once
            ...

All ranks must call the methods in the same order. A method that waits for another rank raises ReplicaLost after the
time-out. If another rank has printed its error, the method raises OtherReplicaFailed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from prep.console import Terminated, UserError, WrongArgument
from train.config.choices import REPLICA_TIMEOUT_S
from train.replicas.errors import OtherReplicaFailed, ReplicaLost, is_stop
from train.replicas.link import Link, connect
from train.replicas.torchrun import note_joined, wait_for_message

Value = TypeVar("Value")

# Longest time for which a rank waits for the other ranks to end, if it ends without an error or after a stop.
_LINGER_S = 1.0
# Environment variables that torchrun sets. If another program starts the processes, the user sets the variables.
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ALSO_NEEDED = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class ReplicaGroup:
    """Rank and size of a group. In a group of size 1, the methods exchange nothing."""

    rank: int = 0  # number of this replica in the group, 0 to size - 1
    size: int = 1  # number of replicas
    local_rank: int = 0  # number of this replica on its machine, 0 to local_size - 1
    local_size: int = 1  # number of replicas on this machine
    launched: bool = False  # whether torchrun started this process; a group of size 1 can have either value
    # None: the group is not connected, or has size 1.
    link: Link | None = field(default=None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0. Only rank 0 writes into the run folder and prints."""
        return self.rank == 0

    def sum(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the sum of an int64 or float64 array over the ranks. Every rank gets the same bits.

        Arrays must have the same shape on all ranks. Sums of integers are exact. Floats are added in the order of the
        ranks.
        """
        if self.link is None:
            return values
        if values.dtype not in (np.int64, np.float64):
            raise TypeError(f"sum of {values.dtype} over the ranks: expected int64 or float64")
        total = np.zeros_like(values)
        for part in self.link.gather_equal(values):
            total += part
        return total

    def gather(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Return the arrays of all ranks, in the order of the ranks.

        The shapes may differ between ranks, but the types may not.
        """
        return [values] if self.link is None else self.link.gather(values)

    def stack_on_first(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """On rank 0, return the rows of all ranks, stacked in the order of the ranks. Other ranks get no rows.

        The arrays must have the same type, and the same shape apart from the first axis.
        """
        return rows if self.link is None else self.link.stack_on_first(rows)

    def gather_equal(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the arrays of all ranks, which have equal shapes and types, as one array (size, …)."""
        return values[None] if self.link is None else np.stack(self.link.gather_equal(values))

    def gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks. The values are sent as JSON."""
        return [value] if self.link is None else self.link.gather_json(value)

    def broadcast_json(self, value: Any) -> Any:
        """Return the value of rank 0, which is sent as JSON. The values of all other ranks are ignored."""
        return value if self.link is None else self.link.broadcast_json(value)

    def broadcast(self, array: npt.NDArray[Any]) -> None:
        """Replace the contents of `array` by those of rank 0's array, which has the same shape and type."""
        if self.link is not None:
            self.link.broadcast(array)

    def barrier(self) -> None:
        """Wait until all ranks have called this method."""
        if self.link is not None:
            self.link.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block at whose end all ranks wait for each other. If the block fails on one rank, it fails on all ranks.

        If several ranks have a UserError or a request to stop, the lowest of these ranks raises its own error. All
        other ranks raise OtherReplicaFailed.
        """
        if self.link is None:
            yield
            return
        error: UserError | KeyboardInterrupt | Terminated | None = None
        try:
            yield
        except ReplicaLost:
            raise
        except (UserError, KeyboardInterrupt, Terminated) as caught:
            error = caught
        outcome = None if error is None else description_of(error)
        failed = [(rank, other) for rank, other in enumerate(self.gather_json(outcome)) if other is not None]
        if not failed:
            return
        first, other = failed[0]
        if first == self.rank and error is not None:
            raise error
        raise OtherReplicaFailed(**other) from None

    def on_first(self, work: Callable[[], Value]) -> Value:
        """Return the result of `work`, which is called only on rank 0. The result is sent as JSON.

        An error of `work` ends all ranks.
        """
        result: Any = None
        with self.together():
            if self.is_first:
                result = work()
        value: Value = self.broadcast_json(result)
        return value


ALONE = ReplicaGroup()  # the group of a process that torchrun did not start


def description_of(error: BaseException) -> dict[str, Any]:
    """Return message, exit code and class of an error, for OtherReplicaFailed on the other ranks."""
    code = 1
    if isinstance(error, UserError):
        code = error.exit_code
    elif isinstance(error, Terminated | KeyboardInterrupt):
        code = 128 + (error.signum if isinstance(error, Terminated) else 2)
    return {"text": str(error) or type(error).__name__, "code": code, "kind": type(error).__name__}


def group_from_environment(environ: Mapping[str, str] | None = None) -> ReplicaGroup:
    """Return the group in which torchrun started this process. The group is not connected yet.

    Without torchrun, returns a group of one. Raises WrongArgument if the variables of torchrun are incomplete or are
    not whole numbers. If torchrun did not start the process and WORLD_SIZE is 1, incomplete variables are no error.
    """
    environ = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" not in environ and not all(name in environ for name in _NEEDED):
        return ReplicaGroup()
    missing = [name for name in (*_NEEDED, *_ALSO_NEEDED) if name not in environ]
    if missing and "TORCHELASTIC_RUN_ID" not in environ and environ["WORLD_SIZE"] == "1":
        return ReplicaGroup()  # some job schedulers and notebooks set the variables of _NEEDED for every job
    if missing:
        raise WrongArgument(
            f"the environment has RANK and WORLD_SIZE but no {missing[0]}. Start the replicas with torchrun, which "
            "sets all variables, or unset RANK and WORLD_SIZE."
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", *_ALSO_NEEDED):
        if not environ[name].isdecimal():
            raise WrongArgument(f"{name}={environ[name]}: expected a whole number, as torchrun sets it.")
        numbers[name] = int(environ[name])
    group = ReplicaGroup(
        rank=numbers["RANK"],
        size=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_size=numbers["LOCAL_WORLD_SIZE"],
        launched=True,
    )
    if group.rank >= group.size or group.local_rank >= group.local_size:
        raise WrongArgument(
            f"RANK={group.rank} of WORLD_SIZE={group.size}, LOCAL_RANK={group.local_rank} of "
            f"LOCAL_WORLD_SIZE={group.local_size}: expected a rank below the size. Start the replicas with torchrun."
        )
    return group


@contextmanager
def joined(group: ReplicaGroup, timeout_s: float = REPLICA_TIMEOUT_S) -> Iterator[ReplicaGroup]:
    """Connect a group to its other ranks during a `with` block. A group of size 1 is returned unchanged.

    timeout_s  longest time in seconds for which a rank waits for another rank: to connect, and in each exchange

    At the end of the block, all ranks wait for each other. If the block raises an error, the other ranks receive the
    error in their next exchange. If rank 1 or a higher rank raises a UserError, the rank is added to the message.
    Raises ReplicaLost if a rank does not connect.
    """
    if group.size == 1:
        yield group
        return
    try:
        link = connect(group.rank, group.size, timeout_s)
    except OtherReplicaFailed:
        wait_for_message()
        raise
    note_joined()
    try:
        yield replace(group, link=link)
        link.barrier()
    except BaseException as caught:
        error = caught
        stopped = isinstance(error, KeyboardInterrupt | Terminated)
        # If one rank ends with an error, torchrun terminates the other ranks. They then raise OtherReplicaFailed.
        if stopped and (told := link.roll_call.error_of_other()):
            error = OtherReplicaFailed(**{**told, "code": description_of(error)["code"]})
        is_of_group = isinstance(error, ReplicaLost | OtherReplicaFailed)
        link.leave(None if is_of_group else description_of(error), _LINGER_S if stopped else 0.0)
        if isinstance(error, UserError) and not is_of_group and group.rank > 0:
            error.args = (f"rank {group.rank} of {group.size}: {error}",)
        stopped = stopped or (isinstance(error, OtherReplicaFailed) and is_stop(error.kind))
        if isinstance(error, OtherReplicaFailed) or (stopped and group.rank > 0):
            wait_for_message(stopped)
        raise error from None
    link.leave(None, _LINGER_S)
