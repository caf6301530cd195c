"""Kills a training ten times and starts it again each time; tests/train/trainer/test_kill_and_resume.py runs it.

    kill_and_resume.py STORE RUN_DIR SEED WHEN

Each attempt is a fork of this process, which has imported everything and started nothing. The first attempt trains in
the folder `uninterrupted` beside RUN_DIR and is not killed. Then follow ten attempts in RUN_DIR that are to be killed,
and one that is not. WHEN is one of

    operation  The attempt kills itself with SIGKILL just before an operation: a file opened for writing, digested,
               synced, renamed, linked or removed, or the return of a training step. Attempt k, of 0 to 9, dies 0 to 7
               operations after its run of nine steps has made k steps. All ten die: a finished run that is started
               again has such operations, too.
    time       The parent kills the attempt after a random time. An attempt may finish before that. The first one is
               killed early, so that it does not.

Prints a JSON object: "kills", their number, and "at", how many at each operation. Needs OMP_NUM_THREADS=1: threads do
not survive a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import pipeline.placement
import train.trainer.loop
from tests.helpers.small_training import small_config
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.loop import fit
from train.trainer.step import TrainingStep

STEPS = 9  # of the run
KILLS = STEPS + 1

# Of an attempt that kills itself.
first_counted_step: int | None = None  # operations are counted after this many steps of the run; None: never
operations_left = 0  # before the kill
steps_done = 0  # of the run, in all attempts
report_fd = -1  # a pipe to the parent, into which the last operation is written


def before_operation(operation: str) -> None:
    """Count an operation, and kill this process if it is the one chosen."""
    global operations_left
    if first_counted_step is None or steps_done < first_counted_step:
        return
    if operations_left == 0:
        os.write(report_fd, operation.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    operations_left -= 1


def audit(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook (sys.addaudithook) that counts operations on files."""
    if event == "open" and isinstance(args[1], str) and args[1].strip("bt") in ("w", "a", "w+"):
        before_operation(f"open {args[1]}")
    elif event in ("os.rename", "os.remove", "os.link"):
        before_operation(event)


def counted(operation: str, real: Any) -> Any:
    """The function `real`, whose calls count as an operation."""

    def call(*args: Any, **options: Any) -> Any:
        before_operation(operation)
        return real(*args, **options)

    return call


def counted_step(self: TrainingStep, *batch: torch.Tensor, real: Any = TrainingStep.__call__) -> Any:
    """TrainingStep.__call__, which also counts the steps of the run."""
    global steps_done
    result = real(self, *batch)
    steps_done += 1
    before_operation("step")
    return result


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint by its name; 0 without one."""
    paths = checkpoint.checkpoint_paths(run_dir)
    return int(paths[-1].stem[-8:]) if paths else 0


def attempt(store: Path, run_dir: Path, when: str, rng: random.Random, number: int | None, within_s: float) -> str:
    """Train in a fork; returns the operation at which it was killed, "any time", or "" if it finished.

    number    0 to 9; None: the attempt is not killed
    within_s  seconds within which the parent kills it, for `when` = "time"
    """
    global first_counted_step, operations_left, steps_done, report_fd
    parent_fd, report_fd = os.pipe()
    operations, delay_s = rng.randrange(8), rng.uniform(0, within_s)
    child = os.fork()
    if child == 0:
        if number is not None and when == "operation":
            first_counted_step, operations_left, steps_done = number, operations, newest_step(run_dir)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(120)  # ends a fork that hangs
        fit(Run.open(small_config(store, run_dir)))
        os._exit(0)
    os.close(report_fd)
    if number is not None and when == "time":
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(parent_fd) as pipe:
        operation = pipe.read() or "any time"
    if code == -signal.SIGKILL:
        return operation
    assert code == 0, code
    return ""


def main(store: Path, run_dir: Path, seed: int, when: str) -> None:
    rng = random.Random(seed)
    started = time.monotonic()
    assert attempt(store, run_dir.with_name("uninterrupted"), when, rng, None, 0) == ""
    run_s = time.monotonic() - started
    assert newest_step(run_dir.with_name("uninterrupted")) == STEPS
    ends = [attempt(store, run_dir, when, rng, number, run_s if number else run_s / 4) for number in range(KILLS)]
    assert attempt(store, run_dir, when, rng, None, 0) == ""
    kills = Counter(filter(None, ends))
    sys.stdout.write(json.dumps({"kills": kills.total(), "at": dict(kills)}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the loaded libraries have nothing to clean up


if __name__ == "__main__":
    pipeline.placement.dali()
    os.fsync, checkpoint._append_digest = counted("fsync", os.fsync), counted("digest", checkpoint._append_digest)
    train.trainer.loop.TrainingStep.__call__ = counted_step
    sys.addaudithook(audit)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
