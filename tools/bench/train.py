"""How fast one training step is, beside the same network written with PyTorch's own modules.

ours    train.model.alexnet.AlexNet with the recipe `paper`, both columns on the CPU, train.optim.paper_sgd with that recipe's rates.
ours, without LRN
        the same but for its normalizations: what they cost us, as a share of the step.
plain   one column: Conv2d with two groups where the paper has two columns, nn.LocalResponseNorm, nn.Dropout,
        torch.optim.SGD with the same rates. It has as many parameters, layer by layer.
plain, without LRN
        the same but for its two normalizations: not the paper's network, for orientation.

Two differences stay. The paper normalizes within each column's 48 and 128 maps, plain across all 96 and 256, with the
same number of maps in each sum. The paper scales activations in tests, nn.Dropout in training.

A step is: forward, cross-entropy, zero_grad, backward, update, in float32, of random images that are there already. A
turn is --steps of them. Left out: the stream (tools.bench.stream), the sums that the training loop keeps, GPUs.

The peak memory is the resident memory of a process that does nothing but two steps: Python, PyTorch, parameters,
gradients, velocities and activations. It is measured first, for a new process begins with its parent's peak.
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
from tools.bench.harness import Benchmark, Contestant, common_options, race, show, timed
from train.config.recipes import PAPER
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule

OURS, OURS_WITHOUT_LRN = "ours", "ours, without LRN"
PLAIN, WITHOUT_LRN = "plain PyTorch", "plain PyTorch, without LRN"
NAMES = (OURS, OURS_WITHOUT_LRN, PLAIN, WITHOUT_LRN)
CLASSES = 1000


def plain_alexnet(with_lrn: bool) -> nn.Sequential:
    """The paper's network without columns, from PyTorch's modules alone."""

    def norm() -> nn.Module:
        lrn = PAPER.lrn  # PyTorch divides alpha by the number of maps
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
    """One contestant's step, which returns its number of images."""
    torch.manual_seed(0)
    images, labels = 60 * torch.randn(batch, 3, CROP_PX, CROP_PX), torch.randint(CLASSES, (batch,))
    model: nn.Module
    optimizer: torch.optim.Optimizer
    if name in (OURS, OURS_WITHOUT_LRN):
        recipe = PAPER if name == OURS else replace(PAPER, lrn=None)
        model = ours = AlexNet(CLASSES, recipe, ("cpu", "cpu"))
        optimizer = updates = make_optimizer(ours, PAPER)
        Schedule(PAPER).apply(updates, 0)
    else:
        model = plain_alexnet(with_lrn=name == PLAIN)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=PAPER.init_std["conv1"])  # the paper's: PyTorch's own diverges at its rate
        optimizer = torch.optim.SGD(model.parameters(), PAPER.lr, PAPER.momentum, weight_decay=PAPER.weight_decay)
    model.train()

    def step() -> int:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        return batch

    return step


def peak_memory_mb(name: str, batch: int) -> int:
    """The peak of this process, after two steps and nothing else."""
    step = training_step(name, batch)
    step(), step()
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)  # Linux gives KiB


def contestant(name: str, batch: int, steps: int) -> Contestant:
    """One contestant, its network made."""
    step = training_step(name, batch)
    return Contestant(name, timed(lambda: sum(step() for _ in range(steps))))


@click.command(cls=Benchmark)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images in a step.")
@click.option("--steps", type=click.IntRange(1), default=1, show_default=True, help="Of each contestant, each turn.")
@common_options
def main(batch: int, steps: int, rounds: int, as_json: bool) -> None:
    """Measure one training step on the CPU, beside the same network written with PyTorch's own modules.

    \b
    Example:
      python -m tools.bench.train --rounds 5
      python -m tools.bench.train --batch 128
    """
    say(f"batch {batch}, {torch.get_num_threads()} threads; measuring memory")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        memory = {name: pool.submit(peak_memory_mb, name, batch).result() for name in NAMES}
    rows = race([contestant(name, batch, steps) for name in NAMES], rounds)
    threads = torch.get_num_threads()
    lrn_share = 1 - 1 / next(row.of_ours for row in rows if row.name == OURS_WITHOUT_LRN)
    more = {"batch": batch, "steps": steps, "threads": threads, "rounds": rounds, "peak_memory_mb": memory}
    note = f"LRN's share of our step: {lrn_share:.1%}\n"
    note += "peak memory, MB: " + ", ".join(f"{name} {mb:,}" for name, mb in memory.items())
    show(rows, as_json, {**more, "lrn_share": round(lrn_share, 3)}, note)


if __name__ == "__main__":
    main()
