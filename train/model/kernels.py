"""The elementwise half of a training step on a CPU, in C (kernels.c); `native` is None where it could not be compiled.

lrn.py, pool.py and optim.py say the same with PyTorch's operators, and go by it for tensors that are not float32 on a
CPU. The work is shared by as many threads as PyTorch has, image by image or position by position, so the bits do not
depend on their number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from prep import compiled

SOURCE = Path(__file__).with_name("kernels.c")
_AT_ONCE = 4096  # numbers, which a first-level cache holds with what is made of them
_BLOCK = 1 << 16  # numbers of an update that are worth a thread


class Norm(ctypes.Structure):
    """b = a · (k + α Σ a²)^−¾ over `reach` maps on either side; a is ReLU's output if `relu`, else the input."""

    _fields_ = (
        ("maps", ctypes.c_int64),
        ("reach", ctypes.c_int64),
        ("relu", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("k", ctypes.c_float),
    )

    def __init__(self, maps: int, size: int, alpha: float, k: float, relu: bool) -> None:
        super().__init__(maps, min(size // 2, maps - 1), relu, alpha, k)

    def padded(self, positions: int) -> int:
        """Numbers of `positions` positions with zeros before, between and after them."""
        return int(self.reach + positions * (self.maps + self.reach))


class Pool(ctypes.Structure):
    """Max-pooling, 3 × 3 with stride 2, of (rows, columns) maps that are normalized first, or not."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("normalise", ctypes.c_int64),
        ("relu_after", ctypes.c_int64),
    )


class NativeKernels:
    """The library's functions, on float32 tensors (N, C, H, W) with channels last. Raises AttributeError where it
    lacks one.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._forward, self._backward = library.norm_forward, library.norm_backward
        self._pool, self._unpool = library.pool_forward, library.pool_backward
        self._forward.argtypes = [pointer, number, number, Norm, pointer, pointer]
        self._backward.argtypes = [pointer, pointer, number, number, Norm, pointer, pointer]
        self._pool.argtypes = [pointer, number, Pool, Norm, pointer, pointer, pointer]
        self._unpool.argtypes = [pointer, pointer, pointer, number, Pool, Norm, pointer, pointer]
        self._update = library.update
        self._update.argtypes = [pointer, pointer, pointer, number, *[ctypes.c_float] * 3]
        for function in (self._forward, self._backward, self._pool, self._unpool, self._update):
            function.restype = None

    def norm(self, x: Tensor, how: Norm) -> Tensor:
        """Normalize."""
        out = torch.empty_like(x)

        def part(first: int, end: int) -> None:
            some = max(1, _AT_ONCE // how.maps)
            scratch = torch.empty(how.padded(some))
            self._forward(_at(x, first), end - first, some, how, _at(out, first), scratch.data_ptr())

        share(x.numel() // how.maps, part)
        return out

    def norm_backward(self, x: Tensor, grad: Tensor, how: Norm) -> Tensor:
        """The gradient of norm's x, given its output's."""
        out = torch.empty_like(x)

        def part(first: int, end: int) -> None:
            some = max(1, _AT_ONCE // how.maps)
            scratch = torch.empty(2 * how.padded(some))
            self._backward(_at(x, first), _at(grad, first), end - first, some, how, _at(out, first), scratch.data_ptr())

        share(x.numel() // how.maps, part)
        return out

    def pool(self, x: Tensor, shape: Pool, how: Norm) -> tuple[Tensor, Tensor]:
        """Normalize, pool and cut: pooled maps, and for each number which of the nine it was (uint8), or 9 where
        ReLU lets no gradient through."""
        images, maps, rows, columns = x.shape
        out, taps = (
            torch.empty(
                (images, maps, (rows - 3) // 2 + 1, (columns - 3) // 2 + 1),
                dtype=dtype,
                memory_format=torch.channels_last,
            )
            for dtype in (torch.float32, torch.uint8)
        )

        def part(first: int, end: int) -> None:
            scratch = torch.empty(3 * columns * maps + how.padded(columns))
            pointers = out[first].data_ptr(), taps[first].data_ptr(), scratch.data_ptr()
            self._pool(x[first].data_ptr(), end - first, shape, how, *pointers)

        share(images, part)
        return out, taps

    def pool_backward(self, x: Tensor | None, grad: Tensor, taps: Tensor, shape: Pool, how: Norm) -> Tensor:
        """The gradient of pool's x, given the pooled maps' and pool's taps. x is wanted where it was normalized."""
        images, columns = len(grad), int(shape.columns)
        whole = images, int(how.maps), int(shape.rows), columns
        out = torch.empty(whole, memory_format=torch.channels_last)

        def part(first: int, end: int) -> None:
            scratch = torch.empty(columns * how.maps + 2 * how.padded(columns))
            given = (out if x is None else x)[first].data_ptr(), grad[first].data_ptr(), taps[first].data_ptr()
            self._unpool(*given, end - first, shape, how, out[first].data_ptr(), scratch.data_ptr())

        share(images, part)
        return out

    def update(self, w: Tensor, v: Tensor, g: Tensor, momentum: float, rate: float, decay: float) -> None:
        """v ← momentum · v − rate · decay · w − rate · g, then w ← w + v, for float32 tensors of one dense layout."""

        def part(first: int, end: int) -> None:
            pointers = (tensor.data_ptr() + 4 * _BLOCK * first for tensor in (w, v, g))
            self._update(*pointers, min(_BLOCK * end, w.numel()) - _BLOCK * first, momentum, rate, decay)

        share(-(-w.numel() // _BLOCK), part)
        torch.autograd.graph.increment_version((w, v))


def share(items: int, part: Callable[[int, int], None]) -> None:
    """Call part(first, end) for all of `items`, in torch's number of threads, of which the caller's is one."""
    threads = min(torch.get_num_threads(), items)
    bounds = [items * t // threads for t in range(threads + 1)]
    others = [Thread(target=part, args=bounds[t : t + 2]) for t in range(1, threads)]
    for thread in others:
        thread.start()
    part(0, bounds[1])
    for thread in others:
        thread.join()


def _at(x: Tensor, position: int) -> int:
    """The address of a position's first number: channels are last in memory."""
    return x.data_ptr() + 4 * position * x.shape[1]


def is_correct(kernel: NativeKernels) -> bool:
    """Whether it computes what it should on small maps: windows cut at both ends, whole vectors of maps and rests, ReLU
    before the normalization and after the pooling; and on the update of as many parameters.
    """
    return _is_correct_for(kernel, 44, 5, (6, 7), True, False) and _is_correct_for(kernel, 9, 7, (5, 8), False, True)


def _is_correct_for(
    kernel: NativeKernels, maps: int, size: int, area: tuple[int, int], relu: bool, relu_after: bool
) -> bool:
    draw, alpha, k = torch.Generator().manual_seed(0), 0.3, 2.0
    x, grad = (torch.randn(2, *area, maps, generator=draw).sub(0.7).permute(0, 3, 1, 2) for _ in range(2))
    how, shape = Norm(maps, size, alpha, k, relu), Pool(*area, True, relu_after)
    band = (torch.arange(maps)[:, None] - torch.arange(maps)).abs() <= size // 2

    def window(x: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", band.double(), x)

    a = (x.relu() if relu else x).double()
    s = k + alpha * window(a * a)
    b = a * s**-0.75

    def back(grad: Tensor) -> Tensor:
        found = grad * s**-0.75 - 1.5 * alpha * a * window(grad * a * s**-1.75)
        return found.masked_fill(x <= 0, 0) if relu else found

    most, tap = b.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4).max(4)  # of (2, maps, rows, columns, 9)
    rows, columns = most.shape[2:]
    sent = grad[:, :, :rows, :columns].contiguous(memory_format=torch.channels_last)
    at = (2 * torch.arange(rows)[:, None] + tap // 3) * area[1] + 2 * torch.arange(columns) + tap % 3
    cut = (most <= 0) & relu_after
    unpooled = torch.zeros(2, maps, area[0] * area[1], dtype=torch.float64)
    unpooled.scatter_add_(2, at.flatten(2), sent.double().masked_fill(cut, 0).flatten(2))
    pooled, taps = kernel.pool(x, shape, how)
    pairs = [
        (kernel.norm(x, how), b),
        (kernel.norm_backward(x, grad, how), back(grad.double())),
        (pooled, most.masked_fill(cut, 0)),
        (kernel.pool_backward(x, sent, taps, shape, how), back(unpooled.view(2, maps, *area))),
    ]
    v, w = grad + 1, x + 1
    next_v = 0.9 * v.double() - 0.1 * (0.2 * w.double() + x)
    pairs += [(v, next_v), (w, w + next_v)]
    kernel.update(w, v, x, 0.9, 0.1, 0.2)
    return all(torch.allclose(found.double(), wanted, 1e-5, 1e-6) for found, wanted in pairs)


native = compiled.load(compiled.library_path(SOURCE), NativeKernels, is_correct)
