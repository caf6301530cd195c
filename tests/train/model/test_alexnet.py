"""Tests of the AlexNet module: shapes, joined parameters, crossing between columns, and dropout.

The reference is a network of grouped torch modules.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train.config.architecture import ALEXNET, CONVOLUTIONAL, HALF, JOINED, TORCHVISION, Architecture, Widths
from train.config.recipe import Recipe
from train.config.recipes import PAPER, RELEASED, SHORT
from train.model.alexnet import AlexNet
from train.model.layers import drop
from train.model.summary import summarize

WIDTHS = Widths(8, 12, 12, 16, 8, 20, 24)
SMALL = replace(ALEXNET, widths=WIDTHS)


class Grouped(nn.Module):
    """AlexNet as one network of torch modules, with one group for each column.

    Layers in which each column reads only its own maps are grouped. torch's LRN is applied to each group.
    """

    def __init__(self, classes: int, architecture: Architecture, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.architecture, w = recipe, architecture, architecture.widths
        self.groups = architecture.columns
        self.uncrossed = 1 if recipe.crossing else self.groups
        self.conv1 = nn.Conv2d(3, w.conv1, 11, stride=4)
        self.conv2 = nn.Conv2d(w.conv1, w.conv2, 5, padding=2, groups=self.groups)
        self.conv3 = nn.Conv2d(w.conv2, w.conv3, 3, padding=1, groups=self.uncrossed)
        self.conv4 = nn.Conv2d(w.conv3, w.conv4, 3, padding=1, groups=self.groups)
        self.conv5 = nn.Conv2d(w.conv4, w.conv5, 3, padding=1, groups=self.groups)
        self.fc6 = nn.Linear(w.conv5 * 36 // self.uncrossed, w.fc6)
        self.fc7 = nn.Linear(w.fc6 // self.uncrossed, w.fc7)
        self.fc8 = nn.Linear(w.fc7, classes)

    def norm(self, x):
        lrn = self.recipe.lrn
        if lrn is None or not self.architecture.normalised:
            return x
        torchs = nn.LocalResponseNorm(lrn.size, lrn.alpha * lrn.size, lrn.beta, lrn.k)
        return torch.cat([torchs(share) for share in x.chunk(self.groups, 1)], 1)

    def full(self, layer: nn.Linear, x):
        """A grouped fully connected layer: each group of units reads its own group of inputs."""
        pieces = zip(
            *(t.chunk(self.uncrossed, dim) for t, dim in ((x, 1), (layer.weight, 0), (layer.bias, 0))), strict=True
        )
        return torch.cat([x @ w.T + b for x, w, b in pieces], 1)

    def keep(self, before: str) -> float:
        dropped = before in self.architecture.dropout_before and not self.recipe.dropout_scales_training
        return 1 - self.recipe.dropout if dropped else 1.0

    def forward(self, x):
        act = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid()}[self.recipe.activation]
        pool = nn.MaxPool2d(self.recipe.pool_px, 2)
        pad = (0, 3, 0, 3) if self.architecture.conv1_padding is None else (2, 2, 2, 2)
        x = self.conv1(F.pad(x / self.recipe.input_divisor, pad))
        x = act(pool(self.norm(x))) if self.recipe.norm_before_relu else pool(self.norm(act(x)))
        x = self.norm(act(self.conv2(x)))
        if self.recipe.within_map is not None and self.architecture.normalised:
            lrn = self.recipe.within_map
            window = torch.ones(x.shape[1], 1, lrn.size, lrn.size, dtype=x.dtype)
            x = x / (lrn.k + lrn.alpha * F.conv2d(x * x, window, padding=2, groups=x.shape[1])) ** lrn.beta
        x = act(self.conv4(act(self.conv3(pool(x)))))
        x = pool(act(self.conv5(x))).flatten(1)
        x = act(self.full(self.fc6, x * self.keep("fc6")))
        x = act(self.full(self.fc7, x * self.keep("fc7")))
        return self.fc8(x * self.keep("fc8"))


def small(architecture: Architecture) -> Architecture:
    return replace(architecture, widths=WIDTHS)


NETWORKS = {
    "paper": (ALEXNET, PAPER),
    "released": (ALEXNET, RELEASED),
    "short": (ALEXNET, SHORT),
    "no crossing": (ALEXNET, replace(SHORT, crossing=False)),
    "tanh, no normalization": (ALEXNET, replace(SHORT, activation="tanh", lrn=None)),
    "sigmoid, pools of 2": (ALEXNET, replace(SHORT, activation="sigmoid", pool_px=2)),
    "joined": (JOINED, PAPER),
    "one column, released": (HALF, RELEASED),
    "one column, no crossing": (HALF, replace(SHORT, crossing=False)),
    "torchvision": (TORCHVISION, replace(SHORT, dropout=0.3)),
    "torchvision, released": (TORCHVISION, replace(RELEASED, dropout_scales_training=True)),
    "convolutional": (CONVOLUTIONAL, replace(SHORT, dropout=0.3)),
}


@pytest.mark.parametrize(("architecture", "recipe"), NETWORKS.values(), ids=NETWORKS)
def test_columns_and_a_grouped_network_have_the_same_outputs_and_gradients(
    architecture: Architecture, recipe: Recipe
) -> None:
    torch.manual_seed(0)
    columns = AlexNet(7, replace(recipe, init="he"), ("cpu", "cpu"), small(architecture)).double().eval()
    grouped = Grouped(7, small(architecture), recipe).double()
    grouped.load_state_dict(columns.joined_tensors())
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64) * 60
    upstream = torch.randn(2, 7, dtype=torch.float64)

    logits, expected = columns(images), grouped(images)
    assert expected.std() > 1e-3
    assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-12)
    logits.backward(upstream)
    expected.backward(upstream)
    gradients = columns.joined_tensors(lambda p: p.grad)
    for name, parameter in grouped.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-8, atol=1e-12), name


def test_the_table_of_layers_has_the_papers_shapes_and_parameters() -> None:
    rows = {row.layer: row for row in summarize(1000)}
    assert sum(row.parameters for row in rows.values()) == 60_965_224
    assert {name: row.output_per_column for name, row in rows.items()} == {
        "conv1": (48, 55, 55),
        "conv2": (128, 27, 27),
        "conv3": (192, 13, 13),
        "conv4": (192, 13, 13),
        "conv5": (128, 13, 13),
        "fc6": (2048,),
        "fc7": (2048,),
        "fc8": (1000,),
    }
    assert [name for name, row in rows.items() if row.sees == "both columns"] == ["conv3", "fc6", "fc7", "fc8"]
    assert rows["conv1"].multiply_adds == 96 * 55 * 55 * 11 * 11 * 3
    assert rows["conv4"].multiply_adds == 384 * 13 * 13 * 9 * 192
    assert rows["conv3"].parameters == 384 * (9 * 256 + 1)


def test_each_column_has_half_of_the_papers_weights() -> None:
    joined = AlexNet(1000, PAPER, ("meta", "meta")).parameters_by_joined_name()
    # The joined weight of conv2 has the shape (256, 48, 5, 5). Each column has half of this weight.
    assert [tuple(p.shape) for p in joined["conv2.weight"]] == [(128, 48, 5, 5)] * 2
    assert [tuple(p.shape) for p in joined["conv3.weight"]] == [(192, 256, 3, 3)] * 2
    assert [tuple(p.shape) for p in joined["fc6.weight"]] == [(2048, 9216)] * 2
    assert [tuple(p.shape) for p in joined["fc8.weight"]] == [(1000, 4096)]


@pytest.fixture
def small_network() -> AlexNet:
    torch.manual_seed(1)
    return AlexNet(5, replace(SHORT, dropout=0.0), ("cpu", "cpu"), SMALL)


def test_loading_joined_tensors_gives_the_same_outputs(small_network: AlexNet) -> None:
    torch.manual_seed(2)
    other = AlexNet(5, small_network.recipe, ("cpu", "cpu"), SMALL)
    images = torch.randn(2, 3, 224, 224)
    assert not torch.equal(other(images), small_network(images))
    other.load_joined_tensors(small_network.joined_tensors())
    assert torch.equal(other(images), small_network(images))


def test_joined_tensors_of_other_names_or_shapes_are_refused(small_network: AlexNet) -> None:
    joined = small_network.joined_tensors()
    with pytest.raises(ValueError, match=r"fc8\.weight: shape"):
        small_network.load_joined_tensors({**joined, "fc8.weight": torch.zeros(6, 24)})
    with pytest.raises(ValueError, match="extra"):
        small_network.load_joined_tensors({**joined, "extra": torch.zeros(1)})


def test_cross_joins_both_halves_on_each_receiving_device() -> None:
    """The second device of the test is the device `meta`."""
    model = AlexNet(5, PAPER, ("meta", "meta"), SMALL)
    cpu, meta = torch.device("cpu"), torch.device("meta")
    halves = [torch.ones(2, 3, device="cpu"), torch.ones(2, 4, device="cpu")]
    joined = model.cross(halves, (cpu, meta))
    assert [j.device for j in joined] == [cpu, meta] and all(j.shape == (2, 7) for j in joined)
    same = model.cross(halves, (cpu, cpu))
    assert same[0] is same[1]


def test_dropout_zeroes_in_training_and_scales_in_evaluation() -> None:
    torch.manual_seed(4)
    model = AlexNet(5, PAPER, ("meta", "meta"), SMALL)
    ones = torch.ones(200, 500)
    dropped = drop(ones, model.recipe, training=True)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    assert abs(dropped.mean().item() - 0.5) < 3.3 * 0.5 / 100_000**0.5
    assert (drop(ones, model.recipe, training=False) == 0.5).all()
    model.recipe = replace(PAPER, dropout=0.25)
    assert (drop(ones, model.recipe, training=False) == 0.75).all()
    assert 0.7 < drop(ones, model.recipe, training=True).mean() < 0.8
    model.recipe = replace(PAPER, dropout_scales_training=True)
    assert set(drop(ones, model.recipe, training=True).unique().tolist()) == {0.0, 2.0}
    assert (drop(ones, model.recipe, training=False) == 1).all()


def test_wrong_image_sizes_device_counts_odd_widths_and_to_are_refused(small_network: AlexNet) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 3, 224, 224\)"):
        small_network(torch.zeros(1, 3, 227, 227))
    with pytest.raises(ValueError, match="3 devices"):
        AlexNet(5, PAPER, ("cpu",) * 3, SMALL)
    with pytest.raises(ValueError, match="even"):
        replace(SMALL, widths=replace(SMALL.widths, conv4=15))
    with pytest.raises(TypeError, match="cannot be moved"):
        small_network.to("cpu")
