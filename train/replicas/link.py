"""The connection of a rank to the other ranks of its group.

Arrays in host memory are exchanged through gloo, which sends over TCP. GPUs have a second connection for gradients
(train/replicas/gradients.py).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from train.replicas.errors import OtherReplicaFailed, ReplicaLost
from train.replicas.roll_call import RollCall
from train.replicas.session import begin_session


class Link:
    """The connection of one rank. All ranks must call the methods of a link in the same order."""

    def __init__(self, rank: int, size: int, host: str, port: int, hosts_store: bool, timeout_s: float) -> None:
        """Connect to all other ranks.

        host, port   address of the TCPStore through which the ranks find each other
        hosts_store  whether this process runs the server of the TCPStore; False if torchrun runs the server
        timeout_s    longest time in seconds for which an exchange waits for another rank

        Raises ReplicaLost if the connection fails, or OtherReplicaFailed if it fails because another rank has ended
        with an error.
        """
        from torch.distributed import (  # type: ignore[attr-defined]  # torch does not list the stores in __all__
            DistError,
            PrefixStore,
            ProcessGroupGloo,
            TCPStore,
        )

        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._closes: list[Callable[[], object]] = []
        self._names = 0  # number of names that new_name has returned
        self.timeout = timedelta(seconds=timeout_s)
        roll_call: RollCall | None = None
        try:
            store = TCPStore(host, port, is_master=hosts_store, timeout=self.timeout, wait_for_workers=False)
            session = begin_session(PrefixStore("alextrain", store), rank, size, timeout_s)
            # get() and set() of a store hold a lock while they wait. The thread that answers roll calls
            # (train/replicas/roll_call.py) therefore has its own connection.
            second = TCPStore(host, store.port, is_master=False, timeout=self.timeout, wait_for_workers=False)
            self.store: Any = PrefixStore(f"alextrain/{session.name}", store)
            calls = PrefixStore(f"alextrain/{session.name}", second)
            self.roll_call = roll_call = RollCall(calls, rank, session.places, timeout_s)
            self.gloo: Any = ProcessGroupGloo(self.store, rank, size, self.timeout)
        except (DistError, RuntimeError) as error:
            # Another rank may already have connected and ended with an error while this rank is still connecting.
            if roll_call is not None and (told := roll_call.error_of_other()):
                raise OtherReplicaFailed(**told) from None
            raise ReplicaLost(
                f"rank {rank} of {size} cannot connect to the other replicas through {host}:{port} "
                f"({str(error).splitlines()[0][:200]}). Check that this address can be reached, or set "
                "GLOO_SOCKET_IFNAME to the network interface that connects the machines."
            ) from None

    def gather_equal(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Return the arrays of all ranks, which have equal shapes and types, in the order of the ranks."""
        import torch

        own = torch.from_numpy(np.ascontiguousarray(values))
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self.exchange():
            self.gloo.allgather([parts], [own]).wait()
        return [part.numpy() for part in parts]

    def gather(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Return the arrays of all ranks, which have equal types and numbers of dimensions, in rank order."""
        shapes = self.gather_equal(np.array(values.shape, dtype=np.int64))
        parts = []
        for rank, shape in enumerate(shapes):
            part = np.array(values, order="C") if rank == self.rank else np.empty(tuple(shape), dtype=values.dtype)
            self.broadcast(part, rank)
            parts.append(part)
        return parts

    def stack_on_first(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """On rank 0, return the rows of all ranks, stacked in the order of the ranks. Other ranks get no rows."""
        import torch

        counts = [int(count[0]) for count in self.gather_equal(np.array([len(rows)], dtype=np.int64))]
        with self.exchange():
            if self.rank > 0:
                if rows.nbytes:
                    self.gloo.send([torch.from_numpy(np.ascontiguousarray(rows))], 0, 0).wait()
                return rows[:0]
            stacked = np.empty((sum(counts), *rows.shape[1:]), dtype=rows.dtype)
            stacked[: counts[0]] = rows
            for rank in range(1, self.size):
                part = stacked[sum(counts[:rank]) : sum(counts[: rank + 1])]
                if part.nbytes:
                    self.gloo.recv([torch.from_numpy(part)], rank, 0).wait()
        return stacked

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Return rank 0's `content` on every rank."""
        (size_bytes,) = self.gather_equal(np.array([len(content)], dtype=np.int64))[0]
        buffer = np.frombuffer(content, dtype=np.uint8).copy() if self.rank == 0 else np.empty(size_bytes, np.uint8)
        self.broadcast(buffer)
        return buffer.tobytes()

    def broadcast(self, array: npt.NDArray[Any], source: int = 0) -> None:
        """Replace the contents of a contiguous array by those of the array of the rank `source`."""
        import torch
        from torch.distributed import BroadcastOptions

        if array.nbytes == 0:
            return
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        with self.exchange():
            self.gloo.broadcast([torch.from_numpy(array.reshape(-1).view(np.uint8))], options).wait()

    def gather_json(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks. The values are sent as JSON."""
        text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        return [json.loads(part.tobytes()) for part in self.gather(text)]

    def broadcast_json(self, value: Any) -> Any:
        """Return the value of rank 0, which is sent as JSON."""
        return json.loads(self.broadcast_bytes(json.dumps(value).encode() if self.rank == 0 else b""))

    def barrier(self) -> None:
        """Wait until all ranks have called this method."""
        self.gather_equal(np.zeros(1, dtype=np.int64))

    def new_name(self) -> str:
        """Return a new prefix for keys of the store. All ranks get the same prefix.

        `alextrain ablate` uses one link for all its trainings. Because of the new prefix, the NCCL connection of a
        training does not read the keys of an earlier training.
        """
        self._names += 1
        return f"connection/{self._names}"

    def at_end(self, close: Callable[[], object]) -> None:
        """Call `close` when this rank leaves the group."""
        self._closes.append(close)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Return a context for one exchange: an operation of torch that waits for the other ranks.

        If the operation fails, raises ReplicaLost, or OtherReplicaFailed if another rank prints the error.
        """
        self.roll_call.begun += 1
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            cause = (str(error).splitlines() or [""])[0][:200]
            raise self.roll_call.call(time.monotonic() - started, cause) from None

    def leave(self, error: dict[str, Any] | None, linger_s: float = 0.0) -> None:
        """End the connection.

        error     describes the error that this rank prints; None: this rank prints no error
        linger_s  longest time in seconds for which this rank waits until all ranks have left, before it closes its
                  connections. Without this wait, this rank could interrupt the last exchange of a slower rank
        """
        self.roll_call.leave(error)
        self.roll_call.wait_for_others(linger_s)
        for close in self._closes:
            close()
        self.gloo = self.store = None  # this closes the connections before the interpreter ends


def connect(rank: int, size: int, timeout_s: float) -> Link:
    """Return a link to the other ranks, through the store whose address torchrun has set."""
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Link(rank, size, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), hosts_store, timeout_s)
