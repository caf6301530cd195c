"""The context manager for evaluation mode restores the earlier mode of a network, also after an exception."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.model.modes import evaluation_mode


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_in_evaluation_mode_and_then_in_its_earlier_mode(training: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train(training)
    x = torch.ones(4, 3)
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        output = model(x)
    assert torch.equal(output, model[0](x)) and not output.requires_grad
    assert all(module.training == training for module in model.modules())
    assert model(x).requires_grad


def test_the_earlier_mode_is_restored_after_an_exception() -> None:
    model = nn.Dropout(0.5)
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        raise KeyboardInterrupt
    assert model.training and torch.is_grad_enabled()
