"""Benchmark of one training step on the CPU, compared with the same network written with PyTorch's own modules.

ours    train.model.alexnet.AlexNet with the recipe `paper`, both columns on the CPU, updated by train.optim.paper_sgd
        with the recipe's learning rates.
ours, without LRN
        like `ours`, without local response normalization (LRN). The difference from the rate of `ours` is the cost of
        our LRN.
plain   one column of PyTorch's modules, with torch.optim.SGD and the recipe's learning rate for weights. conv2, conv4
        and conv5 have two groups, because in the paper each column of these layers reads only one column of the
        previous layer. Each layer has as many parameters as in `ours`.
plain, without LRN
        like `plain`, without LRN. The paper's network has LRN, so the rate of this contestant is only for comparison.

`plain` differs from the paper's network in two respects. First, LRN sums over five neighbouring maps. In the paper the
five maps belong to one column, which has 48 or 128 maps. In `plain` the five maps can come from both halves of the
layer, which has 96 or 256 maps. Second, dropout in the paper scales activations at test time. nn.Dropout scales
activations at training time.

A step consists of forward pass, cross-entropy, zero_grad, backward pass and update, in float32. The images are random,
and are in memory. Each timed run has --steps steps. The stream (see tools.bench.stream), the metrics of the training
loop, and GPUs are not measured.

Peak memory is the largest resident memory of a process that runs only two steps. Peak memory includes Python, PyTorch,
parameters, gradients, velocities and activations. The peak that Linux reports for a new process includes the peak of
its parent process. Peak memory is therefore measured before the rates.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import click
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.augment import CROP_PX
from prep.console import say
from tools.bench.harness import BenchmarkCommand, Contestant, common_options, print_results, race, timed
from train.config.recipes import PAPER
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule

OURS, OURS_WITHOUT_LRN = "ours", "ours, without LRN"
PLAIN, WITHOUT_LRN = "plain PyTorch", "plain PyTorch, without LRN"
NAMES = (OURS, OURS_WITHOUT_LRN, PLAIN, WITHOUT_LRN)
CLASSES = 1000


def plain_alexnet(with_lrn: bool) -> nn.Sequential:
    """Return the network of the paper as one column, made of PyTorch's modules."""

    def norm() -> nn.Module:
        lrn = PAPER.lrn  # PyTorch divides alpha by the number of maps in the sum, so alpha is multiplied by this number
        assert lrn
        return nn.LocalResponseNorm(lrn.size, lrn.size * lrn.alpha, lrn.beta, lrn.k) if with_lrn else nn.Identity()

    def relu() -> nn.Module:
        return nn.ReLU(inplace=True)

    return nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)),
        *(nn.Conv2d(3, 96, 11, stride=4), relu(), norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, padding=2, groups=2), relu(), norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, padding=1), relu()),
        *(nn.Conv2d(384, 384, 3, padding=1, groups=2), relu()),
        *(nn.Conv2d(384, 256, 3, padding=1, groups=2), relu(), nn.MaxPool2d(3, 2), nn.Flatten()),
        *(nn.Linear(256 * 6 * 6, 4096), relu(), nn.Dropout(PAPER.dropout)),
        *(nn.Linear(4096, 4096), relu(), nn.Dropout(PAPER.dropout)),
        nn.Linear(4096, CLASSES),
    )


def training_step(name: str, batch: int) -> Callable[[], int]:
    """Return the training step of one contestant, as a function that returns the number of images in a step."""
    torch.manual_seed(0)
    images, labels = 60 * torch.randn(batch, 3, CROP_PX, CROP_PX), torch.randint(CLASSES, (batch,))
    model: nn.Module
    optimizer: torch.optim.Optimizer
    if name in (OURS, OURS_WITHOUT_LRN):
        recipe = PAPER if name == OURS else replace(PAPER, lrn=None)
        model = alexnet = AlexNet(CLASSES, recipe, ("cpu", "cpu"))
        optimizer = paper_sgd = make_optimizer(alexnet, PAPER)
        Schedule(PAPER).apply(paper_sgd, 0)
    else:
        model = plain_alexnet(with_lrn=name == PLAIN)
        for parameter in model.parameters():
            # With PyTorch's default initialization, training diverges at the paper's learning rate.
            nn.init.normal_(parameter, std=PAPER.init_std["conv1"])
        optimizer = torch.optim.SGD(model.parameters(), PAPER.lr, PAPER.momentum, weight_decay=PAPER.weight_decay)
    model.train()

    def step() -> int:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
        return batch

    return step


def peak_memory_mb(name: str, batch: int) -> int:
    """Run two training steps, and return the peak resident memory of this process in MB (10^6 bytes)."""
    step = training_step(name, batch)
    step(), step()
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)  # ru_maxrss is in KiB on Linux


def make_contestant(name: str, batch: int, steps: int) -> Contestant:
    """Return a contestant with a new network. Each timed run has `steps` training steps on one batch."""
    step = training_step(name, batch)
    return Contestant(name, timed(lambda: sum(step() for _ in range(steps))))


@click.command(cls=BenchmarkCommand)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Number of images in a step.")
@click.option(
    "--steps", type=click.IntRange(1), default=1, show_default=True, help="Number of steps in each timed run."
)
@common_options
def main(batch: int, steps: int, rounds: int, as_json: bool) -> None:
    """Measure one training step on the CPU, of our network and of the same network made of PyTorch's own modules.

    \b
    Example:
      python -m tools.bench.train --rounds 5
      python -m tools.bench.train --batch 128
    """
    say(f"batch {batch}, {torch.get_num_threads()} threads; measuring memory")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        memory = {name: pool.submit(peak_memory_mb, name, batch).result() for name in NAMES}
    rows = race([make_contestant(name, batch, steps) for name in NAMES], rounds)
    threads = torch.get_num_threads()
    lrn_share = 1 - 1 / next(row.of_ours for row in rows if row.name == OURS_WITHOUT_LRN)
    details = {"batch": batch, "steps": steps, "threads": threads, "rounds": rounds, "peak_memory_mb": memory}
    note = f"LRN's share of our step: {lrn_share:.1%}\n"
    note += "peak memory, MB: " + ", ".join(f"{name} {mb:,}" for name, mb in memory.items())
    print_results(rows, as_json, {**details, "lrn_share": round(lrn_share, 3)}, note)


if __name__ == "__main__":
    main()
