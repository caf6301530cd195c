"""Checks of tools.gpu_check for the kernels between the convolutions, at full size, against float64 operators.

The kernels (train/model/gpu/epilogue.py) are compared with PyTorch operators in float64 on the same device, from the
same inputs. The compared values are the result, the gradient of the convolution's output x and the gradient of the
bias. The float64 results are computed for a few images at a time, so that they fit into memory.

An epilogue is the work between two convolutions: bias, nonlinearity, normalization and pooling.

If the two largest values of a pooling window are almost equal, rounding decides which of the two values is the maximum.
The gradient of the window can then go to another position than in float64. These windows are left out: their upstream
gradient is 0. A check fails if more than a tenth of the windows are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.gpu.settings import Check, GpuCheckSettings
from train.config.architecture import Widths
from train.config.recipe import Lrn
from train.config.recipes import PAPER
from train.model.gpu.epilogue import Epilogue, apply_epilogue

# Limits of ‖found − wanted‖ / ‖wanted‖ for the result, the gradient of x, and the gradient of the bias. In bfloat16,
# the rounding of the result alone gives an error of 1.7e-3. Triton's interpreter truncates instead of rounding, which
# gives an error of up to 3.5e-3.
TOLERANCES = {torch.float32: (2e-6, 2e-6, 5e-6), torch.bfloat16: (2.0**-8, 2.0**-8, 2.0**-8)}
# A window is left out if its two largest values differ by less than this share of the larger value. The share is larger
# than the relative errors of a kernel's normalized values. These errors are about 1e-7 in float32, and up to 2e-3 in
# bfloat16, where squares have 8 bits.
TIES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
MOST_LEFT_OUT = 0.1
SIGMA = 50.0  # standard deviation of x, in grey levels, as after conv1
_CHUNK = 64  # number of images for which float64 results are computed at a time

Apply = Callable[[Sequence[Tensor], Sequence[Tensor], Epilogue, bool, bool], list[Tensor]]


@dataclass(frozen=True)
class LayerCase:
    """One use of an epilogue in the network."""

    name: str
    maps: int  # number of maps of each column
    side_px: int  # width and height of the maps of x
    epilogue: Epilogue
    joined_in: bool  # True: x is one tensor with the maps of all columns; False: one tensor for each column
    joined_out: bool  # True: the result is one tensor with the maps of all columns
    channels_first: bool = False  # True: the result has channels first in memory, as fc6 needs it
    columns: int = 2

    @property
    def pooled_px(self) -> int:
        """Width and height of the maps of the result."""
        pool_px = self.epilogue.pool_px
        return (self.side_px - pool_px) // 2 + 1 if pool_px else self.side_px


def layer_cases(widths: Widths, sides_px: tuple[int, int, int] = (55, 27, 13)) -> list[LayerCase]:
    """Return the epilogues of the network of the paper, with both columns on one device.

    sides_px  sides of the maps of conv1, of conv2, and of conv3 to conv5
    """
    norm, pool_px = PAPER.lrn, PAPER.pool_px
    normalized, activation = Epilogue("relu", norm, pool_px), Epilogue("relu")
    pooled = Epilogue(pool_px=pool_px, after="relu")
    conv1, conv2, conv3, conv4, conv5 = (
        width // 2 for width in (widths.conv1, widths.conv2, widths.conv3, widths.conv4, widths.conv5)
    )
    return [
        LayerCase("layer 1", conv1, sides_px[0], normalized, joined_in=True, joined_out=False),
        LayerCase("layer 2", conv2, sides_px[1], normalized, joined_in=False, joined_out=True),
        LayerCase("conv3", conv3, sides_px[2], activation, joined_in=True, joined_out=False),
        LayerCase("conv4", conv4, sides_px[2], activation, joined_in=False, joined_out=False),
        LayerCase("conv5", conv5, sides_px[2], pooled, joined_in=False, joined_out=True, channels_first=True),
    ]


def chosen_apply(device: torch.device) -> Apply:
    """Return the function to check: the kernels on a GPU, or PyTorch operators on a CPU, where the kernels are slow."""
    return apply_epilogue if device.type == "cuda" else operators


def epilogue_checks(settings: GpuCheckSettings) -> Iterator[Check]:
    """Check every epilogue in float32 and bfloat16, on settings.kernel_images images."""
    dtypes = (torch.float32, torch.bfloat16) if "bf16" in settings.precisions else (torch.float32,)
    for case in layer_cases(settings.architecture.widths):
        for dtype in dtypes:
            yield check_epilogue(case, settings.kernel_images, dtype, settings.device, chosen_apply(settings.device))


def check_epilogue(case: LayerCase, images: int, dtype: torch.dtype, device: torch.device, apply: Apply) -> Check:
    """Compare result and gradients of `apply` with float64, and check that a NaN in x gives NaN in the result."""
    errors, left_out = epilogue_errors(case, images, dtype, device, apply)
    nan_fault = nan_faults(case, dtype, device, apply)
    limits = TOLERANCES[dtype]
    # If an error is NaN, is_close is False.
    is_close = all(error <= limit for error, limit in zip(errors, limits, strict=True))
    places = f"{case.columns} × {case.maps} maps of {case.side_px}×{case.side_px}"
    return Check(
        f"epilogue of {case.name}, {places}, {images} images, {str(dtype).removeprefix('torch.')}, on {device}",
        is_close and left_out <= MOST_LEFT_OUT and not nan_fault,
        f"results differ by {errors[0]:.2g}, gradients of x by {errors[1]:.2g}, of the bias by {errors[2]:.2g}; "
        f"{100 * left_out:.2g} % of the windows left out; {nan_fault or 'NaN kept'}",
        f"{limits[0]:.2g}, {limits[1]:.2g}, {limits[2]:.2g}; at most {100 * MOST_LEFT_OUT:g} %; NaN kept",
    )


# ---- results and gradients


def make_inputs(
    case: LayerCase, images: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Return random x and bias.

    x is one tensor with the maps of all columns if case.joined_in is True, otherwise one tensor for each column. The
    tensors have channels last in memory.
    """
    generator = torch.Generator(device).manual_seed(seed)
    count, maps = (1, case.columns * case.maps) if case.joined_in else (case.columns, case.maps)
    shape = (images, maps, case.side_px, case.side_px)
    x = [SIGMA * torch.randn(shape, generator=generator, device=device) for _ in range(count)]
    bias = [SIGMA / 4 * torch.randn(case.maps, generator=generator, device=device) for _ in range(case.columns)]
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in x], bias


