"""Tests of tools.gpu.epilogue_times on a CPU: bytes that an epilogue kernel must move, and the timing of kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

import tools.gpu.epilogue_times as epilogue_times
from tools.gpu.epilogue_times import kernel_lines, kernel_time, measure_epilogues, moved_bytes, seconds_per_work
from tools.gpu.epilogues import layer_cases
from tools.gpu.settings import GpuCheckSettings
from train.config.architecture import ALEXNET


@pytest.mark.parametrize(
    ("layer", "forward", "backward"),
    [
        # In layer 1, for one image in bfloat16, the input has 96 · 55² values and the output has 96 · 27² values, of
        # two bytes each. Pooling adds one byte for each output value.
        ("layer 1", 2 * 96 * 3025 + 3 * 96 * 729, 4 * 96 * 3025 + 3 * 96 * 729),
        ("layer 2", 2 * 256 * 729 + 3 * 256 * 169, 4 * 256 * 729 + 3 * 256 * 169),
        ("conv3", 4 * 384 * 169, 6 * 384 * 169),
        ("conv5", 2 * 256 * 169 + 3 * 256 * 36, 2 * 256 * 169 + 3 * 256 * 36),
    ],
)
def test_bytes_that_a_kernel_must_move(layer: str, forward: int, backward: int) -> None:
    case = next(case for case in layer_cases(ALEXNET.widths) if case.name == layer)
    assert moved_bytes(case, 1, 2) == {"forward": forward, "backward": backward}
    assert moved_bytes(case, 512, 2)["forward"] == 512 * forward


def test_the_share_is_the_time_divided_by_the_time_of_a_copy() -> None:
    time = kernel_time("conv3, forward", 3e-4, 425_000_000, 4.25e12)
    assert (time.ms, time.gb, time.floor_ms, time.share) == (0.3, 0.425, 0.1, 3.0)


def test_every_direction_of_every_layer_is_measured(settings: GpuCheckSettings) -> None:
    result = measure_epilogues(settings)
    layers = ("layer 1", "layer 2", "conv3", "conv4", "conv5")
    names = [f"{layer}, {direction}" for layer in layers for direction in ("forward", "backward")]
    assert [time.kernel for time in result["kernels"]] == names
    assert result["images"] == 2 and result["dtype"] == "bfloat16" and result["copy_tb_per_s"] > 0
    assert all(time.ms > 0 and time.share > 0 for time in result["kernels"])
    assert result["all_ms"] == pytest.approx(sum(time.ms for time in result["kernels"]), abs=1e-3)
    lines = kernel_lines(result)
    assert len(lines) == 1 + 10 + 1 and lines[1].startswith("layer 1, forward")


def test_on_a_gpu_all_inputs_are_recorded_in_one_graph_which_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated GPU, a replay of a graph of two functions takes 4 ms. In 0.1 s, 25 replays are timed."""
    calls: list[str] = []
    clock_ms = [0.0]

    class Graph:
        def replay(self) -> None:
            calls.append("replay")
            clock_ms[0] += 4.0

    @contextmanager
    def record(graph: Graph, stream: object) -> Any:
        calls.append("record")
        yield
        calls.append("recorded")

    def elapsed_s(devices: object, work: Callable[[], object]) -> float:
        before = clock_ms[0]
        work()
        return (clock_ms[0] - before) / 1000

    cuda = SimpleNamespace(
        synchronize=lambda device: None, stream=nullcontext, device=nullcontext, graph=record, CUDAGraph=Graph
    )
    monkeypatch.setattr(epilogue_times, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(epilogue_times, "elapsed_s", elapsed_s)
    settings: Any = SimpleNamespace(device="cuda:0", devices=("cuda:0", "cuda:0"))
    works = [lambda: calls.append("first"), lambda: calls.append("second")]
    assert seconds_per_work(settings, works, object()) == pytest.approx(0.002)
    assert calls == ["first", "second", "record", "first", "second", "recorded", *["replay"] * (1 + 1 + 25)]
