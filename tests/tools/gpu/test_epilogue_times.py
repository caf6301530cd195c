"""Tests of the memory floors of the epilogue kernels and of their timing, on a CPU."""

from __future__ import annotations

import pytest

from tools.gpu.epilogue_times import kernel_lines, kernel_time, measure_epilogues, moved_bytes
from tools.gpu.epilogues import layer_cases
from tools.gpu.settings import GpuCheckSettings
from train.config.architecture import ALEXNET


@pytest.mark.parametrize(
    ("layer", "forward", "backward"),
    [
        # For one image in bfloat16: x has 96 · 55² values and y 96 · 27², two bytes each; pooling adds one byte a y.
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
