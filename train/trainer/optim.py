"""The update rule of the paper (section 5) and the learning-rate schedules.

    v ← momentum · v − decay · ε · w − ε · ∂L/∂w
    w ← w + v

ε is inside the velocity, so after a drop of the rate the old velocity lives on for about ten steps; torch.optim.SGD
multiplies when it applies, and drops at once. At a constant rate the two are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from train.config.recipe import Recipe
from train.model import kernels
from train.model.alexnet import AlexNet


class PaperSGD(torch.optim.Optimizer):
    """The two lines above. A group whose lr is 0 is frozen: no gradient wanted, velocity untouched (weights.cu:148)."""

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float) -> None:
        """`groups`: dicts with params, lr, weight_decay, and what else the caller wants to find them by."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})

    def velocity(self, parameter: nn.Parameter) -> Tensor:
        """The v of a parameter, made at need: same shape and device."""
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        velocity: Tensor = state["velocity"]
        return velocity

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: the rule needs one gradient
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            given = [] if group["lr"] == 0 else [p for p in group["params"] if p.grad is not None]
            rest = [p for p in given if not self._updated_at_once(p, group)]
            for device in dict.fromkeys(p.device for p in rest):  # lists on one device are updated by few launches
                self._update([p for p in rest if p.device == device], group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        weights: list[Tensor] = [*parameters]
        velocities, lr = [self.velocity(p) for p in parameters], group["lr"]
        momentum, decay = group["momentum"], group["weight_decay"]
        fused = momentum and weights[0].device.type in ("cpu", "cuda")
        if fused and all(map(_dense_alike, weights, velocities, gradients)):
            # torch: v ← momentum · v + (1 − dampening)(∂L/∂w + decay · w), then w ← w − lr · v; with these it is ours
            same = {"lr": -1.0, "dampening": 1.0 + lr, "nesterov": False, "maximize": False, "is_first_step": False}
            torch._fused_sgd_(weights, gradients, velocities, weight_decay=decay, momentum=momentum, **same)
            torch.autograd.graph.increment_version((*weights, *velocities))  # which that operator leaves out
            return
        torch._foreach_mul_(velocities, momentum)
        if decay:
            torch._foreach_add_(velocities, weights, alpha=-lr * decay)
        torch._foreach_add_(velocities, gradients, alpha=-lr)
        torch._foreach_add_(weights, velocities)

    def _updated_at_once(self, parameter: nn.Parameter, group: dict[str, Any]) -> bool:
        """Update one parameter of a CPU by kernels.c, if it is there and can."""
        velocity, gradient = self.velocity(parameter), parameter.grad
        if kernels.native is None or gradient is None or parameter.device.type != "cpu" or not parameter.numel():
            return False
        trio = parameter, velocity, gradient
        if any(t.dtype != torch.float32 for t in trio) or not _dense_alike(*trio):
            return False
        kernels.native.update(*trio, group["momentum"], group["lr"], group["weight_decay"])
        return True


def _dense_alike(*tensors: Tensor) -> bool:
    """Whether numbers of one place lie at one place in memory, so that one pass over it updates them: five are read or
    written for each, where one operator after the other takes eleven.
    """
    layouts = [torch.contiguous_format, *[torch.channels_last] * (tensors[0].dim() == 4)]
    return any(all(t.is_contiguous(memory_format=layout) for t in tensors) for layout in layouts)


def make_optimizer(model: AlexNet, recipe: Recipe) -> PaperSGD:
    """Groups by what a schedule can address: conv1's weights, other weights, biases; see Schedule.apply."""
    groups: dict[str, dict[str, Any]] = {
        "conv1": {"params": [], "weight_decay": recipe.weight_decay},
        "weights": {"params": [], "weight_decay": recipe.weight_decay},
        "conv1 biases": {"params": [], "weight_decay": recipe.weight_decay if recipe.decay_biases else 0.0},
        "biases": {"params": [], "weight_decay": recipe.weight_decay if recipe.decay_biases else 0.0},
    }
    for name, parameters in model.parameters_by_joined_name().items():
        first = name.startswith("conv1.")
        if name.endswith(".bias"):
            groups["conv1 biases" if first else "biases"]["params"] += parameters
        else:
            groups["conv1" if first else "weights"]["params"] += parameters
    return PaperSGD([{"name": name, **group} for name, group in groups.items()], recipe.momentum)
