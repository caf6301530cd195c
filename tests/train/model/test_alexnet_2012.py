"""Tests of what the paper and its authors' code state about the network, in the order of the paper's sections.

Statements about the update rule are tested in tests/train/optim/test_paper_sgd.py, about the schedules in
tests/train/optim/test_schedule.py, about normalization in test_lrn.py, and about the two columns in test_alexnet.py.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from train.config.architecture import ALEXNET, JOINED, LAYERS, ONE_GPU, Widths
from train.config.recipe import Recipe
from train.config.recipes import PAPER, RECIPES, RELEASED, SHORT
from train.model.alexnet import AlexNet
from train.model.summary import summarize
from train.optim.paper_sgd import PaperSGD

SMALL = replace(ALEXNET, widths=Widths(8, 12, 12, 16, 8, 20, 24))


def test_section_3_5_neurons_of_each_layer() -> None:
    """The paper's numbers of neurons are 253,440 - 186,624 - 64,896 - 64,896 - 43,264 - 4096 - 4096 - 1000.

    The number 253,440 for conv1 is wrong: 253,440 is 96 × 55 × 48, but 96 kernels at 55 × 55 positions make 290,400
    neurons. With either number, the sum over all layers is near the paper's 650,000. The paper's number of inputs,
    150,528, is right.
    """
    neurons = [row.neurons for row in summarize(1000)]
    assert neurons == [290_400, 186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000]
    assert 253_440 == 96 * 55 * 48 and 150_528 == 224 * 224 * 3
    assert round(sum(neurons), -4) == 660_000 and round(sum(neurons) - 290_400 + 253_440, -4) == 620_000


def test_section_3_5_60_million_parameters_layer_by_layer() -> None:
    """A convolution has maps × (side² × inputs + 1) parameters.

    `maps` is the number of output maps, `side` is the side of the kernel, and `inputs` is the number of maps that a
    column reads.
    """
    parameters = {row.layer: row.parameters for row in summarize(1000)}
    assert parameters == {
        "conv1": 96 * (11 * 11 * 3 + 1),
        "conv2": 256 * (5 * 5 * 48 + 1),
        "conv3": 384 * (3 * 3 * 256 + 1),
        "conv4": 384 * (3 * 3 * 192 + 1),
        "conv5": 256 * (3 * 3 * 192 + 1),
        "fc6": 4096 * (6 * 6 * 256 + 1),
        "fc7": 4096 * (4096 + 1),
        "fc8": 1000 * (4096 + 1),
    }
    assert sum(parameters.values()) == 60_965_224
    assert round(sum(parameters[layer] for layer in LAYERS[:5]) / 1e6, 2) == 2.33


def test_section_3_2_the_network_on_one_gpu_has_half_the_kernels_and_about_as_many_parameters() -> None:
    two, one = ({row.layer: row for row in summarize(1000, a)} for a in (ALEXNET, ONE_GPU))
    assert [one[layer].neurons * 2 for layer in LAYERS[:4]] == [two[layer].neurons for layer in LAYERS[:4]]
    assert one["conv5"].neurons == two["conv5"].neurons
    total = [sum(row.parameters for row in rows.values()) for rows in (one, two)]
    assert 0.97 < total[0] / total[1] < 1


def test_conv1_has_55_positions_on_224_px_and_the_last_covers_3_px_of_padding() -> None:
    """A kernel of ones on an image of ones counts the pixels that the kernel covers.

    At the last position, the kernel covers only 8 rows of the image. At all other positions, it covers 11 rows.
    """
    model = AlexNet(3, PAPER, ("cpu", "cpu"), SMALL)
    with torch.no_grad():
        model.columns[0].conv1.weight.fill_(1.0), model.columns[0].conv1.bias.zero_()
        covered = model.columns[0].conv1(model._inputs(torch.ones(1, 3, 224, 224))[0])[0, 0]
    rows = np.full(55, 11)
    rows[54] = 8
    assert np.array_equal(covered.numpy(), 3 * np.outer(rows, rows))


def test_section_3_4_non_overlapping_pooling_gives_maps_of_the_same_size() -> None:
    overlapping, non_overlapping = (
        [row.output_per_column for row in summarize(1000, recipe=replace(PAPER, pool_px=px))] for px in (3, 2)
    )
    assert overlapping == non_overlapping


# ---- figure 2: connections

BELOW = {layer: below for below, layer in pairwise(LAYERS)}


@pytest.mark.parametrize("crossing", [True, False])
@pytest.mark.parametrize("recipe", [PAPER, RELEASED], ids=lambda r: r.name)
@pytest.mark.parametrize("layer", BELOW)
def test_figure_2_units_are_connected_to_the_maps_that_the_figure_shows(
    layer: str, recipe: Recipe, crossing: bool
) -> None:
    """To find connections, the test computes the gradient of each unit with respect to each map of the layer below.

    Units of conv2, conv4 and conv5 depend on all maps of their own column in the layer below, and on no map of the
    other column. Units of conv3, fc6 and fc7 depend on the maps of both columns. In a network without crossing, these
    units depend only on the maps of their own column. Units of fc8 depend on both columns, with and without crossing.
    """
    torch.manual_seed(0)
    recipe = replace(recipe, activation="tanh", init="he", input_divisor=64.0, dropout=0.0, crossing=crossing)
    model = AlexNet(5, recipe, ("cpu", "cpu"), SMALL)
    outputs: dict[tuple[str, int], torch.Tensor] = {}
    for column, part in enumerate(model.columns):
        for name in (layer, BELOW[layer]):
            if name != "fc8":
                keep = lambda m, i, out, key=(name, column): outputs.update({key: out})  # noqa: E731
                part.get_submodule(name).register_forward_hook(keep)
    logits = model(60 * torch.randn(2, 3, 224, 224))
    above = [logits] if layer == "fc8" else [outputs[layer, column] for column in (0, 1)]
    below = [outputs[BELOW[layer], column] for column in (0, 1)]

    rows = []  # one row for each unit: whether the unit depends on each map of the layer below
    for units in above:
        for unit in range(units.shape[1]):
            grads = torch.autograd.grad(units[:, unit].sum(), below, retain_graph=True, allow_unused=True)
            shares = [torch.zeros_like(b) if g is None else g for b, g in zip(below, grads, strict=True)]
            rows.append(torch.cat([s.abs().transpose(0, 1).flatten(1).sum(1) > 0 for s in shares]))
    connected, half = torch.stack(rows).numpy(), len(rows) // 2
    share = connected.shape[1] // 2
    expected = np.ones_like(connected)
    if layer in ("conv2", "conv4", "conv5") or (layer != "fc8" and not crossing):
        expected[:half, share:] = expected[half:, :share] = False
    assert np.array_equal(connected, expected)


class RecordedMoves(TorchFunctionMode):
    """Records each call that moves a tensor between devices. A tensor that is moved from `meta` becomes zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[str, str, str]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and isinstance(args[1], torch.device) and args[0].device != args[1]:
            callers = {frame.name for frame in traceback.extract_stack()}
            caller = "cross" if "cross" in callers else "_inputs" if "_inputs" in callers else "elsewhere"
            self.moved.append((caller, args[0].device.type, args[1].type))
            return torch.zeros(args[0].shape, device=args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("crossing", "crossings"), [(True, 3), (False, 0)])
