"""A small training program of a user, with every public name of `pipeline`.

tests/test_wheel.py type-checks it with `mypy --strict` against the installed wheel: `assert_type` fails there where a
name has lost its type, for example by becoming Any. tests/pipeline/test_public_names.py runs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import nn

from pipeline import (
    Augmentation,
    Batch,
    EvalLoader,
    StoreError,
    TrainLoader,
    UserError,
    WaitTimes,
    eval_loader,
    train_loader,
)


class SmallNetwork(nn.Module):
    """One convolution and one fully connected layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel_size=11, stride=16)
        self.fc = nn.Linear(4 * 14 * 14, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps: torch.Tensor = self.conv(images)
        logits: torch.Tensor = self.fc(maps.relu().flatten(1))
        return logits


def train(store: Path, state_file: Path) -> float:
    """Train for an epoch, continue from a saved state, and return the error rate of the validation split."""
    augmentation = Augmentation(mean="channel", colour="eigenvalue", strength=0.1, divisor=1.0, shared_by=1)
    assert_type(augmentation.mean, str)
    assert_type(augmentation.strength, float)
    assert_type(augmentation.shared_by, int)
    with train_loader(
        store,
        batch_size=4,
        device="cpu",
        seed=0,
        split="train",
        augmentation=augmentation,
        layout="NCHW",
        dtype="float32",
        threads=2,
        shard=0,
        world_size=1,
    ) as loader:
        assert_type(loader, TrainLoader)
        assert_type(loader.classes, tuple[str, ...])
        assert_type(loader.store.settings.side_px, int)
        assert_type((len(loader), loader.epoch, loader.step, loader.left_out), tuple[int, int, int, int])
        network = SmallNetwork(len(loader.classes))
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
        for batch in loader:
            assert_type(batch, Batch)
            assert_type(batch.images, torch.Tensor)
            assert_type(batch.labels, torch.Tensor)
            loss = nn.functional.cross_entropy(network(batch.images), batch.labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert_type(loader.wait_times(), WaitTimes)
        assert_type(loader.wait_times().consumer_wait_s, float)
        assert_type(loader.state_dict(), dict[str, Any])
        state_file.write_text(json.dumps(loader.state_dict()))

    with train_loader(str(store), 4, augmentation=augmentation) as resumed:
        resumed.load_state_dict(json.loads(state_file.read_text()))
        images, labels = next(iter(resumed))
        assert_type(images, torch.Tensor)
        assert_type(labels, torch.Tensor)
        resumed.seek(0, step=1)
    return error_rate(network, store, augmentation)


def error_rate(network: nn.Module, store: Path, augmentation: Augmentation) -> float:
    """Share of the validation images whose most probable class is wrong."""
    misses = images = 0
    with eval_loader(store, batch_size=8, views=1, augmentation=augmentation) as loader, torch.no_grad():
        assert_type(loader, EvalLoader)
        for batch in loader:
            assert_type(batch, Batch)
            misses += int((network(batch.images).argmax(1) != batch.labels).sum())
            images += len(batch.labels)
    return misses / images


def main(store: Path, state_file: Path) -> str:
    """The error rate as text, or what is wrong with the store or the arguments."""
    try:
        return f"{train(store, state_file):.1%}"
    except StoreError as error:
        return f"store: {error}"
    except UserError as error:
        return f"argument: {error}"
