"""examples.resnet trains the same weights as a plain loop. Two processes of an example share one stream."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.networks import resnet18
from pipeline import Augmentation, eval_loader
from tests.examples.runs import BATCH, EPOCHS, SIZE_PX, STEPS_PER_EPOCH, WIDTH, Run, same_weights, stream_batches
from tests.helpers.torchrun.job import Job, Torchrun


def accuracy_text(store: Path, state: dict[str, Tensor]) -> str:
    """Return the top-1 accuracy on the validation images, as the text that the example prints."""
    net = resnet18(3, WIDTH)
    net.load_state_dict(state)
    net.eval()
    settings = replace(Augmentation.preset("resnet"), size_px=SIZE_PX)
    with torch.no_grad(), eval_loader(store, 12, augmentation=settings) as loader:
        ((images, labels),) = loader
        return f"top-1 accuracy {int((net(images).argmax(1) == labels).sum()) / 12:.1%}"


def test_weights_and_accuracy_are_those_of_a_plain_loop(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch, "resnet")
    run(store, tmp_path / "resnet.pt")
    weights = torch.load(tmp_path / "resnet.pt")["net"]
    torch.manual_seed(0)
    net = resnet18(3, WIDTH)
    initial = {name: value.clone() for name, value in net.state_dict().items()}
    momentum = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for step, (images, labels) in enumerate(stream_batches(store, "resnet")):
        loss = -net(images).log_softmax(1)[torch.arange(BATCH), labels].mean()
        assert abs(loss.item() - run.losses[step]) < 2e-3  # rounding grows from step to step
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        lr = 0.1 * BATCH / 256 * (1 + math.cos(math.pi * step / (EPOCHS * STEPS_PER_EPOCH))) / 2
        with torch.no_grad():
            for parameter, gradient, m in zip(net.parameters(), gradients, momentum, strict=True):
                m.mul_(0.9).add_(gradient + 1e-4 * parameter)
                parameter -= lr * m
    for name, expected in net.state_dict().items():
        moved, difference = (expected - initial[name]).double(), (expected - weights[name]).double()
        assert moved.norm() > 0 and difference.norm() < 0.02 * moved.norm(), name
    assert f"epoch 2: loss {run.losses[-1]:.3f}, {accuracy_text(store, weights)}\n" in capsys.readouterr().out


def labels_of(path: Path) -> list[list[int]]:
    """Return the labels that a rank of killed_example.py wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_of_accelerate_share_the_records(store: Path, tmp_path: Path, torchrun: Torchrun) -> None:
    program = ("-m", "tests.examples.killed_example", "accelerate_resnet", store, tmp_path / "out")
    options = ("--epochs", 2, "--batch-size", 4, "--size-px", SIZE_PX, "--width", WIDTH)
    job = torchrun("--nproc-per-node", 2, *program, *options, env={"KILL_AT": "never", "ATTEMPT": "0"})
    assert job.wait() == 0, job.stderr
    weights = load_file(tmp_path / "out" / "00000006" / "model.safetensors")
    assert job.stdout.endswith(f", {accuracy_text(store, weights)}\n")
    expected = [labels.tolist() for _, labels in stream_batches(store, "resnet", 8)]
    for rank in (0, 1):
        assert labels_of(tmp_path / f"out.0.{rank}") == [labels[4 * rank : 4 * rank + 4] for labels in expected]


def test_two_processes_share_the_records_and_resume_after_a_kill(
    store: Path, tmp_path: Path, torchrun: Torchrun
) -> None:
    """Rank 1 is killed in the fifth of six steps. The same command then resumes after the third or fourth step."""

    def start(name: str, attempt: int, kill_at: str = "never") -> Job:
        options = ("--epochs", 2, "--batch-size", 4, "--size-px", SIZE_PX, "--width", WIDTH, "--save-every", 1)
        program = ("-m", "tests.examples.killed_example", "resnet", store, tmp_path / f"{name}.pt", *options)
        return torchrun("--nproc-per-node", 2, *program, env={"KILL_AT": kill_at, "ATTEMPT": str(attempt)})

    whole, killed = start("whole", 0), start("killed", 0, "4")
    assert killed.wait() == 1 and killed.rank_exit_codes[1] == [-9]
    resumed = start("killed", 1)
    assert whole.wait() == 0 and resumed.wait() == 0, whole.stderr + resumed.stderr
    weights = torch.load(tmp_path / "whole.pt")["net"]
    assert same_weights(weights, torch.load(tmp_path / "killed.pt")["net"])
    assert whole.stdout.endswith(f", {accuracy_text(store, weights)}\n")
    assert whole.stdout.splitlines()[-1] == resumed.stdout.splitlines()[-1]
    expected = [labels.tolist() for _, labels in stream_batches(store, "resnet", 8)]
    for rank in (0, 1):
        own = [labels[4 * rank : 4 * rank + 4] for labels in expected]
        first, second = (labels_of(tmp_path / f"killed.pt.{attempt}.{rank}") for attempt in (0, 1))
        assert first[:4] == own[:4] and second in (own[3:], own[4:])