def make_upstream(case: LayerCase, images: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return a random gradient of the result for each column."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (images, case.maps, case.pooled_px, case.pooled_px)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(case.columns)]


def as_output(case: LayerCase, by_column: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors as the result of `case` has them: joined if case.joined_out, and in the same layout."""
    tensors = [torch.cat(list(by_column), 1)] if case.joined_out else list(by_column)
    layout = torch.contiguous_format if case.channels_first else torch.channels_last
    return [tensor.contiguous(memory_format=layout) for tensor in tensors]


def split_columns(case: LayerCase, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a view of the maps of each column."""
    return list(tensors) if len(tensors) == case.columns else list(tensors[0].chunk(case.columns, 1))


def epilogue_errors(
    case: LayerCase, images: int, dtype: torch.dtype, device: torch.device, apply: Apply
) -> tuple[list[float], float]:
    """Return the errors ‖found − wanted‖ / ‖wanted‖ of the result and of the gradients of x and of the bias.

    Also returns the share of windows that are left out. Raises AssertionError if a result or a gradient has a wrong
    dtype or shape.
    """
    x, bias = make_inputs(case, images, dtype, device)
    upstream = make_upstream(case, images, dtype, device)
    by_column = split_columns(case, x)
    left_out = 0
    for column, (gradient, b) in enumerate(zip(upstream, bias, strict=True)):
        for start in range(0, images, _CHUNK):
            part = slice(start, start + _CHUNK)
            tied = tied_windows(by_column[column][part].double(), b.double(), case.epilogue, TIES[dtype])
            gradient[part].masked_fill_(tied, 0)
            left_out += int(tied.sum())
    values = sum(gradient.numel() for gradient in upstream)

    leaves = [tensor.detach().requires_grad_() for tensor in (*x, *bias)]
    outputs = apply(leaves[: len(x)], leaves[len(x) :], case.epilogue, case.joined_out, case.channels_first)
    grads = torch.autograd.grad(outputs, leaves, as_output(case, upstream))
    found = [outputs, list(grads[: len(x)])]
    for tensors, wanted_shape in zip(found, (as_output(case, upstream), x), strict=True):
        assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in wanted_shape]
    y, x_grad = (split_columns(case, [tensor.detach() for tensor in tensors]) for tensors in found)

    totals = [Distance() for _ in range(3)]
    for column, b in enumerate(bias):
        exact_bias_grad = torch.zeros(case.maps, dtype=torch.float64, device=device)
        for start in range(0, images, _CHUNK):
            part = slice(start, start + _CHUNK)
            exact_x = by_column[column][part].double().requires_grad_()
            exact_b = b.double().requires_grad_()
            exact_y = exact(exact_x, exact_b, case.epilogue)
            gradients = torch.autograd.grad(exact_y, (exact_x, exact_b), upstream[column][part].double())
            totals[0].add(y[column][part], exact_y.detach())
            totals[1].add(x_grad[column][part], gradients[0])
            exact_bias_grad += gradients[1]
        totals[2].add(grads[len(x) + column], exact_bias_grad)
    return [total.relative() for total in totals], left_out / values


class Distance:
    """Computes ‖found − wanted‖ / ‖wanted‖ of a tensor that is given in parts."""

    def __init__(self) -> None:
        self._difference = self._wanted = 0.0

    def add(self, found: Tensor, wanted: Tensor) -> None:
        """Add a part of the tensor. `wanted` has the dtype float64."""
        self._difference += float((found.double() - wanted).square().sum())
        self._wanted += float(wanted.square().sum())

    def relative(self) -> float:
        """Return the relative distance of all parts together; infinite if `wanted` is 0 and `found` is not."""
        if self._wanted == 0.0:
            return 0.0 if self._difference == 0.0 else float("inf")
        return float((self._difference / self._wanted) ** 0.5)


# ---- the formula, with PyTorch operators


def exact(x: Tensor, bias: Tensor, epilogue: Epilogue) -> Tensor:
    """Return the result for one column, in x's dtype: after(pool(norm(before(x + bias))))."""
    v = normalized(x, bias, epilogue)
    if epilogue.pool_px:
        v = F.max_pool2d(v, epilogue.pool_px, 2)
    return F.relu(v) if epilogue.after == "relu" else v


def normalized(x: Tensor, bias: Tensor, epilogue: Epilogue) -> Tensor:
    """Return norm(before(x + bias)) for one column.

    Raises ValueError for a nonlinearity that the paper does not have.
    """
    if not {epilogue.before, epilogue.after} <= {"none", "relu"}:
        raise ValueError(f"{epilogue}: expected only ReLU")
    v = x + bias[:, None, None]
    v = F.relu(v) if epilogue.before == "relu" else v
    return v if epilogue.norm is None else _local_response_norm(v, epilogue.norm)


def _local_response_norm(a: Tensor, norm: Lrn) -> Tensor:
    """Return b = a / (k + α Σ a²)^β (section 3.3). The sum is over the `size` maps around each map."""
    reach, maps = norm.size // 2, a.shape[1]
    squares = F.pad(a.square(), (0, 0, 0, 0, reach, reach))
    total = torch.stack([squares[:, shift : shift + maps] for shift in range(norm.size)]).sum(0)
    return a / (norm.k + norm.alpha * total) ** norm.beta


def operators(
    x: Sequence[Tensor], bias: Sequence[Tensor], epilogue: Epilogue, joined: bool, channels_first: bool
) -> list[Tensor]:
    """Return the results of apply_epilogue, computed with PyTorch operators in float32, without Triton."""
    by_column = list(x) if len(x) == len(bias) else list(x[0].chunk(len(bias), 1))
    results = [exact(t.float(), b, epilogue).to(t.dtype) for t, b in zip(by_column, bias, strict=True)]
    results = [torch.cat(results, 1)] if joined else results
    layout = torch.contiguous_format if channels_first else torch.channels_last
    return [result.contiguous(memory_format=layout) for result in results]


def tied_windows(x: Tensor, bias: Tensor, epilogue: Epilogue, part: float) -> Tensor:
    """Return True for each window whose maximum m is above 0 and whose second largest value is above (1 − part) · m.

    The result is False for windows whose maximum is 0 or less. These windows have no gradient, because in the paper's
    layers ReLU comes before or after pooling. Without pooling, the result is False everywhere.
    """
    v = normalized(x, bias, epilogue)
    size = epilogue.pool_px
    if not size:
        return torch.zeros_like(v, dtype=torch.bool)
    rows, columns = ((side - size) // 2 + 1 for side in v.shape[2:])
    best = torch.full((*v.shape[:2], rows, columns), float("-inf"), dtype=v.dtype, device=v.device)
    second = best
    for row in range(size):
        for column in range(size):
            values = v[:, :, row : row + 2 * rows - 1 : 2, column : column + 2 * columns - 1 : 2]
            second = torch.maximum(second, torch.minimum(best, values))
            best = torch.maximum(best, values)
    return (best > 0) & (best - second < part * best)


# ---- NaN


def nan_faults(case: LayerCase, dtype: torch.dtype, device: torch.device, apply: Apply) -> str:
    """Return the faults of the result for an x with one NaN; empty if there are no faults.

    Every value that is NaN in float64 must be NaN in the result. After a normalization, the other maps of the same
    column may also be NaN at the same positions, because a kernel may compute the sums as a matrix product.
    """
    x, bias = make_inputs(case, 2, dtype, device, seed=2)
    split_columns(case, x)[0][1, case.maps // 2, case.side_px // 2, case.side_px // 2] = float("nan")
    outputs = apply(x, bias, case.epilogue, case.joined_out, case.channels_first)
    lost = spread = 0
    for y, t, b in zip(split_columns(case, outputs), split_columns(case, x), bias, strict=True):
        wanted = exact(t.double(), b.double(), case.epilogue).isnan()
        allowed = wanted if case.epilogue.norm is None else wanted.any(1, keepdim=True)
        lost += int((wanted & ~y.isnan()).sum())
        spread += int((y.isnan() & ~allowed).sum())
    return ", ".join(text for text, n in ((f"{lost} NaN lost", lost), (f"{spread} wrong NaN", spread)) if n)
