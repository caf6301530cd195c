"""The fused epilogue: Triton kernels, run by Triton's interpreter, are compared with float64 PyTorch operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.config.recipe import Lrn
from train.model.gpu.epilogue import Epilogue, apply_epilogue, stages_for

pytest.importorskip("triton", reason="Triton is not installed")

NORM = Lrn(size=5, alpha=0.1, beta=0.75, k=2.0)
ACTIVATIONS = {"none": lambda v: v, "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
# (number of maps of a column, height, width, epilogue). The epilogues include those of all recipes and networks. The
# cases also include odd sizes, numbers of maps that are not powers of two, incomplete tiles, several tiles (35 columns
# or rows), and an exponent that differs from the paper's.
CASES = [
    (6, 7, 9, Epilogue("relu", NORM, 3)),  # layers 1 and 2 of the recipes `paper` and `caffe`
    (6, 5, 35, Epilogue("none", NORM, 3, "relu")),  # layer 1 of the recipe `released`
    (20, 3, 3, Epilogue("relu", NORM)),  # layer 2 of the recipe `released`
    (5, 7, 5, Epilogue("tanh", Lrn(3, 0.2, 0.5, 1.0), 2)),
    (3, 6, 6, Epilogue("sigmoid", Lrn(9, 0.2, 0.75, 1.0), 3)),
    (4, 35, 4, Epilogue("none", None, 3, "relu")),  # conv5
    (4, 6, 6, Epilogue("none", None, 2, "tanh")),
    (4, 6, 6, Epilogue("none", None, 3, "sigmoid")),
    (17, 5, 5, Epilogue("relu")),  # conv3, conv4
    (17, 9, 9, Epilogue("tanh")),
    (2, 3, 3, Epilogue("relu", None, 3)),  # layers 1 and 2 of a network without normalization
]


def expected_output(x: Tensor, bias: Tensor, epilogue: Epilogue) -> Tensor:
    """Return the result of the epilogue for one column, computed by PyTorch operators."""
    y = ACTIVATIONS[epilogue.before](x + bias[:, None, None])
    if epilogue.norm is not None:
        n = epilogue.norm
        y = F.local_response_norm(y, n.size, n.alpha * n.size, n.beta, n.k)
    if epilogue.pool_px:
        y = F.max_pool2d(y, epilogue.pool_px, 2)
    return ACTIVATIONS[epilogue.after](y)


def columns_last(x: Tensor, columns: int, dtype: torch.dtype, joined: bool) -> list[Tensor]:
    """Return leaf tensors that require gradients: x itself if `joined`, otherwise the maps of each column."""
    parts = [x] if joined else list(x.chunk(columns, dim=1))
    return [p.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for p in parts]


def run(
    case: tuple[int, int, int, Epilogue],
    columns: int,
    dtype: torch.dtype,
    joined: tuple[bool, bool],
    x: Tensor | None = None,
    images: int = 1,
    channels_first: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return output and gradients of the kernels, and those of float64 operators, with the columns joined."""
    maps, height, width, epilogue = case
    rng = torch.Generator().manual_seed(maps * height + width)
    if x is None:
        x = torch.randn(images, maps * columns, height, width, generator=rng).to(dtype)
    biases = [torch.randn(maps, generator=rng) for _ in range(columns)]
    exact_x = x.double().requires_grad_()
    exact_biases = [bias.double().requires_grad_() for bias in biases]
    expected = torch.cat(
        [expected_output(part, b, epilogue) for part, b in zip(exact_x.chunk(columns, 1), exact_biases, strict=True)], 1
    )
    grad = torch.randn(expected.shape, generator=rng).to(dtype)
    expected.backward(grad.double())
    inputs = columns_last(x, columns, dtype, joined[0])
    leaves = [bias.clone().requires_grad_() for bias in biases]
    outputs = apply_epilogue(inputs, leaves, epilogue, joined[1], channels_first)
    assert len(outputs) == (1 if joined[1] else columns)
    layout = torch.contiguous_format if channels_first else torch.channels_last
    assert all(output.is_contiguous(memory_format=layout) and output.dtype == dtype for output in outputs)
    actual = torch.cat(outputs, 1)
    actual.backward(grad)
    return (
        {
            "output": actual.detach(),
            "x gradient": torch.cat([x.grad for x in inputs if x.grad is not None], 1),
            "bias gradient": torch.cat([bias.grad for bias in leaves if bias.grad is not None]),
        },
        {
            "output": expected.detach(),
            "x gradient": exact_x.grad if exact_x.grad is not None else exact_x,
            "bias gradient": torch.cat([bias.grad for bias in exact_biases if bias.grad is not None]),
        },
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_output_and_gradients_agree_with_float64_operators(case: tuple[int, int, int, Epilogue]) -> None:
    actual, expected = run(case, columns=2, dtype=torch.float32, joined=(True, False))
    for name, value in expected.items():
        assert torch.allclose(actual[name].double(), value, rtol=1e-5, atol=5e-6), name


@pytest.mark.parametrize("joined", [(False, True), (True, False)], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=["pooled", "pointwise"])
def test_joined_and_split_columns_give_equal_bits(
    case: tuple[int, int, int, Epilogue], joined: tuple[bool, bool]
) -> None:
    actual, _ = run(case, 2, torch.float32, joined)
    split, _ = run(case, 2, torch.float32, (False, False))
    assert all(torch.equal(actual[name], split[name]) for name in split)


@pytest.mark.parametrize("images", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_channels_first_output_of_one_column(images: int) -> None:
    actual, expected = run(CASES[5], 1, torch.float32, (False, True), images=images, channels_first=True)
    for name, value in expected.items():
        assert torch.allclose(actual[name].double(), value, rtol=1e-5, atol=5e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES[2], CASES[8], (5, 3, 3, Epilogue("relu", NORM, 3))], ids=str)
def test_16_bit_tensors_are_exact_to_their_rounding(case: tuple[int, int, int, Epilogue], dtype: torch.dtype) -> None:
    """In bfloat16, the kernels round squares to 8 significant bits before the sum."""
    actual, expected = run(case, 2, dtype, (True, True))
    share = 2**-6 if case[3].norm else 2**-7
    for name, value in expected.items():
        error = (actual[name].double() - value).norm() / value.norm()
        assert error < share, (name, error)


def test_pooling_takes_the_first_of_equal_maxima() -> None:
    """As in PyTorch, the gradient of a constant map goes to the first position of each window."""
    actual, expected = run((2, 7, 7, Epilogue("none", None, 3)), 1, torch.float32, (True, True), torch.ones(1, 2, 7, 7))
    assert torch.allclose(actual["x gradient"].double(), expected["x gradient"], atol=1e-6)


def test_relu_after_pooling_gives_no_gradient_to_a_maximum_of_zero() -> None:
    x = torch.zeros(1, 3, 5, 5)
    bias = [torch.tensor([0.0, -1.0, 1.0])]
    (leaf,) = columns_last(x, 1, torch.float32, True)
    apply_epilogue([leaf], bias, Epilogue("none", None, 3, "relu"))[0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.sum(dim=(0, 2, 3)).tolist() == [0.0, 0.0, 4.0]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("pool_px", [0, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_makes_its_position_nan(pool_px: int, value: float) -> None:
    """After the normalization, all maps of the column are NaN at the position of the value.

    At all other positions, the bits stay the same.
    """
    x = torch.rand(1, 6, 5, 5)
    broken = x.clone()
    broken[0, 1, 1, 1] = value
    biases = [torch.zeros(6)]
    epilogue = Epilogue("relu", NORM, pool_px)
    (good,) = apply_epilogue(columns_last(x, 1, torch.float32, True), biases, epilogue)
    (bad,) = apply_epilogue(columns_last(broken, 1, torch.float32, True), biases, epilogue)
    affected = torch.zeros_like(good, dtype=torch.bool)
    affected[:, :, 0 if pool_px else 1, 0 if pool_px else 1] = True
    assert bad[affected].isnan().all()
    assert torch.equal(bad[~affected], good[~affected])


@pytest.mark.parametrize("epilogue", [Epilogue("relu"), Epilogue("none", None, 3, "relu")], ids=str)
def test_nan_stays_in_its_map_without_a_normalization(epilogue: Epilogue) -> None:
    x = torch.rand(1, 3, 5, 5)
    x[0, 1, 4, 4] = torch.nan
    (y,) = apply_epilogue(columns_last(x, 1, torch.float32, True), [torch.zeros(3)], epilogue)
    assert y.isnan().sum() == 1 and y[0, 1, -1, -1].isnan()


@pytest.mark.parametrize(
    "arguments",
    [{"pool_px": 4}, {"before": "relu", "after": "relu"}],
    ids=["pool of 4 px", "after without pooling"],
)
def test_an_epilogue_that_the_kernels_cannot_compute_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"expected|pass this nonlinearity as"):
        Epilogue(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("maps", "float32", "slope_after", "expected"),
    [
        (128, False, False, (3, 3, 3)),  # the paper's layer 2: 94,208 bytes with 3 stages
        (128, True, False, (3, 3, 1)),  # 163,840 bytes
        (256, False, False, (3, 1, 1)),  # layer 2 of `joined`: 196,608 bytes
        (256, True, False, (1, 1, 1)),  # 327,680 bytes
        (48, True, True, (3, 3, 1)),  # 131,072 bytes
    ],
)
def test_stages_fit_into_shared_memory(
    maps: int, float32: bool, slope_after: bool, expected: tuple[int, int, int]
) -> None:
    """`expected` has the number of pipeline stages for each GPU: H200, A100 and RTX 4090.

    With more stages, a program would need more shared memory than the GPU has.
    """
    actual = tuple(stages_for(maps, float32, slope_after, kib * 1024) for kib in (227, 163, 99))
    assert actual == expected
