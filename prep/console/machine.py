"""CPU cores and memory of this process."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource

from prep.console.errors import UserError
from prep.console.text import bytes_text

# Address space that a process needs, as text. See docs/install.md.
_NEEDS = "alexprep needs 2 GB, a stream or a training on a CPU needs 8 GB, each plus the size of the store"


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use.

    Containers and taskset limit the number of usable cores.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory(max_bytes: int, map_large_blocks: bool) -> None:
    """Make glibc's malloc keep up to `max_bytes` of freed memory for later allocations.

    By default, glibc returns every large freed block to the kernel. The kernel must then zero new pages for the next
    allocation. Zeroing took half of the time to rescale a photograph, and a quarter of the time of AlexNet's training
    step. With `map_large_blocks`, blocks of more than 32 MiB are still returned to the kernel at once. If the C library
    is not glibc, nothing changes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    if map_large_blocks:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    else:
        mallopt(-4, 0)  # M_MMAP_MAX: largest number of blocks that malloc may allocate with mmap
    mallopt(-1, max_bytes)  # M_TRIM_THRESHOLD: free bytes to keep at the top of the heap


def is_memory_error(text: str) -> bool:
    """Return whether an error of Python, the dynamic linker or the kernel says that there was not enough memory."""
    names = r"MemoryError|allocate memory|failed to map segment|out of memory|start new thread"
    return re.search(names, text) is not None


def memory_error(error: Exception, place: str = "", advice: str = "") -> UserError | None:
    """Return a UserError if `error` says that memory ran out, otherwise None.

    `place` and `advice` are parts of the UserError's message.
    """
    text = str(error).strip().partition("\n")[0]
    is_full = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not is_full and not is_memory_error(f"{type(error).__name__}: {text}"):
        return None
    details = f" ({text})" if text else ""
    return UserError(f"Memory ran out{place}{details}. {advice}".rstrip() + address_space_text())


def address_space_text() -> str:
    """Return a sentence about the limit of this process's address space (ulimit -v), if there is one; otherwise "".

    The sentence begins with a space. It states the limit, and the largest address space that the process has used.
    """
    limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit_bytes == resource.RLIM_INFINITY:
        return ""
    try:
        with open("/proc/self/status") as file:
            peak_bytes = next(1024 * int(line.split()[1]) for line in file if line.startswith("VmPeak"))
    except (OSError, StopIteration):
        peak_bytes = 0
    return (
        f" The address space of a process is limited to {bytes_text(limit_bytes)} (ulimit -v), and this process used "
        f"{bytes_text(peak_bytes)}. Raise the limit: {_NEEDS}."
    )
