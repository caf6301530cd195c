"""Tests that the checks of the epilogue kernels pass for right results and fail for wrong results.

The tests run on a CPU. In most tests, PyTorch operators in float32 and bfloat16 replace the kernels. One test runs the
kernels in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tools.gpu.epilogues import Apply, Distance, LayerCase, check_epilogue, layer_cases, operators, tied_windows
from train.config.architecture import ALEXNET, Widths
from train.model.gpu.epilogue import Epilogue, apply_epilogue

CPU = torch.device("cpu")
SMALL = {case.name: case for case in layer_cases(Widths(16, 16, 16, 16, 16, 16, 16), (11, 9, 7))}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
LAYERS = pytest.mark.parametrize("layer", SMALL)


def test_the_layers_are_those_of_the_paper() -> None:
    cases = layer_cases(ALEXNET.widths)
    assert [(case.maps, case.side_px, case.pooled_px) for case in cases] == [
        *((48, 55, 27), (128, 27, 13), (192, 13, 13), (192, 13, 13), (128, 13, 6)),
    ]
    assert [case.epilogue.norm is not None for case in cases] == [True, True, False, False, False]


@DTYPES
@LAYERS
def test_right_results_pass(layer: str, dtype: torch.dtype) -> None:
    check = check_epilogue(SMALL[layer], 3, dtype, CPU, operators)
    assert check.ok and check.name.startswith(f"epilogue of {layer}, 2 × 8 maps of "), check


def with_changed(part: str, change: Callable[[Tensor], Tensor]) -> Apply:
    """Return PyTorch operators with a fault in `part`: the gradient of the bias, the gradient of x, or the result."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return change(x) if part == "result" else x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad if part == "result" else change(grad)

    def apply(
        x: Sequence[Tensor], bias: Sequence[Tensor], epilogue: Epilogue, joined: bool, channels_first: bool
    ) -> list[Tensor]:
        if part == "x":
            x = [Changed.apply(x[0]), *x[1:]]
        if part == "bias":
            bias = [*bias[:-1], Changed.apply(bias[-1])]
        results = operators(x, bias, epilogue, joined, channels_first)
        return [Changed.apply(results[0]), *results[1:]] if part == "result" else results

    return apply


def without_last_row(t: Tensor) -> Tensor:
    """Return a copy in which the last row of each map is 0."""
    return torch.cat([t[:, :, :-1], torch.zeros_like(t[:, :, -1:])], 2)


@DTYPES
@LAYERS
@pytest.mark.parametrize("part", ["result", "x"])
def test_a_missing_row_of_the_maps_fails(layer: str, dtype: torch.dtype, part: str) -> None:
    assert not check_epilogue(SMALL[layer], 3, dtype, CPU, with_changed(part, without_last_row)).ok


@DTYPES
@LAYERS
def test_a_bias_gradient_without_one_map_fails(layer: str, dtype: torch.dtype) -> None:
    without_map = with_changed("bias", lambda grad: torch.cat([grad[:-1], torch.zeros(1)]))
    assert not check_epilogue(SMALL[layer], 3, dtype, CPU, without_map).ok


def test_an_error_of_a_hundred_thousandth_fails_in_float32() -> None:
    slightly_wrong = with_changed("x", lambda grad: grad * (1 + 1e-5))
    assert not check_epilogue(SMALL["layer 1"], 3, torch.float32, CPU, slightly_wrong).ok


@DTYPES
def test_a_gradient_at_the_last_maximum_passes_but_at_another_value_fails(dtype: torch.dtype) -> None:
    """The check leaves out windows with two nearly equal maxima, so a kernel may choose either maximum.

    The check still fails if a kernel gives the gradient to another value of a window.
    """
    moved = with_changed("x", lambda grad: grad.roll(1, 3))
    assert not check_epilogue(SMALL["conv5"], 3, dtype, CPU, moved).ok
    x = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
    x[0, 0, 1, 1], x[0, 0, 1, 2], x[0, 0, 0, 4] = 3.0, 3.0, 4.0
    tied = tied_windows(x, torch.zeros(1, dtype=torch.float64), Epilogue(pool_px=3, after="relu"), 1e-5)
    assert tied.tolist() == [[[[True, False]]]]


@DTYPES
@pytest.mark.parametrize("layer", ["layer 1", "layer 2"])
def test_windows_across_columns_or_another_alpha_fail(layer: str, dtype: torch.dtype) -> None:
    def across_columns(
        x: Sequence[Tensor], bias: Sequence[Tensor], epilogue: Epilogue, joined: bool, channels_first: bool
    ) -> list[Tensor]:
        (result,) = operators([torch.cat(list(x), 1)], [torch.cat(list(bias))], epilogue, True, channels_first)
        return [result] if joined else list(result.chunk(2, 1))

    def other_alpha(x: Sequence[Tensor], bias: Sequence[Tensor], epilogue: Epilogue, *form: bool) -> list[Tensor]:
        assert epilogue.norm is not None
        return operators(x, bias, replace(epilogue, norm=replace(epilogue.norm, alpha=2e-5)), *form)

    for wrong in (across_columns, other_alpha):
        assert not check_epilogue(SMALL[layer], 3, dtype, CPU, wrong).ok, wrong


@LAYERS
def test_a_result_without_the_nan_of_its_input_fails(layer: str) -> None:
    check = check_epilogue(SMALL[layer], 3, torch.float32, CPU, with_changed("result", lambda y: y.nan_to_num(0.0)))
    assert not check.ok and "NaN lost" in check.found


def test_nan_in_other_places_fails_and_nan_in_the_other_maps_of_a_normalization_passes() -> None:
    def to_all_maps(y: Tensor) -> Tensor:
        return torch.where(y.isnan().any(1, keepdim=True), float("nan"), y)

    def to_all_positions(y: Tensor) -> Tensor:
        return torch.where(y.isnan().any(3, keepdim=True), float("nan"), y)

    assert check_epilogue(SMALL["layer 1"], 3, torch.float32, CPU, with_changed("result", to_all_maps)).ok
    for layer, spread in (("conv3", to_all_maps), ("layer 1", to_all_positions)):
        check = check_epilogue(SMALL[layer], 3, torch.float32, CPU, with_changed("result", spread))
        assert not check.ok and "wrong NaN" in check.found


def test_a_distance_is_that_of_all_parts() -> None:
    distance = Distance()
    distance.add(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0], dtype=torch.float64))
    assert distance.relative() == float("inf")
    distance.add(torch.tensor([4.0]), torch.tensor([4.0], dtype=torch.float64))
    assert distance.relative() == 0.75


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize(
    "case",
    [
        LayerCase("conv3", 5, 5, Epilogue("relu"), True, False),
        LayerCase("conv5", 5, 5, Epilogue(pool_px=3, after="relu"), False, True, True),
    ],
    ids=lambda case: case.name,
)
def test_the_kernels_pass_in_the_interpreter_of_triton(case: LayerCase) -> None:
    check = check_epilogue(case, 1, torch.float32, CPU, apply_epilogue)
    assert check.ok, check


def test_the_side_of_a_result_depends_on_the_pooling() -> None:
    assert LayerCase("x", 4, 13, Epilogue("relu"), True, False).pooled_px == 13
    assert LayerCase("x", 4, 13, Epilogue(pool_px=2), True, False).pooled_px == 6
