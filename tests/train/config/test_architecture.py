"""Tests of the architectures: parameter counts, comparison with torchvision, dense evaluation, padding of conv1."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.torchvision_alexnet import torchvision_alexnet, torchvision_forward
from train.config.architecture import (
    ALEXNET,
    ARCHITECTURES,
    CONVOLUTIONAL,
    HALF,
    ONE_GPU,
    TORCHVISION,
    Widths,
    architecture_from_json,
)
from train.config.recipes import PAPER, SHORT
from train.model.alexnet import AlexNet, from_torchvision
from train.model.summary import summarize

WIDTHS = Widths(8, 12, 12, 16, 8, 20, 24)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("alexnet", 60_965_224),
        ("joined", 62_378_344),
        ("half", 16_630_440),
        ("one-gpu", 59_798_312),
        ("torchvision", 61_100_840),
        ("convolutional", 60_965_224),
    ],
)
def test_number_of_parameters_of_each_architecture(name: str, parameters: int) -> None:
    assert sum(row.parameters for row in summarize(1000, ARCHITECTURES[name])) == parameters


def test_half_and_one_gpu_have_half_the_kernels_of_alexnet() -> None:
    """`one-gpu` has conv5 and the fully connected layers at full width, as the footnote of section 3.2 says."""
    full, half, one_gpu = (vars(a.widths) for a in (ALEXNET, HALF, ONE_GPU))
    assert {half[name] / full[name] for name in full} == {0.5}
    ratio = {name: one_gpu[name] / full[name] for name in full}
    assert ratio == {"conv1": 0.5, "conv2": 0.5, "conv3": 0.5, "conv4": 0.5, "conv5": 1, "fc6": 1, "fc7": 1}
    assert HALF.columns == ONE_GPU.columns == 1


def test_an_architecture_is_the_same_after_a_round_trip_through_json() -> None:
    for architecture in ARCHITECTURES.values():
        assert architecture_from_json(json.loads(json.dumps(asdict(architecture)))) == architecture


def test_torchvisions_parameters_give_torchvisions_outputs_in_training_and_evaluation() -> None:
    """Both networks have the same seed, so their dropout masks are equal. Both scale activations in training."""
    torch.manual_seed(0)
    torchvision_net = torchvision_alexnet()
    recipe = replace(SHORT, input_divisor=1.0, dropout=0.5, dropout_scales_training=True)
    ours = AlexNet(1000, recipe, ("cpu", "cpu"), TORCHVISION)
    ours.load_joined_tensors(from_torchvision(torchvision_net.state_dict()))
    images = torch.randn(2, 3, 224, 224)
    for training in (False, True):
        ours.train(training), torchvision_net.train(training)
        with torch.no_grad():
            torch.manual_seed(1)
            expected = torchvision_forward(torchvision_net, images)
            torch.manual_seed(1)
            actual = ours(images)
        assert expected.std() > 1e-3 and torch.allclose(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def network_pair() -> tuple[AlexNet, AlexNet]:
    """Small networks of the architectures alexnet and convolutional, in float64, with the same parameters."""
    torch.manual_seed(2)
    recipe = replace(SHORT, dropout=0.5)
    alexnet, convolutional = (
        AlexNet(5, recipe, ("cpu", "cpu"), replace(a, widths=WIDTHS)).double() for a in (ALEXNET, CONVOLUTIONAL)
    )
    convolutional.load_joined_tensors(alexnet.joined_tensors())
    return alexnet, convolutional


def test_the_convolutional_network_computes_what_alexnet_computes(
    network_pair: tuple[AlexNet, AlexNet],
) -> None:
    """The test compares outputs and gradients, with dropout. Each network must also load the other's parameters."""
    alexnet, convolutional = network_pair
    images = torch.randn(3, 3, 224, 224, dtype=torch.float64) * 60
    outputs = []
    for net in (alexnet, convolutional):
        torch.manual_seed(3)
        outputs.append(net(images))
        outputs[-1].square().sum().backward()
    assert outputs[0].shape == outputs[1].shape == (3, 5)
    assert torch.allclose(*outputs, rtol=1e-10)
    grads, other_grads = (net.joined_tensors(lambda p: p.grad) for net in network_pair)
    assert all(torch.allclose(grads[name], other_grads[name], rtol=1e-8, atol=1e-12) for name in grads)
    alexnet.load_joined_tensors(convolutional.joined_tensors())


