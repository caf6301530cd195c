"""Functions for commands that run in several replicas. Each replica is a process that torchrun has started."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from prep.console import UserError, print_above
from train.config.choices import REPLICA_TIMEOUT_S
from train.config.identity import as_json
from train.config.replica_devices import count_of, threads_per_replica
from train.replicas.group import ReplicaGroup, group_from_environment, joined

if TYPE_CHECKING:
    from train.runs.run import Run

LONGEST_TIMEOUT_S = 604_800  # a week; torch cannot wait for infinitely many seconds


def _number(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Raise click.BadParameter for NaN, which click.FloatRange accepts."""
    if math.isnan(value):
        raise click.BadParameter("nan is not a number of seconds.")
    return value


replica_timeout_option = click.option(
    "--replica-timeout",
    type=click.FloatRange(0, LONGEST_TIMEOUT_S, min_open=True),
    callback=_number,
    default=REPLICA_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="Under torchrun: longest time for which a process waits for another process. After this time, all processes "
    "end with an error that names the missing process.",
)


@contextmanager
def replica_group(timeout_s: float) -> Iterator[ReplicaGroup]:
    """Join the other replicas during a `with` block. Ranks other than 0 print nothing but errors in the block.

    Without torchrun, the value of the `with` statement is a group of one replica. Raises the same errors as `joined`.
    """
    with joined(group_from_environment(), timeout_s) as group:
        if group.is_first:
            yield group
            return
        print_above(lambda text: None)
        try:
            yield group
        finally:
            print_above(None)


def set_threads(group: ReplicaGroup, threads: int | None) -> int | None:
    """Set the number of CPU threads of torch, and return the number of threads of the stream.

    threads  value of --threads. If the value is None under torchrun, each replica gets an equal part of the cores that
             it shares with other replicas on this machine. If the value is None without torchrun, the function returns
             None, and torch keeps its default number.
    """
    if threads is None and group.launched:
        own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        host = platform.node()
        cores = [cores for name, cores in group.gather_json([host, own]) if name == host]
        threads = threads_per_replica(own, cores)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return threads


def check_same_run(group: ReplicaGroup, run: Run, **more: Any) -> None:
    """Raise UserError, on all ranks, if a setting that all ranks must share differs between a rank and rank 0.

    more  settings to compare in addition to the settings of the run
    """
    names = ("epochs", "steps", "log_every", "checkpoint_every", "replicas", "deterministic", "service")
    settings = {**run.identity, **{name: getattr(run.config, name) for name in names}, **more}
    # If the stream seed equals the seed of the run, run.identity does not contain the stream seed.
    settings["stream_seed"] = run.config.seed_of_stream
    settings["split val"] = run.store.split("val").fingerprint if "val" in run.store.splits else None
    settings = as_json({**settings, "devices of a replica": count_of(run.config.devices)})
    theirs = group.broadcast_json(settings)
    with group.together():
        for name, value in settings.items():
            if theirs[name] != value:
                raise UserError(
                    f"{name} is {value} here, and {theirs[name]} on rank 0. Start all replicas with the same command, "
                    "and with copies of the same store."
                )