def test_activations_move_between_devices_only_in_cross(crossing: bool, crossings: int) -> None:
    """Column 1 is on the device `meta`. An operation that mixes tensors of both devices raises an exception.

    Before conv3, fc6 and fc7, each column's maps or units move to the device of the other column. Before fc8, the
    units of column 1 move to the device of column 0. The images move once.
    """
    recipe = replace(RELEASED, crossing=crossing)
    model = AlexNet(5, recipe, ("cpu", "meta"), SMALL)
    with torch.no_grad(), RecordedMoves() as moves:
        logits = model(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 5) and logits.device.type == "cpu"
    assert sorted(moves.moved) == sorted(
        [("_inputs", "cpu", "meta")]
        + [("cross", "cpu", "meta"), ("cross", "meta", "cpu")] * crossings
        + [("cross", "meta", "cpu")]
    )


def test_a_network_of_one_column_moves_no_activations() -> None:
    model = AlexNet(5, PAPER, ("cpu", "cpu"), replace(JOINED, widths=SMALL.widths))
    with torch.no_grad(), RecordedMoves() as moves:
        model(torch.randn(1, 3, 224, 224))
    assert moves.moved == []


# ---- section 5: initialization

STDS = {
    "paper": dict.fromkeys(LAYERS, 0.01),
    "released": {**dict.fromkeys(LAYERS, 0.01), "conv3": 0.03, "conv4": 0.03, "conv5": 0.03},
    "caffe": {**dict.fromkeys(LAYERS, 0.01), "fc6": 0.005, "fc7": 0.005},
    "large": {**dict.fromkeys(LAYERS, 0.01), "fc6": 0.005, "fc7": 0.005},
}
BIASES = {"paper": 1.0, "released": 1.0, "caffe": 0.1, "large": 0.1, "modern": 0.0, "short": 0.0}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_initialization_of_each_layer(recipe: Recipe) -> None:
    """The test checks the mean and standard deviation of the weights, and the values of the biases.

    With the initialization `he`, the standard deviation is sqrt(2 / fan-in), but 0.01 in fc8.
    """
    torch.manual_seed(3)
    joined = AlexNet(20, recipe, ("cpu", "cpu"), replace(ALEXNET, widths=Widths(fc6=256, fc7=256))).joined_tensors()
    for layer in LAYERS:
        weight = joined[f"{layer}.weight"]
        he = 0.01 if layer == "fc8" else (2 / weight[0].numel()) ** 0.5
        std = STDS[recipe.name][layer] if recipe.name in STDS else he
        assert abs(weight.std().item() / std - 1) < 5 / (2 * weight.numel()) ** 0.5, layer
        assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5, layer
        hidden = layer in ("conv2", "conv4", "conv5", "fc6", "fc7")
        assert (joined[f"{layer}.bias"] == (BIASES[recipe.name] if hidden else 0.0)).all(), layer


