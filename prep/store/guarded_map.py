"""Memory maps of files. kernels.c protects the maps against SIGBUS, the signal for a page that cannot be read."""

from __future__ import annotations

import ctypes
import mmap

from prep.store import kernels

_libc = ctypes.CDLL(None)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class GuardedMap:
    """A memory map of a file, protected against SIGBUS by kernels.c.

    This class calls the C function mmap, because Python's mmap objects would keep a file descriptor open for each
    shard.
    """

    def __init__(self, address: int, size: int, guard: int, native: kernels.NativeKernels) -> None:
        self.address, self.size = address, size
        self.view = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B").toreadonly()
        self._guard, self._native = guard, native

    @staticmethod
    def of(descriptor: int, size: int, native: kernels.NativeKernels) -> GuardedMap | None:
        """Map a file of `size` bytes for reading. Returns None if the file cannot be mapped or protected."""
        address: int | None = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            return None
        guard = native.guard_map(address, size)
        if guard is None:
            _libc.munmap(address, size)
            return None
        return GuardedMap(address, size, guard, native)

    def is_broken(self) -> bool:
        """Return whether a page of the map could not be read."""
        return self._guard >= 0 and self._native.map_is_broken(self._guard)

    def renew_protection(self) -> None:
        """Protect the map again if other code has replaced the handler of SIGBUS."""
        self._native.renew_protection()

    def close(self) -> None:
        """Unmap the file. A second call has no effect."""
        if self._guard >= 0:
            self._native.release_map(self._guard)
            _libc.munmap(self.address, self.size)
            self._guard = -1
