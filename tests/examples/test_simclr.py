"""examples.simclr: the loss is equation 1 of the paper, and the two views of an image are its positive pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from examples.networks import resnet18
from examples.simclr import nt_xent
from tests.examples.runs import BATCH, WIDTH, Run, stream_batches


def expected_loss(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], temperature: float) -> float:
    """NT-Xent as in SimCLR, algorithm 1: `first` and `second` (N, D) are the projections of the two views."""
    z = np.concatenate([first, second])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    s, n = np.exp(z @ z.T / temperature), len(first)
    losses = [-np.log(s[i, (i + n) % (2 * n)] / sum(s[i, k] for k in range(2 * n) if k != i)) for i in range(2 * n)]
    return float(np.mean(losses))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_is_equation_1(temperature: float) -> None:
    projections = np.random.default_rng(3).normal(size=(5, 2, 7)) * 3
    expected = expected_loss(projections[:, 0], projections[:, 1], temperature)
    assert abs(nt_xent(torch.from_numpy(projections), temperature).item() - expected) < 1e-9


def test_positive_pairs_are_the_views_of_one_image(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss equals the loss of the same views in the paper's order: all first views, then all second views."""
    run = Run(monkeypatch, "simclr")
    run(store, tmp_path / "simclr.pt")
    images, _ = stream_batches(store, "simclr", views=2)[0]
    torch.manual_seed(0)
    net = resnet18(1, WIDTH)
    net.fc = nn.Sequential(nn.Linear(8 * WIDTH, 8 * WIDTH), nn.ReLU(), nn.Linear(8 * WIDTH, 128))
    with torch.no_grad():
        z = net(torch.cat([images[:, 0], images[:, 1]])).double().numpy()
    assert images.shape == (BATCH, 2, 3, 32, 32)
    assert abs(run.losses[0] - expected_loss(z[:BATCH], z[BATCH:], 0.1)) < 1e-4
    assert run.losses[-1] < run.losses[0]