def dense_reference(net: AlexNet, images: torch.Tensor, right_px: int) -> torch.Tensor:
    """Return the logits of dense evaluation, computed with torch functions from the joined parameters.

    First, the layers up to pool5 are applied to the whole image. Then the fully connected layers are applied to each
    window of 6 × 6 positions.
    """
    w, r = net.joined_tensors(), net.recipe
    x = F.conv2d(F.pad(images / r.input_divisor, (0, right_px) * 2), w["conv1.weight"], w["conv1.bias"], stride=4)

    def norm(x: torch.Tensor) -> torch.Tensor:
        torchs = nn.LocalResponseNorm(r.lrn.size, r.lrn.alpha * r.lrn.size, r.lrn.beta, r.lrn.k)
        return torch.cat([torchs(half) for half in x.chunk(2, 1)], 1)

    x = F.max_pool2d(norm(x.relu()), 3, 2)
    x = F.max_pool2d(norm(F.conv2d(x, w["conv2.weight"], w["conv2.bias"], padding=2, groups=2).relu()), 3, 2)
    for layer, groups in (("conv3", 1), ("conv4", 2), ("conv5", 2)):
        x = F.conv2d(x, w[f"{layer}.weight"], w[f"{layer}.bias"], padding=1, groups=groups).relu()
    x = F.max_pool2d(x, 3, 2)
    rows, columns, cells = x.shape[2] - 5, x.shape[3] - 5, []
    for i in range(rows):
        for j in range(columns):
            units = x[:, :, i : i + 6, j : j + 6].flatten(1)
            for layer in ("fc6", "fc7"):
                units = (units @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]).relu() * (1 - r.dropout)
            cells.append(units @ w["fc8.weight"].T + w["fc8.bias"])
    return torch.stack(cells, 2).unflatten(2, (rows, columns))


@pytest.mark.parametrize(("height", "width", "map_shape"), [(224, 224, (1, 1)), (256, 256, (2, 2)), (256, 320, (2, 4))])
def test_dense_evaluation_gives_logits_every_32_px(
    network_pair: tuple[AlexNet, AlexNet], height: int, width: int, map_shape: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, height, width, dtype=torch.float64) * 60
    alexnet, convolutional = (net.eval() for net in network_pair)
    with torch.no_grad():
        actual, expected = alexnet.dense(images), dense_reference(alexnet, images, 3)
        assert actual.shape == (2, 5, *map_shape)
        assert expected.std() > 1e-3 and torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)
        alone = actual.flatten(1) if map_shape == (1, 1) else actual
        assert torch.allclose(convolutional(images), alone, rtol=1e-12)
        if map_shape == (1, 1):
            assert torch.allclose(alexnet(images), alone, rtol=1e-10)


def test_dense_evaluation_refuses_images_smaller_than_a_crop(
    network_pair: tuple[AlexNet, AlexNet],
) -> None:
    with pytest.raises(ValueError, match="224, 223"):
        network_pair[0].dense(torch.zeros(1, 3, 224, 223, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected \(N, 3, 224, 224\)"):
        network_pair[0](torch.zeros(1, 3, 256, 256, dtype=torch.float64))


@pytest.mark.parametrize("side_px", range(224, 260))
def test_padding_gives_conv1_the_number_of_positions_rounded_up(side_px: int) -> None:
    before, after = ALEXNET.padding_px(side_px)
    assert before == 0 and (side_px + after - 11) % 4 == 0 and after < 4
    # layer.py:1004 of the authors' code computes 1 + ceil((side - 11) / 4).
    assert 1 + (side_px + after - 11) // 4 == 1 - (11 - side_px) // 4


def test_a_network_of_one_column_has_one_device_and_crosses_nothing() -> None:
    net = AlexNet(5, PAPER, ("meta", "meta"), replace(HALF, widths=WIDTHS))
    (half,) = net.cross([torch.ones(2, 3)])
    assert half.shape == (2, 3) and len(net.devices) == len(net.columns) == 1
    with pytest.raises(ValueError, match="3 devices for 1 columns"):
        AlexNet(5, PAPER, ("meta",) * 3, HALF)


def test_invalid_columns_and_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 columns"):
        replace(ALEXNET, columns=3)
    with pytest.raises(ValueError, match="conv4 = 15"):
        replace(ALEXNET, widths=Widths(conv4=15))
    replace(HALF, widths=Widths(conv4=15))
