"""Program that kills and resumes a training up to ten times; tests/train/trainer/test_kill_and_resume.py runs it.

    kill_and_resume.py STORE RUN_DIR SEED WHEN [MEMBERS]

With MEMBERS, the program trains an ensemble of MEMBERS networks, and RUN_DIR is the folder of the ensemble. Without
MEMBERS, the program trains a single run.

Each attempt is a fork of this process, which has imported all modules and started no threads. The first attempt
trains in the folder `uninterrupted` next to RUN_DIR and is not killed. The next ten attempts train in RUN_DIR and are
killed as WHEN says. The last attempt finishes the run in RUN_DIR and is not killed. WHEN is one of

    operation  The attempt kills itself with SIGKILL just before an operation. Operations are: opening a file for
               writing, computing a digest, fsync, rename, link, removal of a file, and the end of a training step.
               Attempt k (0 to 9) is killed 0 to 7 operations after the run has made k of its nine steps. All ten
               attempts are killed, because a finished run that is started again also performs these operations.
    time       The parent process kills the attempt after a random time. An attempt that has finished before this time
               is not killed. Attempt 0 is killed so early that it cannot finish.

The program prints a JSON object: "kills" is the number of kills, and "at" maps each operation to the number of kills
before this operation. The program needs OMP_NUM_THREADS=1, because threads do not survive a fork.
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

import pipeline.device
from tests.helpers.small_training import load_modules_of_a_training, small_config
from train.experiments.ensemble import member_configs, train_members
from train.monitor.console_view import ConsoleView
from train.runs import checkpoint
from train.runs.ensemble_dir import Ensemble, member_dirs
from train.runs.run import Run
from train.trainer.loop import fit
from train.trainer.step import TrainingStep

STEPS = 9  # steps of the run, or of each member of the ensemble
KILLS = STEPS + 1

members: int | None = None  # number of members of the ensemble; None: a single run

# The following variables are the state of an attempt that kills itself.
# Step of the run after which operations are counted; None: operations are never counted.
first_counted_step: int | None = None
operations_left = 0  # number of operations left before the kill
steps_done = 0  # number of steps that the run has made so far, in all attempts
report_fd = -1  # pipe to the parent process; just before the kill, the attempt writes the operation to the pipe


def before_operation(operation: str) -> None:
    """Count an operation. If `operations_left` is 0, kill this process before the operation."""
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
    """Return a function that calls `real` and counts each call as an operation."""

    def call(*args: Any, **options: Any) -> Any:
        before_operation(operation)
        return real(*args, **options)

    return call


def counted_step(self: TrainingStep, *batch: torch.Tensor, real: Any = TrainingStep.__call__) -> Any:
    """Make a training step, and count it. This function replaces TrainingStep.__call__."""
    global steps_done
    result = real(self, *batch)
    steps_done += 1
    before_operation("step")
    return result


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint, from its file name; for an ensemble, the sum over its members."""
    folders = member_dirs(run_dir, members) if members else [run_dir]
    paths = [paths[-1] for folder in folders if (paths := checkpoint.checkpoint_paths(folder))]
    return sum(int(path.stem[-8:]) for path in paths)


def train_to_end(store: Path, run_dir: Path) -> None:
    """Train the run, or the ensemble, to its end."""
    config = small_config(store, run_dir)
    if members is None:
        fit(Run.open(config))
    else:
        runs = [Run.open(member) for member in member_configs(config, members)]
        train_members(run_dir, Ensemble(members, config.seed, config.seed_of_stream), runs, ConsoleView)


def attempt(store: Path, run_dir: Path, when: str, rng: random.Random, number: int | None, within_s: float) -> str:
    """Train in a forked process.

    If the forked process killed itself, returns the operation before which it did so. Returns "any time" if the parent
    killed the process, and "" if the process was not killed.

    number    number of the attempt, 0 to 9; None: the attempt is not killed
    within_s  longest time from the start to a kill by the parent, in seconds, if `when` is "time"
    """
    global first_counted_step, operations_left, steps_done, report_fd
    parent_fd, report_fd = os.pipe()
    operations, delay_s = rng.randrange(8), rng.uniform(0, within_s)
    child = os.fork()
    if child == 0:
        if number is not None and when == "operation":
            first_counted_step, operations_left = number * (members or 1), operations
            steps_done = newest_step(run_dir)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(120)  # ends a process that hangs
        train_to_end(store, run_dir)
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
    assert newest_step(run_dir.with_name("uninterrupted")) == STEPS * (members or 1)
    ends = [attempt(store, run_dir, when, rng, number, run_s if number else run_s / 4) for number in range(KILLS)]
    assert attempt(store, run_dir, when, rng, None, 0) == ""
    kills = Counter(filter(None, ends))
    sys.stdout.write(json.dumps({"kills": kills.total(), "at": dict(kills)}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # skips the exit handlers of libraries, which are not needed here


if __name__ == "__main__":
    pipeline.device.dali()
    load_modules_of_a_training()
    os.fsync, checkpoint.append_digest = counted("fsync", os.fsync), counted("digest", checkpoint.append_digest)
    TrainingStep.__call__ = counted_step
    sys.addaudithook(audit)
    members = int(sys.argv[5]) if sys.argv[5:] else None
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
