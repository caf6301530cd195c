"""SGD by the paper's update rule (section 5), computed by the C kernel or by PyTorch.

    v ← momentum · v − decay · ε · w − ε · ∂L/∂w
    w ← w + v

The velocity v contains the learning rate ε. After ε is reduced, v still contains the larger ε of earlier steps. The
larger ε therefore acts for about ten more steps. In torch.optim.SGD, v does not contain ε, and the update is
w ← w − ε · v. With torch.optim.SGD, a reduction of ε therefore has its full effect at once. If ε is constant, both
rules give the same weights.

The C kernel (train/model/kernels.c) updates float32 parameters on a CPU. fused_sgd.py updates all other parameters, and
all parameters if the kernels are not compiled. If the learning rates are in a tensor, rate_tensor_update.py updates all
parameters. lars.py scales the learning rate of each layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from train.config.recipe import Recipe
from train.model import kernels
from train.model.alexnet import AlexNet
from train.optim import fused_sgd
from train.optim.lars import LocalRates
from train.optim.rate_tensor_update import RateTensorUpdate, Trio, update_with_rate


class PaperSGD(torch.optim.Optimizer):
    """SGD by the paper's rule.

    In a group with lr 0, neither the parameters nor their velocities change (weights.cu:148).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], momentum: float, local_rates: LocalRates | None = None
    ) -> None:
        """Each group is a dict with "params" and optionally "lr", "weight_decay" and "name".

        The default of "lr" and of "weight_decay" is 0. PaperSGD ignores "name".

        local_rates  computes a factor of the learning rate for each parameter (LARS); None: all factors are 1
        """
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})
        self._local_rates = local_rates
        self._rate_tensor_update: RateTensorUpdate | None = None

    def velocity(self, parameter: nn.Parameter) -> Tensor:
        """Return the velocity of a parameter: a tensor of the same shape, layout and device, initially zero."""
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        velocity: Tensor = state["velocity"]
        return velocity

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """Update every parameter that has a gradient."""
        if self._local_rates is not None:
            self._step_with(self._local_rates)
            return
        if self._rate_tensor_update is not None:
            self._rate_tensor_update.run()
            return
        for group in self.param_groups:
            updated = [] if group["lr"] == 0 else [p for p in group["params"] if p.grad is not None]
            rest = [p for p in updated if not self._update_by_kernel(p, group)]
            # One call for each device and dtype launches fewer kernels than one call for each parameter.
            for kind in dict.fromkeys((p.device, p.dtype) for p in rest):
                self._update([p for p in rest if (p.device, p.dtype) == kind], group)

    def use_rate_tensor(self) -> None:
        """Make `step` read the learning rates from a tensor.

        Steps that are recorded as a CUDA graph need learning rates in a tensor (train/trainer/step_graph.py). After
        this call, `step` uses the rates of the last call of `write_rates`. All parameters must be on one device.
        """
        trios = [
            Trio(p, self.velocity(p), index, group["weight_decay"])
            for index, group in enumerate(self.param_groups)
            for p in group["params"]
        ]
        self._rate_tensor_update = RateTensorUpdate(trios, len(self.param_groups), self.defaults["momentum"])

    def write_rates(self) -> None:
        """Write the learning rates of the groups to the tensor.

        Parameters of a group with lr 0 must not have gradients, because momentum would otherwise change these
        parameters.
        """
        assert self._rate_tensor_update is not None
        self._rate_tensor_update.write_rates([group["lr"] for group in self.param_groups])

    def write_addresses(self) -> None:
        """Write the table of the Triton kernel (RateTensorUpdate).

        Call this method after a step was recorded as a CUDA graph.
        """
        assert self._rate_tensor_update is not None
        self._rate_tensor_update.write_addresses()

    def _step_with(self, local_rates: LocalRates) -> None:
        """Update every parameter that has a gradient.

        The learning rate is that of the parameter's group, times the parameter's local rate.
        """
        group_of = {
            parameter: group
            for group in self.param_groups
            for parameter in group["params"]
            if group["lr"] != 0 and parameter.grad is not None
        }
        rates = local_rates({parameter: group["weight_decay"] for parameter, group in group_of.items()})
        if self._rate_tensor_update is not None:
            self._rate_tensor_update.run(rates)
            return
        for parameter, group in group_of.items():
            rate, lr = rates[parameter], group["lr"]
            if parameter.device.type == "cpu":
                scaled = {**group, "lr": lr * rate.item()}  # on a CPU, item() does not have to wait
                if not self._update_by_kernel(parameter, scaled):
                    self._update([parameter], scaled)
                continue
            update_with_rate(
                parameter, self.velocity(parameter), parameter.grad, group["momentum"], lr * rate, group["weight_decay"]
            )

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        velocities = [self.velocity(p) for p in parameters]
        fused_sgd.update(parameters, velocities, gradients, group["momentum"], group["lr"], group["weight_decay"])

    def _update_by_kernel(self, parameter: nn.Parameter, group: dict[str, Any]) -> bool:
        """Update a float32 parameter on a CPU by train/model/kernels.c. Returns False if the kernel cannot be used."""
        velocity, gradient = self.velocity(parameter), parameter.grad
        if kernels.native is None or gradient is None or parameter.device.type != "cpu" or not parameter.numel():
            return False
        trio = parameter, velocity, gradient
        if any(t.dtype != torch.float32 for t in trio) or not fused_sgd.same_dense_layout(*trio):
            return False
        kernels.native.update(*trio, group["momentum"], group["lr"], group["weight_decay"])
        return True


def make_optimizer(network: AlexNet, recipe: Recipe) -> PaperSGD:
    """Return a PaperSGD with four groups: conv1's weights, conv1's biases, all other weights, all other biases.

    If the recipe sets `lars_trust`, each layer has a local rate. Schedule.apply sets the learning rates.
    """
    groups: dict[str, dict[str, Any]] = {
        "conv1": {"params": [], "weight_decay": recipe.weight_decay},
        "weights": {"params": [], "weight_decay": recipe.weight_decay},
        "conv1 biases": {"params": [], "weight_decay": recipe.weight_decay if recipe.decay_biases else 0.0},
        "biases": {"params": [], "weight_decay": recipe.weight_decay if recipe.decay_biases else 0.0},
    }
    for name, parameters in network.parameters_by_joined_name().items():
        first = name.startswith("conv1.")
        if name.endswith(".bias"):
            groups["conv1 biases" if first else "biases"]["params"] += parameters
        else:
            groups["conv1" if first else "weights"]["params"] += parameters
    layers = network.parameters_by_joined_name().values()
    local_rates = None if recipe.lars_trust is None else LocalRates(recipe.lars_trust, layers)
    return PaperSGD([{"name": name, **group} for name, group in groups.items()], recipe.momentum, local_rates)
