"""Times of the kernels between the convolutions, compared with the shortest times that the memory speed allows.

The memory floor of a kernel is a time: the number of bytes that the kernel must read and write, divided by the measured
speed of a copy within the GPU's memory. The share of a kernel is its time divided by its memory floor. The goal is a
share of at most 2.

An epilogue is the work between two convolutions (tools/gpu/epilogues.py). Its forward pass is recorded in one
CUDA graph, and its backward pass in another, so that the time of launches is not measured. Each graph computes its pass
for several inputs, one after another. Together, the inputs are larger than the cache of the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.gpu.epilogues import Apply, LayerCase, as_output, chosen_apply, layer_cases, make_inputs, make_upstream
from tools.gpu.machine import copy_bytes_per_s, elapsed_s
from tools.gpu.settings import GpuCheckSettings

GOAL_SHARE = 2.0
_CACHE_BYTES = 256e6  # bytes that all forward passes of a graph read and write: five times the cache of an H200
_MEASURED_S = 0.1  # time for which each graph is replayed

Work = Callable[[], object]


@dataclass(frozen=True)
class KernelTime:
    """Time of the forward or the backward pass of an epilogue. The fields are JSON keys of the report."""

    kernel: str  # "layer 1, forward"
    ms: float
    gb: float  # bytes that the kernel must read and write, in units of 10⁹ bytes
    floor_ms: float  # time in which a copy within the GPU's memory reads and writes as many bytes
    share: float  # ms divided by floor_ms


def moved_bytes(case: LayerCase, images: int, itemsize: int) -> dict[str, int]:
    """Return the bytes that the kernels must read and write, by direction: "forward" and "backward".

    Biases are not counted.

    forward   reads x, the output of the convolution, and writes the result. With pooling, the kernel also writes one
              byte for each pooled value.
    backward  reads the gradient of the result, and writes the gradient of x. With pooling, the kernel also
              reads the byte of each pooled value. With normalization, or with a nonlinearity before pooling, the kernel
              also reads x. With a nonlinearity but neither normalization nor pooling, the kernel also reads the result.
    """
    maps = images * case.columns * case.maps
    x, y = maps * case.side_px**2, maps * case.pooled_px**2
    pooled = case.epilogue.pool_px > 0
    argmax = y if pooled else 0
    reads_x = case.epilogue.norm is not None or (pooled and case.epilogue.before != "none")
    reads_y = not pooled and case.epilogue.norm is None and case.epilogue.before != "none"
    return {
        "forward": (x + y) * itemsize + argmax,
        "backward": (y + x + x * reads_x + y * reads_y) * itemsize + argmax,
    }


def measure_epilogues(settings: GpuCheckSettings) -> dict[str, Any]:
    """Return the times of every epilogue for settings.kernel_images images.

    The dtype is bfloat16, or float32 if the GPU has no bfloat16.
    """
    dtype = torch.bfloat16 if "bf16" in settings.precisions else torch.float32
    device, images = settings.device, settings.kernel_images
    bytes_per_s = copy_bytes_per_s(settings.devices[0], 2**20 if settings.is_cpu_trial else 2**30)
    times: list[KernelTime] = []
    for case in layer_cases(settings.architecture.widths):
        moved = moved_bytes(case, images, dtype.itemsize)
        sets = max(1, round(_CACHE_BYTES / moved["forward"])) if settings.on_gpu else 1
        works = make_works(case, images, dtype, device, sets, chosen_apply(device))
        for direction in ("forward", "backward"):
            seconds = seconds_per_work(settings, *works[direction])
            times.append(kernel_time(f"{case.name}, {direction}", seconds, moved[direction], bytes_per_s))
    return {
        "images": images,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_tb_per_s": round(bytes_per_s / 1e12, 3),
        "kernels": times,
        "all_ms": round(sum(time.ms for time in times), 4),
        "floor_ms": round(sum(time.floor_ms for time in times), 4),
        "within_goal": [time.kernel for time in times if time.share <= GOAL_SHARE],
    }


def kernel_time(kernel: str, seconds: float, moved: int, bytes_per_s: float) -> KernelTime:
    """Return the time of a kernel with its memory floor and its share."""
    floor_s = moved / bytes_per_s
    return KernelTime(
        kernel, round(1e3 * seconds, 4), round(moved / 1e9, 4), round(1e3 * floor_s, 4), round(seconds / floor_s, 2)
    )


def make_works(
    case: LayerCase, images: int, dtype: torch.dtype, device: torch.device, sets: int, apply: Apply
) -> dict[str, tuple[list[Work], Any]]:
    """Return {direction: (functions, stream)} for the directions "forward" and "backward".

    There is one function for each of `sets` inputs. `stream` is the CUDA stream on which the functions must run; on a
    CPU it is None. A backward pass runs on the stream of its forward pass. make_works therefore computes the forward
    passes for the functions of "backward" on `stream`.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # untyped in torch
    forward: list[Work] = []
    backward: list[Work] = []
    upstream = as_output(case, make_upstream(case, images, dtype, device))
    for number in range(sets):
        x, bias = make_inputs(case, images, dtype, device, seed=number)
        leaves = [tensor.requires_grad_() for tensor in (*x, *bias)]

        def compute(leaves: Sequence[Tensor] = leaves, columns: int = len(x)) -> list[Tensor]:
            return apply(leaves[:columns], leaves[columns:], case.epilogue, case.joined_out, case.channels_first)

        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # this block changes nothing if `stream` is None
            outputs = compute()
        gradient = [tensor.clone() for tensor in upstream]

        def compute_gradients(
            outputs: list[Tensor] = outputs, leaves: list[Tensor] = leaves, gradient: list[Tensor] = gradient
        ) -> object:
            return torch.autograd.grad(outputs, leaves, gradient, retain_graph=True)

        forward.append(torch.no_grad()(compute))
        backward.append(compute_gradients)
    return {"forward": (forward, stream), "backward": (backward, stream)}


def seconds_per_work(settings: GpuCheckSettings, works: Sequence[Work], stream: Any) -> float:
    """Return the mean time that one function of `works` takes.

    On a GPU, all functions are recorded in one CUDA graph on `stream`.
    """
    if stream is None:
        return elapsed_s(settings.devices, lambda: [work() for work in works]) / len(works)
    device = settings.device
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        for work in works:
            work()  # the first call compiles the kernels
    torch.cuda.synchronize(device)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        for work in works:
            kept.append(work())  # the results are kept, so that each has its own memory
    graph.replay()
    once_s = elapsed_s(settings.devices, graph.replay)
    replays = max(3, round(_MEASURED_S / max(once_s, 1e-6)))

    def replay() -> None:
        for _ in range(replays):
            graph.replay()

    return elapsed_s(settings.devices, replay) / replays / len(works)


def kernel_lines(result: dict[str, Any]) -> list[str]:
    """Return the times as text lines."""
    lines = [
        f"{'ms for ' + str(result['images']) + ' images':28} {'time':>8} {'floor':>8} {'share':>6}   "
        f"({result['dtype']}, copy {result['copy_tb_per_s']} TB/s)"
    ]
    for time in result["kernels"]:
        lines.append(f"{time.kernel:28} {time.ms:8.3f} {time.floor_ms:8.3f} {time.share:6.2f}")
    lines.append(f"{'all':28} {result['all_ms']:8.3f} {result['floor_ms']:8.3f}")
    return lines
