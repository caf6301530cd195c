"""ResNet-18 has the parameters, shapes, initialization and output of torchvision.models.resnet18."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.networks import resnet18


def test_parameters_and_shapes_are_those_of_the_paper() -> None:
    net, x = resnet18(1000), torch.zeros(2, 3, 224, 224)
    assert sum(parameter.numel() for parameter in net.parameters()) == 11_689_512
    shapes = {}
    for name, layer in net.named_children():
        with torch.no_grad():
            x = layer(x)
        shapes[name] = tuple(x.shape)
    assert shapes["conv1"] == (2, 64, 112, 112) and shapes["layer1"] == (2, 64, 56, 56)
    assert [shapes[f"layer{stage}"] for stage in (2, 3, 4)] == [(2, 128, 28, 28), (2, 256, 14, 14), (2, 512, 7, 7)]
    assert shapes["fc"] == (2, 1000)


def test_names_of_the_state_are_those_of_torchvision() -> None:
    state = resnet18(1000, 8).state_dict()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{name}" for name in norm)]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            layers = [("conv1", "bn1"), ("conv2", "bn2")]
            layers += [("downsample.0", "downsample.1")] if stage > 1 and block == 0 else []
            for conv, bn in layers:
                prefix = f"layer{stage}.{block}."
                names += [f"{prefix}{conv}.weight", *(f"{prefix}{bn}.{name}" for name in norm)]
    assert list(state) == [*names, "fc.weight", "fc.bias"]


def test_initialization_is_that_of_torchvision() -> None:
    torch.manual_seed(1)
    state = resnet18(100, 32).state_dict()
    for name in ("conv1.weight", "layer2.0.downsample.0.weight", "layer3.1.conv2.weight"):
        outputs, _, side, _ = state[name].shape
        expected = (2 / (side * side * outputs)) ** 0.5  # initialization of He et al. 2015, with fan-out
        assert abs(float(state[name].std()) / expected - 1) < 0.1 and abs(float(state[name].mean())) < 0.1 * expected
    bound = 256**-0.5  # default of nn.Linear: uniform
    assert 0.95 * bound < float(state["fc.weight"].abs().max()) <= bound
    assert (state["layer4.1.bn2.weight"] == 1).all() and (state["layer4.1.bn2.bias"] == 0).all()


def expected_output(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the output of the network of torchvision/models/resnet.py in evaluation mode, computed by its formulas."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, x: Tensor) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in names)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = F.max_pool2d(norm("bn1", conv("conv1", x, 2)).clamp(min=0), 3, 2, 1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride)).clamp(min=0)
            y = norm(f"{name}.bn2", conv(f"{name}.conv2", y))
            if stride == 2:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, 2))
            x = (x + y).clamp(min=0)
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def test_output_is_that_of_torchvisions_formula() -> None:
    torch.manual_seed(2)
    net = resnet18(10, 8).eval()
    for buffer in (*net.buffers(), *(p for p in net.parameters() if p.ndim == 1)):
        if buffer.is_floating_point():
            buffer.data.uniform_(0.5, 1.5)
    x = torch.randn(3, 3, 65, 70)
    with torch.no_grad():
        output, expected = net(x), expected_output(net.state_dict(), x)
    assert expected.std() > 0.01 and torch.allclose(output, expected, rtol=1e-4, atol=1e-4)
