"""Each example resumes after a kill with the next batch, and ends with the same weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.examples.runs import LIGHTNING_WARNINGS, Run, same_weights


def weights_of(example: str, output: Path) -> dict[str, Tensor]:
    """Return the weights in the newest checkpoint of an example."""
    if example == "accelerate_resnet":
        return load_file(max(output.glob("[0-9]*")) / "model.safetensors")
    if example == "lightning_resnet":
        output = max(output.glob("*.ckpt"))
    state: dict[str, Tensor] = torch.load(output)["state_dict" if output.suffix == ".ckpt" else "net"]
    return state


@LIGHTNING_WARNINGS
@pytest.mark.parametrize("example", ["resnet", "simclr", "lightning_resnet", "accelerate_resnet"])
def test_a_killed_run_ends_with_the_same_weights(
    example: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch has four steps, and checkpoints follow every second step: within an epoch, and at its end."""
    run = Run(monkeypatch, example)
    run(store, tmp_path / "whole", "--save-every", 2)
    losses, targets = run.losses, run.targets
    assert len(losses) == 8
    run(store, tmp_path / "killed", "--save-every", 2, kill_at=3)
    run(store, tmp_path / "killed", "--save-every", 2, kill_at=3)  # steps 2, 3, 4
    assert (run.losses, run.targets) == (losses[2:5], targets[2:5])
    run(store, tmp_path / "killed", "--save-every", 2)
    assert (run.losses, run.targets) == (losses[4:], targets[4:])
    assert same_weights(weights_of(example, tmp_path / "killed"), weights_of(example, tmp_path / "whole"))