# ---- section 4.2: dropout


def test_section_4_2_the_first_two_fully_connected_layers_have_dropout() -> None:
    """In training, half of the inputs of fc7 and fc8 are zero. No input of fc6 is zero."""
    torch.manual_seed(4)
    recipe = replace(PAPER, activation="sigmoid", init="he", input_divisor=64.0)
    model = AlexNet(5, recipe, ("cpu", "cpu"), replace(SMALL, widths=replace(SMALL.widths, fc6=400, fc7=400)))
    zeros: dict[str, float] = {}

    def record(name: str):
        return lambda module, inputs: zeros.update({name: (inputs[0] == 0).double().mean().item()})

    for name in ("fc6", "fc7"):
        model.columns[1].get_submodule(name).register_forward_pre_hook(record(name))
    model.fc8.register_forward_pre_hook(record("fc8"))
    model(torch.randn(8, 3, 224, 224))
    assert zeros["fc6"] == 0
    for name in ("fc7", "fc8"):
        assert abs(zeros[name] - 0.5) < 5 * 0.5 / (8 * 400) ** 0.5


def test_both_columns_see_the_same_dropout_mask() -> None:
    """In the authors' layers-145.cfg, units are copied to the other column after dropout.

    Both columns therefore see the same dropped units.
    """
    torch.manual_seed(5)
    model = AlexNet(5, replace(SHORT, dropout=0.5), ("cpu", "cpu"), SMALL)
    seen = []
    for column in model.columns:
        column.fc7.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(60 * torch.randn(2, 3, 224, 224))
    assert seen[0] is seen[1] or torch.equal(*seen)


def trained_weights(scaled: bool, keep: float) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Train 6 steps, and return the parameters, and the logits of each step and of an evaluation.

    The evaluation follows the last step and uses the first batch.

    scaled  True: dropout scales in training, and initialization, learning rate and weight decay of fc7 and fc8 are
            adapted
    keep    probability with which dropout keeps a unit
    """
    torch.manual_seed(6)
    recipe = replace(SHORT, dropout=1 - keep, dropout_scales_training=scaled)
    model = AlexNet(5, recipe, ("cpu", "cpu"), SMALL).double()
    groups = []
    for name, parameters in model.parameters_by_joined_name().items():
        factor = keep if scaled and name in ("fc7.weight", "fc8.weight") else 1.0
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(factor)
        groups.append({"params": parameters, "weight_decay": 0.05 / factor**2, "factor": factor})
    optimizer, logits = PaperSGD(groups, 0.9), []
    images, labels = 60 * torch.randn(6, 4, 3, 224, 224, dtype=torch.float64), torch.randint(5, (6, 4))
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = (0.02 if step < 3 else 0.002) * group["factor"] ** 2
        torch.manual_seed(100 + step)
        logits.append(model(images[step]))
        optimizer.zero_grad()
        F.cross_entropy(logits[-1], labels[step]).backward()
        optimizer.step()
    model.eval()
    logits.append(model(images[0]))
    return model.joined_tensors(), logits


@pytest.mark.parametrize("keep", [0.5, 0.75])
def test_inverted_dropout_equals_the_papers_with_init_times_keep_lr_times_keep2_decay_over_keep2(
    keep: float,
) -> None:
    """Scaling in evaluation (the paper) is compared with scaling in training (nn.Dropout).

    After 3 of 6 steps, the learning rate is reduced.
    """
    (plain, plain_logits), (scaled, scaled_logits) = trained_weights(False, keep), trained_weights(True, keep)
    for actual, expected in zip(scaled_logits, plain_logits, strict=True):
        assert expected.std() > 1e-3 and torch.allclose(actual, expected, rtol=1e-8, atol=1e-11)
    for name in plain:
        factor = keep if name in ("fc7.weight", "fc8.weight") else 1.0
        assert torch.allclose(scaled[name], factor * plain[name], rtol=1e-8, atol=1e-11), name
