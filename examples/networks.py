"""ResNet-18 (He et al. 2015, table 1): the network of torchvision.models.resnet18.

`torchvision.models.resnet18(num_classes=classes)` is the same network as `resnet18(classes)`: layers, initialization
and names of the parameters are equal. Each program of this folder can also train networks of torchvision and timm.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut: (N, inputs, H, W) → (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()  # returns its input
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))  # type: ignore[no-any-return]


def resnet18(classes: int, width: int = 64) -> nn.Sequential:
    """Return ResNet-18 for images (N, 3, H, W). `width` is the number of channels of the first stage: 64 in the paper.

    Convolutions have He's initialization for fan-out; `fc` has PyTorch's default, as in torchvision/models/resnet.py.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
        layer1=nn.Sequential(Block(width, width, 1), Block(width, width, 1)),  # (N, width, H / 4, W / 4)
    )
    for stage in (2, 3, 4):
        outputs = width * 2 ** (stage - 1)
        layers[f"layer{stage}"] = nn.Sequential(Block(outputs // 2, outputs, 2), Block(outputs, outputs, 1))
    layers.update(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(8 * width, classes))
    net = nn.Sequential(layers)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
