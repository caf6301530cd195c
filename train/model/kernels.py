"""C kernels (kernels.c) for training on a CPU.

One kernel applies ReLU, normalization and pooling in one pass. Other kernels compute the normalization alone, the
parameter update, and sums of squares.

`native` is a NativeKernels object, or None if the kernels could not be compiled or are switched off (prep/compiled.py).
lrn.py, pooling.py and train/optim use equivalent PyTorch operators if `native` is None or a tensor is not float32. Each
kernel runs in as many threads as PyTorch uses. The results have the same bits for any number of threads.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from prep import compiled

SOURCE = Path(__file__).with_name("kernels.c")
_NORM_BLOCK = 4096  # number of values that are normalized at a time; the values and their squares fit into an L1 cache
_UPDATE_BLOCK = 1 << 16  # number of values in a block; `update` and `sum_of_squares` give each thread whole blocks


class NormParams(ctypes.Structure):
    """Parameters of local response normalization: b = a · (k + α Σ a²)^−¾. If `relu`, a = max(x, 0); otherwise a = x.

    Σ a² is the sum over a map and the `reach` maps on each side of this map.
    """

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
        """Return the number of values in a buffer for `positions` pixels.

        In the buffer, `reach` zeros lie before the first pixel, between two pixels, and after the last pixel.
        """
        return int(self.reach + positions * (self.maps + self.reach))


class PoolParams(ctypes.Structure):
    """Parameters of 3 × 3 max-pooling with stride 2.

    If `normalize` is true, local response normalization comes before the pooling.
    """

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("normalize", ctypes.c_int64),
        ("relu_after", ctypes.c_int64),
    )


class NativeKernels:
    """The functions of the compiled library, for float32 tensors (N, C, H, W) in channels-last layout.

    Raises AttributeError if the library lacks one of the functions.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._norm_forward, self._norm_backward = library.norm_forward, library.norm_backward
        self._pool_forward, self._pool_backward = library.pool_forward, library.pool_backward
        self._norm_forward.argtypes = [pointer, number, number, NormParams, pointer, pointer]
        self._norm_backward.argtypes = [pointer, pointer, number, number, NormParams, pointer, pointer]
        self._pool_forward.argtypes = [pointer, number, PoolParams, NormParams, pointer, pointer, pointer]
        self._pool_backward.argtypes = [pointer, pointer, pointer, number, PoolParams, NormParams, pointer, pointer]
        self._update = library.update
        self._update.argtypes = [pointer, pointer, pointer, number, *[ctypes.c_float] * 3]
        self._sums_of_squares = library.sums_of_squares
        self._sums_of_squares.argtypes = [pointer, number, number, pointer]
        functions = (self._norm_forward, self._norm_backward, self._pool_forward, self._pool_backward, self._update)
        for function in (*functions, self._sums_of_squares):
            function.restype = None

    def norm(self, x: Tensor, norm: NormParams) -> Tensor:
        """Return the local response normalization of x."""
        out = torch.empty_like(x)

        def work(first: int, end: int) -> None:
            block = max(1, _NORM_BLOCK // norm.maps)
            scratch = torch.empty(norm.padded(block))
            self._norm_forward(_address(x, first), end - first, block, norm, _address(out, first), scratch.data_ptr())

        run_in_threads(x.numel() // norm.maps, work)
        return out

    def norm_backward(self, x: Tensor, grad: Tensor, norm: NormParams) -> Tensor:
        """Return the gradient of the loss with respect to x, the input of `self.norm`.

        grad  the gradient with respect to the output of `self.norm`
        """
        out = torch.empty_like(x)

        def work(first: int, end: int) -> None:
            block = max(1, _NORM_BLOCK // norm.maps)
            scratch = torch.empty(2 * norm.padded(block))
            inputs = _address(x, first), _address(grad, first)
            self._norm_backward(*inputs, end - first, block, norm, _address(out, first), scratch.data_ptr())

        run_in_threads(x.numel() // norm.maps, work)
        return out

    def pool(self, x: Tensor, pool: PoolParams, norm: NormParams) -> tuple[Tensor, Tensor]:
        """Apply ReLU, normalization and max-pooling to x, as the parameters `norm` and `pool` specify.

        Returns the pooled maps, and a uint8 tensor of the same shape. For each pooled value, the uint8 tensor has the
        index, 0 to 8, of the maximum within the pooling window. If the ReLU after pooling has the gradient 0, the
        uint8 tensor has 9 instead.
        """
        images, maps, rows, columns = x.shape
        out, argmax = (
            torch.empty(
                (images, maps, (rows - 3) // 2 + 1, (columns - 3) // 2 + 1),
                dtype=dtype,
                memory_format=torch.channels_last,
            )
            for dtype in (torch.float32, torch.uint8)
        )

        def work(first: int, end: int) -> None:
            scratch = torch.empty(3 * columns * maps + norm.padded(columns))
            outputs = out[first].data_ptr(), argmax[first].data_ptr()
            self._pool_forward(x[first].data_ptr(), end - first, pool, norm, *outputs, scratch.data_ptr())

        run_in_threads(images, work)
        return out, argmax

    def pool_backward(
        self, x: Tensor | None, grad: Tensor, argmax: Tensor, pool: PoolParams, norm: NormParams
    ) -> Tensor:
        """Return the gradient with respect to the input of `self.pool`.

        x       the input of `self.pool`; None if there was no normalization
        grad    the gradient with respect to the pooled maps
        argmax  the indices that `self.pool` returned
        """
        images, columns = len(grad), int(pool.columns)
        shape = images, int(norm.maps), int(pool.rows), columns
        out = torch.empty(shape, memory_format=torch.channels_last)

        def work(first: int, end: int) -> None:
            scratch = torch.empty(columns * norm.maps + 2 * norm.padded(columns))
            inputs = (out if x is None else x)[first].data_ptr(), grad[first].data_ptr(), argmax[first].data_ptr()
            self._pool_backward(*inputs, end - first, pool, norm, out[first].data_ptr(), scratch.data_ptr())

        run_in_threads(images, work)
        return out

    def update(self, w: Tensor, v: Tensor, g: Tensor, momentum: float, lr: float, decay: float) -> None:
        """Compute v ← momentum · v − lr · decay · w − lr · g, then w ← w + v.

        The tensors are float32 and have the same dense layout.
        """

        def work(first: int, end: int) -> None:
            pointers = (tensor.data_ptr() + 4 * _UPDATE_BLOCK * first for tensor in (w, v, g))
            count = min(_UPDATE_BLOCK * end, w.numel()) - _UPDATE_BLOCK * first
            self._update(*pointers, count, momentum, lr, decay)

        run_in_threads(-(-w.numel() // _UPDATE_BLOCK), work)
        torch.autograd.graph.increment_version((w, v))

    def sum_of_squares(self, x: Tensor) -> float:
        """Return Σ x², computed in float64, for a float32 tensor without gaps in memory."""
        sums = torch.zeros(-(-x.numel() // _UPDATE_BLOCK), dtype=torch.float64)

        def work(first: int, end: int) -> None:
            count = min(_UPDATE_BLOCK * end, x.numel()) - _UPDATE_BLOCK * first
            address = x.data_ptr() + 4 * _UPDATE_BLOCK * first
            self._sums_of_squares(address, count, _UPDATE_BLOCK, sums[first:].data_ptr())

        if len(sums):
            run_in_threads(len(sums), work)
        return math.fsum(sums.tolist())


def run_in_threads(items: int, work: Callable[[int, int], None]) -> None:
    """Divide range(items) among as many threads as torch uses. Each thread calls work(first, end) for its part.

    The calling thread is one of the threads.
    """
    threads = min(torch.get_num_threads(), items)
    bounds = [items * t // threads for t in range(threads + 1)]
    others = [Thread(target=work, args=bounds[t : t + 2]) for t in range(1, threads)]
    for thread in others:
        thread.start()
    work(0, bounds[1])
    for thread in others:
        thread.join()


def _address(x: Tensor, position: int) -> int:
    """Return the memory address of channel 0 of pixel number `position` in x, a tensor in channels-last layout."""
    return x.data_ptr() + 4 * position * x.shape[1]


def is_correct(kernels: NativeKernels) -> bool:
    """Return True if the kernels give the same results as float64 PyTorch operators on small tensors.

    Two calls of _is_correct_for test every function. The tests cover normalization windows that are clipped at the
    first and last map, numbers of maps that are not a multiple of the vector length, ReLU before normalization, and
    ReLU after pooling.
    """
    return _is_correct_for(kernels, 44, 5, (6, 7), True, False) and _is_correct_for(kernels, 9, 7, (5, 8), False, True)


def _is_correct_for(
    kernels: NativeKernels, maps: int, size: int, area: tuple[int, int], relu: bool, relu_after: bool
) -> bool:
    generator, alpha, k = torch.Generator().manual_seed(0), 0.3, 2.0
    x, grad = (torch.randn(2, *area, maps, generator=generator).sub(0.7).permute(0, 3, 1, 2) for _ in range(2))
    norm, pool = NormParams(maps, size, alpha, k, relu), PoolParams(*area, True, relu_after)
    band = (torch.arange(maps)[:, None] - torch.arange(maps)).abs() <= size // 2

    def window_sum(x: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", band.double(), x)

    a = (x.relu() if relu else x).double()
    s = k + alpha * window_sum(a * a)
    b = a * s**-0.75

    def norm_backward(grad: Tensor) -> Tensor:
        gradient = grad * s**-0.75 - 1.5 * alpha * a * window_sum(grad * a * s**-1.75)
        return gradient.masked_fill(x <= 0, 0) if relu else gradient

    maxima, index = b.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4).max(4)  # maximum over the 9 values of each window
    rows, columns = maxima.shape[2:]
    pooled_grad = grad[:, :, :rows, :columns].contiguous(memory_format=torch.channels_last)
    at = (2 * torch.arange(rows)[:, None] + index // 3) * area[1] + 2 * torch.arange(columns) + index % 3
    cut = (maxima <= 0) & relu_after
    unpooled = torch.zeros(2, maps, area[0] * area[1], dtype=torch.float64)
    unpooled.scatter_add_(2, at.flatten(2), pooled_grad.double().masked_fill(cut, 0).flatten(2))
    pooled, argmax = kernels.pool(x, pool, norm)
    pairs = [
        (kernels.norm(x, norm), b),
        (kernels.norm_backward(x, grad, norm), norm_backward(grad.double())),
        (pooled, maxima.masked_fill(cut, 0)),
        (kernels.pool_backward(x, pooled_grad, argmax, pool, norm), norm_backward(unpooled.view(2, maps, *area))),
    ]
    v, w = grad + 1, x + 1
    next_v = 0.9 * v.double() - 0.1 * (0.2 * w.double() + x)
    pairs += [(v, next_v), (w, w + next_v)]
    kernels.update(w, v, x, 0.9, 0.1, 0.2)
    pairs.append((torch.tensor(kernels.sum_of_squares(x)), x.double().square().sum()))
    return all(torch.allclose(actual.double(), expected, 1e-5, 1e-6) for actual, expected in pairs)


native = compiled.load(compiled.library_path(SOURCE), NativeKernels, is_correct)
