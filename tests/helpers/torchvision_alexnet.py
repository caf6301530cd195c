"""A copy of torchvision's AlexNet, so that the tests do not need torchvision."""

from __future__ import annotations

import torch
from torch import nn

from train.config.architecture import TORCHVISION, Widths


def torchvision_alexnet(w: Widths = TORCHVISION.widths, classes: int = 1000) -> nn.Module:
    """Return the network of AlexNet.__init__ in torchvision/models/alexnet.py, with the layers of the given widths."""
    net = nn.Module()
    net.features = nn.Sequential(
        nn.Conv2d(3, w.conv1, kernel_size=11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(w.conv1, w.conv2, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(w.conv2, w.conv3, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(w.conv3, w.conv4, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(w.conv4, w.conv5, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )
    net.avgpool = nn.AdaptiveAvgPool2d((6, 6))
    net.classifier = nn.Sequential(
        nn.Dropout(p=0.5),
        nn.Linear(w.conv5 * 6 * 6, w.fc6),
        nn.ReLU(inplace=True),
        nn.Dropout(p=0.5),
        nn.Linear(w.fc6, w.fc7),
        nn.ReLU(inplace=True),
        nn.Linear(w.fc7, classes),
    )
    return net


def torchvision_forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what AlexNet.forward of torchvision/models/alexnet.py returns."""
    return net.classifier(net.avgpool(net.features(x)).flatten(1))
