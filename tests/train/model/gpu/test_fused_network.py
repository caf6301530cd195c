"""The fused forward pass is compared with the layers of AlexNet, on a CPU with Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.train.model.gpu.test_epilogue import expected_output
from train.config.architecture import ARCHITECTURES, Widths
from train.config.recipes import RECIPES
from train.model.alexnet import AlexNet
from train.model.gpu import fused_network
from train.model.gpu.conv1_blocks import block_weights, image_blocks
from train.model.gpu.epilogue import Epilogue
from train.model.gpu.fused_network import FusedNetwork

pytest.importorskip("triton", reason="Triton is not installed")

WIDTHS = Widths(4, 6, 6, 6, 4, 8, 8)
# Side of the smallest image for which pool5 has a row. For an image of 224 px, the interpreter would take seconds.
SIDE_PX = 67


def small_network(model: str, recipe: str, **changes: object) -> AlexNet:
    """Return a network with few maps, large weights (so that every layer matters) and no dropout."""
    torch.manual_seed(5)
    settings = replace(RECIPES[recipe], dropout=0.0, **changes)  # type: ignore[arg-type]
    network = AlexNet(3, settings, architecture=replace(ARCHITECTURES[model], widths=WIDTHS))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


CASES: list[tuple[str, str, dict[str, object]]] = [
    ("alexnet", "paper", {}),
    ("joined", "released", {}),
    ("alexnet", "released", {}),
    ("alexnet", "caffe", {"activation": "tanh"}),
    ("alexnet", "paper", {"pool_px": 2, "activation": "sigmoid"}),
    ("alexnet", "paper", {"crossing": False}),
    ("alexnet", "modern", {}),
    ("half", "paper", {}),
    ("torchvision", "modern", {}),
]


def operators_for_epilogue(
    x: Sequence[Tensor], bias: Sequence[Tensor], epilogue: Epilogue, joined: bool = False, channels_first: bool = False
) -> list[Tensor]:
    """Compute the same as apply_epilogue with PyTorch operators."""
    parts = x if len(x) == len(bias) else torch.split(x[0], [len(b) for b in bias], 1)
    outputs = [expected_output(part, b, epilogue) for part, b in zip(parts, bias, strict=True)]
    return [torch.cat(outputs, 1)] if joined else outputs


@pytest.mark.parametrize(("model", "recipe", "changes"), CASES, ids=str)
def test_maps_and_gradients_equal_those_of_the_layers(
    model: str, recipe: str, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators replace the Triton kernels, which test_epilogue.py compares with the same operators."""
    monkeypatch.setattr(fused_network, "apply_epilogue", operators_for_epilogue)
    compare_with_layers(small_network(model, recipe, **changes))


@pytest.mark.parametrize(("model", "recipe", "changes"), CASES[:2], ids=str)
def test_the_triton_kernels_give_the_maps_and_gradients_of_the_layers(
    model: str, recipe: str, changes: dict[str, object]
) -> None:
    compare_with_layers(small_network(model, recipe, **changes))


def compare_with_layers(network: AlexNet) -> None:
    """Compare the maps of pool5 and the gradients of all convolutions.

    The sides of the image are not multiples of 4 px, which is the stride of conv1.
    """
    images = torch.randn(1, 3, SIDE_PX, SIDE_PX + 2) * 3
    results = []
    for maps in (network._convolutional, network._fused.maps):
        network.zero_grad()
        pooled = torch.cat(maps(images), 1)
        pooled.square().sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        results.append({"pool5": pooled.detach(), **gradients})
    expected, actual = results
    assert set(actual) == set(expected) and len(actual) == 1 + 10 * network.architecture.columns
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), name


@pytest.mark.parametrize("model", ["alexnet", "torchvision", "one-gpu"])
def test_logits_equal_those_of_the_layers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, the fully connected layers of FusedNetwork and AlexNet are compared for the same pool5."""
    network = small_network(model, "paper")
    joined = torch.cat(network._convolutional(images := torch.randn(2, 3, 224, 224)), 1)
    monkeypatch.setattr(FusedNetwork, "_pooled_maps", lambda self, images, channels_first: [joined])
    assert torch.allclose(network._fused.logits(images, training=False), network(images), rtol=1e-5, atol=1e-6)
    network.zero_grad()
    network._fused.logits(images, training=True).square().sum().backward()
    actual = {name: p.grad for name, p in network.named_parameters() if "fc" in name and p.grad is not None}
    network.zero_grad()
    network(images).square().sum().backward()
    for name, gradient in actual.items():
        expected = network.get_parameter(name).grad
        assert expected is not None
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name


def test_dropout_of_the_fused_network_keeps_the_share_of_units() -> None:
    network = small_network("alexnet", "paper")
    network._fused.recipe = replace(network.recipe, dropout=0.5)
    (units,) = network._fused._with_dropout("fc7", [torch.ones(64, 4096)], training=True)
    assert abs(float(units.mean()) - 0.5) < 0.01 and set(units.unique().tolist()) == {0.0, 1.0}


def test_bfloat16_maps_are_close_to_float32() -> None:
    network = small_network("alexnet", "paper")
    images = torch.randn(1, 3, SIDE_PX, SIDE_PX) * 30
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.cat(network._fused.maps(images), 1)
    expected = torch.cat(network._convolutional(images), 1)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.03 * expected.norm()


def test_a_cpu_and_layer_by_layer_use_the_modules() -> None:
    network = small_network("alexnet", "paper")
    assert not network._uses_fused_kernels(torch.zeros(1, 3, 224, 224))
    network.layer_by_layer = True
    network.devices = (torch.device("cuda:0"), torch.device("cuda:0"))
    assert not network._uses_fused_kernels(torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize(
    ("size", "padding", "divisor"),
    [((19, 23), (0, 0, 0, 0), 1.0), ((16, 12), (2, 2, 2, 2), 7.0), ((40, 37), (0, 3, 0, 1), 1.0)],
)
def test_a_convolution_over_blocks_equals_conv1(
    size: tuple[int, int], padding: tuple[int, int, int, int], divisor: float
) -> None:
    images, weight = torch.randn(2, 3, *size), torch.randn(5, 3, 11, 11)
    expected = F.conv2d(F.pad(images / divisor, padding), weight, stride=4)
    for layout in (torch.contiguous_format, torch.channels_last):
        blocks = image_blocks(images.contiguous(memory_format=layout), padding, divisor, torch.float32)
        assert blocks.shape[1:] == (48, expected.shape[2] + 2, expected.shape[3] + 2)
        assert torch.allclose(F.conv2d(blocks, block_weights(weight)), expected, rtol=1e-4, atol=1e-4)
