"""LARS: SGD that scales the learning rate of each layer, for batches of thousands of images.

The source is algorithm 1 of Large Batch Training of Convolutional Networks (Y. You, I. Gitman and B. Ginsburg 2017,
arXiv 1708.03888). Algorithm 1 uses the weights w of a layer, their gradient g, the learning rate γ of the schedule, the
weight decay β, the momentum m and the trust coefficient η:

    λ = η · ‖w‖ / (‖g‖ + β · ‖w‖)               the local rate of the layer
    v ← m · v − γ · λ · (g + β · w)
    w ← w + v

The formulas for v and w are the rule of PaperSGD with the learning rate γ · λ (argument `local_rates` of PaperSGD). In
the paper, v has the opposite sign.

The paper leaves three points open. In these points, this module does what the authors' code does (GetLocalRate in
src/caffe/solvers/sgd_solver.cpp of borisgin/nvcaffe, a fork of NVIDIA's Caffe):

- The weights and the biases of a layer have separate local rates, as in the paper's table 2.
- λ is 1 if ‖w‖ or ‖g‖ is 0. With λ = 0, biases that start at 0 could not change.
- λ is not limited. With `larc_policy: "clip"`, a later version of the authors' code limits γ · λ to γ.

The authors' code differs from the paper, and from this module, in two points:

- In λ, the authors' code uses one β for all parameters, even for parameters without weight decay. This module uses
  β = 0 for parameters without weight decay.
- On a CPU, the authors' code computes ‖g + β · w‖ instead of ‖g‖.

Later versions of the authors' code also leave β · ‖w‖ out of λ.

A layer of a network with two columns is divided between the columns, which may be on two GPUs. The norms of a divided
layer are those of the joined layer. The columns therefore have the same λ, and the network trains like a network with
one column. In each step, each GPU receives at most 2 · 16 sums of squares from the other GPU. Norms and local rates
stay on the device, so the host does not wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model import kernels
from train.optim.fused_sgd import same_dense_layout

_ROW = 4096  # number of values whose squares are added in float32 before the sums are added in float64


class LocalRates:
    """Computes the local rate λ of each layer. PaperSGD multiplies the learning rates by λ."""

    def __init__(self, trust: float, layers: Iterable[Sequence[nn.Parameter]]) -> None:
        """Remember the layers.

        trust   the trust coefficient η, more than 0
        layers  for each joined tensor, its parts in the columns; the parts have a common local rate
        """
        self._trust, self._layers = trust, [list(layer) for layer in layers]
        self._decays: dict[tuple[torch.device, tuple[float, ...]], Tensor] = {}

    @torch.no_grad()
    def __call__(self, decay_of: Mapping[nn.Parameter, float]) -> dict[nn.Parameter, Tensor]:
        """Return λ of each parameter in `decay_of`: a float64 tensor of shape () on the device of the parameter.

        decay_of  {parameter with a gradient: its weight decay}
        """
        layers = [[parameter for parameter in layer if parameter in decay_of] for layer in self._layers]
        # Layers with two columns come first.
        layers = sorted((layer for layer in layers if layer), key=len, reverse=True)
        columns = [[layer[c] for layer in layers if c < len(layer)] for c in range(max(map(len, layers), default=0))]
        by_column = [_sums_of_squares(column) for column in columns]
        rates: dict[nn.Parameter, Tensor] = {}
        for column, own in zip(columns, by_column, strict=True):
            sums = torch.zeros_like(own)
            for others in by_column:  # F.pad appends zeros to `others`, or cuts its end, to the length of `column`
                sums += F.pad(others.to(own.device, non_blocking=True), (0, len(column) - others.shape[1]))
            weights, gradients = sums.sqrt().unbind()
            decays = self._decay_tensor(own.device, tuple(decay_of[parameter] for parameter in column))
            scaled = self._trust * weights / (gradients + decays * weights)
            scaled = torch.where((weights > 0) & (gradients > 0), scaled, torch.ones_like(scaled))
            rates.update(zip(column, scaled.unbind(), strict=True))
        return rates

    def _decay_tensor(self, device: torch.device, decays: tuple[float, ...]) -> Tensor:
        """Return the n weight decays as a float64 tensor of shape (n,).

        Only the first call with these arguments copies data to the device. A CUDA graph cannot contain such a copy.
        """
        if (device, decays) not in self._decays:
            self._decays[device, decays] = torch.tensor(decays, dtype=torch.float64, device=device)
        return self._decays[device, decays]


def _sums_of_squares(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return float64 (2, n) on the device of the parameters: Σ w² and Σ g² of each of the n parameters."""
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    if tensors[0].device.type == "cuda":  # foreach operations launch only a few kernels for all tensors
        sums = torch.stack(torch._foreach_norm(tensors)).double().square()
    else:
        sums = torch.stack([_sum_of_squares(tensor) for tensor in tensors])
    return sums.view(2, -1)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return Σ x² as a float64 tensor of shape ().

    PyTorch's own float32 norm of a layer with 38 million weights would be 0.25 % too small.
    """
    if kernels.native is not None and x.device.type == "cpu" and x.dtype == torch.float32 and same_dense_layout(x):
        return torch.tensor(kernels.native.sum_of_squares(x), dtype=torch.float64)
    values = x.flatten()
    end = len(values) - len(values) % _ROW
    norms = torch.linalg.vector_norm(values[:end].view(-1, _ROW), dim=1)
    return torch.cat([norms, torch.linalg.vector_norm(values[end:]).view(1)]).double().square().sum()
