"""Sums a float32 vector over the CPU replicas of one machine, in memory that the replicas share.

The memory has a part for each rank and a part for the sum. A rank writes into its own part, and then computes one range
of the sum. The memory belongs to an anonymous file of rank 0 (memfd_create), which the other ranks open through
/proc/PID/fd. Linux frees the memory when the last rank has ended, in whatever way.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress

import torch
from torch import Tensor

from train.replicas.link import Link

_FLOAT32_BYTES = 4
_RANGE_ALIGNMENT = 1024  # ranges begin at multiples of this number, so that no two ranks write into the same cache line


class NoSharedMemory(Exception):
    """Raised on all ranks if a rank cannot create or open the shared memory. The message gives the reason."""


class SharedMemory:
    """A vector of each rank, and the sum of these vectors."""

    def __init__(self, size: int, link: Link) -> None:
        """Open the memory. All ranks call this method at the same time with the same `size`. Raises NoSharedMemory."""
        self._link = link
        parts = _open_parts(size, link)
        self.own, self.total = parts[link.rank], parts[link.size]
        step = -(-size // link.size // _RANGE_ALIGNMENT) * _RANGE_ALIGNMENT
        own_range = slice(min(link.rank * step, size), min((link.rank + 1) * step, size))
        self._summands = [part[own_range] for part in parts[: link.size]]
        self._own_total = self.total[own_range]

    def sum(self) -> None:
        """Compute `total` from `own` of all ranks. The summands are added in the order of the ranks."""
        self._link.barrier()  # at this point all ranks have written `own`, and no rank still reads the last `total`
        torch.add(self._summands[0], self._summands[1], out=self._own_total)
        for summand in self._summands[2:]:
            self._own_total += summand
        self._link.barrier()


def _open_parts(size: int, link: Link) -> Tensor:
    """Return the memory as a tensor (ranks + 1, size) of zeros."""
    size_bytes = (link.size + 1) * size * _FLOAT32_BYTES
    descriptor, problem = -1, ""
    name = f"alextrain gradients {os.urandom(8).hex()}"
    if link.rank == 0:
        try:
            descriptor = os.memfd_create(name)
            os.ftruncate(descriptor, size_bytes)
        except (OSError, AttributeError) as error:
            problem = f"rank 0 cannot create shared memory ({error})"
    machine, name, path, problem = link.broadcast_json(
        [_machine(), name, f"/proc/{os.getpid()}/fd/{descriptor}", problem]
    )
    memory = None
    if not problem:
        try:
            memory = _open(path, name, size_bytes, machine)
        except (OSError, RuntimeError) as error:
            problem = f"rank {link.rank} cannot open the shared memory of rank 0 ({str(error).splitlines()[0]})"
    problems = [text for text in link.gather_json(problem) if text]
    if descriptor >= 0:
        os.close(descriptor)
    if problems or memory is None:
        raise NoSharedMemory(problems[0])
    return memory.view(link.size + 1, size)


def _open(path: str, name: str, size_bytes: int, machine: str) -> Tensor:
    if machine != _machine():
        raise OSError("the ranks run on several machines")
    found = os.readlink(path)  # in another PID namespace, the path can belong to another file
    if name not in found:
        raise OSError(f"{path} is {found}, which is another file")
    return torch.from_file(path, shared=True, size=size_bytes // _FLOAT32_BYTES, dtype=torch.float32)


def _machine() -> str:
    """Return a text that identifies this machine. The text changes when the machine is restarted."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{platform.node()} {file.read().strip()}"
    return platform.node()
