"""Benchmark of training on a CPU: several processes with few threads each, compared with one process with all threads.

replicas           two processes (--replicas sets another number), each with an equal part of the batch and of the
                   threads. Gradients are exchanged in shared memory, as
                   `torchrun --nproc-per-node 2 -m train run --gpus cpu` does.
replicas over TCP  the same processes, but gloo exchanges the gradients over TCP, as it does between machines.
one process        one process with all threads and the whole batch, as `alextrain run --gpus cpu` does.

A step consists of forward pass, cross-entropy, backward pass, exchange of gradients, and update. Each step trains the
network of the paper with the recipe `released`, in float32, on random images that are in memory. The processes of all
three contestants exist during the whole measurement, but only those of one contestant compute at a time. The stream and
the metrics of the training loop are not measured.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import click
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list TCPStore in __all__

from pipeline.augment import CROP_PX
from prep.console import say, usable_cores
from tools.bench.harness import BenchmarkCommand, Contestant, common_options, print_results, race, timed
from train.config.devices import keep_freed_memory
from train.config.recipes import RELEASED
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.replicas.gradients import GradientSum
from train.replicas.group import ReplicaGroup
from train.replicas.link import Link
from train.trainer.step import TrainingStep

CLASSES = 1000
_TIMEOUT_S = 600.0


def compute(pipe: Connection, rank: int, size: int, port: int, over_tcp: bool, batch: int, threads: int) -> None:
    """Make training steps as one of `size` replicas. `pipe` receives the number of steps; 0 ends the process."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    link = Link(rank, size, "127.0.0.1", port, False, _TIMEOUT_S) if size > 1 else None
    network = AlexNet(CLASSES, RELEASED)
    network.replicas = ReplicaGroup(rank, size, rank, size, link=link)
    optimizer = make_optimizer(network, RELEASED)
    Schedule(RELEASED).apply(optimizer, 0)
    gradient_sum = None if link is None else GradientSum(network.parameters(), link, over_tcp)
    step = TrainingStep(network, optimizer, gradient_sum=gradient_sum)
    images, labels = 60 * torch.randn(batch // size, 3, CROP_PX, CROP_PX), torch.randint(CLASSES, (batch // size,))
    while steps := pipe.recv():
        for _ in range(steps):
            step(images, labels)
        pipe.send(steps)


@contextmanager
def contestant(name: str, size: int, over_tcp: bool, batch: int, steps: int, threads: int) -> Iterator[Contestant]:
    """Start the processes of a contestant, and end them after the `with` block."""
    spawn = multiprocessing.get_context("spawn")
    server: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(size):
        own, other = spawn.Pipe()
        arguments = (other, rank, size, server.port, over_tcp, batch, threads // size)
        processes.append(spawn.Process(target=compute, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(own)

    def turn() -> int:
        for pipe in pipes:
            pipe.send(steps)
        for pipe in pipes:
            pipe.recv()
        return batch * steps

    yield Contestant(name, timed(turn))
    for pipe in pipes:
        pipe.send(0)
    for process in processes:
        process.join()


@click.command(cls=BenchmarkCommand)
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Number of images in a step.")
@click.option(
    "--steps", type=click.IntRange(1), default=1, show_default=True, help="Number of steps in each timed run."
)
@click.option("--replicas", type=click.IntRange(2), default=2, show_default=True, help="Number of replicas.")
@common_options
def main(batch: int, steps: int, replicas: int, rounds: int, as_json: bool) -> None:
    """Measure training steps on CPU replicas, and on one process with as many threads as all replicas together.

    \b
    Example:
      python -m tools.bench.replicas --rounds 5
      python -m tools.bench.replicas --batch 256 --replicas 4
    """
    threads = max(usable_cores() // replicas, 1) * replicas
    batch -= batch % replicas
    say(f"batch {batch}, {threads} threads")
    with ExitStack() as stack:
        contestants = [
            stack.enter_context(contestant(name, size, over_tcp, batch, steps, threads))
            for name, size, over_tcp in (
                (f"{replicas} replicas", replicas, False),
                (f"{replicas} replicas over TCP", replicas, True),
                ("one process", 1, False),
            )
        ]
        rows = race(contestants, rounds)
    details = {"batch": batch, "steps": steps, "threads": threads, "replicas": replicas, "rounds": rounds}
    ratio = round(1 / rows[-1].of_ours, 3)
    note = f"speed of {replicas} replicas / speed of one process, with {threads} threads in total: {ratio:.2f}"
    print_results(rows, as_json, {**details, "of_one_process": ratio}, note)


if __name__ == "__main__":
    main()
