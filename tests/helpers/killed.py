"""One run killed again and again, each time given again; a program of tests/train/runs/test_survival.py.

killed.py STORE RUN_DIR SEED HOW. Each attempt is a fork of this process, which has imported everything and begun
nothing. An attempt into the folder `whole` beside RUN_DIR is left alone; then come ten that are to be killed, and one
that is left alone again. HOW: `at` kills itself with SIGKILL just before one of its doings: a file opened to write,
signed, synced, renamed, linked or removed, a step done. Attempt k, of 0 to 9, dies some doings after the run of nine
steps has made k of them: all ten die, for a run that is done has doings too when it is given again. `when` is killed
by its parent after a random time, and may be done before; the first one early, so that it is not. Says a JSON object:
kills, and at what. Wants OMP_NUM_THREADS=1: threads do not survive a fork.
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
from tests.train.trainer.test_loop import config
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.loop import fit
from train.trainer.step import TrainingStep

STEPS = 9  # of the run
KILLS = STEPS + 1

armed_at: int | None = None  # the step from which on doings are counted
left = 0
steps = 0
says = -1  # a pipe


def doing(what: str) -> None:
    global left
    if armed_at is None or steps < armed_at:
        return
    if left == 0:
        os.write(says, what.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1


def watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[1], str) and args[1].strip("bt") in ("w", "a", "w+"):
        doing(f"open {args[1]}")
    elif event in ("os.rename", "os.remove", "os.link"):
        doing(event)


def told(name: str, real: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        doing(name)
        return real(*args, **options)

    return call


def stepped(self: TrainingStep, *batch: torch.Tensor, real: Any = TrainingStep.__call__) -> Any:
    global steps
    done = real(self, *batch)
    steps += 1
    doing("step")
    return done


def attempt(store: Path, run_dir: Path, how: str, chance: random.Random, number: int | None, within_s: float) -> str:
    """How a fork ended: what it was killed at, or nothing where it was done. `number` None: it is left alone."""
    global armed_at, left, steps, says
    reads, says = os.pipe()
    doings, delay_s = chance.randrange(8), chance.uniform(0, within_s)
    child = os.fork()
    if child == 0:
        if number is not None and how == "at":
            kept = checkpoint.checkpoint_paths(run_dir)
            armed_at, left, steps = number, doings, int(kept[-1].stem[-8:]) if kept else 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(120)  # no orphan, should it hang
        fit(Run.open(config(store, run_dir)))
        os._exit(0)
    os.close(says)
    if number is not None and how == "when":
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reads) as pipe:
        at = pipe.read() or "any time"
    if code == -signal.SIGKILL:
        return at
    assert code == 0, code
    return ""


def main(store: Path, run_dir: Path, seed: int, how: str) -> None:
    chance = random.Random(seed)
    started = time.monotonic()
    assert attempt(store, run_dir.with_name("whole"), how, chance, None, 0) == ""
    run_s = time.monotonic() - started
    assert int(checkpoint.checkpoint_paths(run_dir.with_name("whole"))[-1].stem[-8:]) == STEPS
    ends = [attempt(store, run_dir, how, chance, number, run_s if number else run_s / 4) for number in range(KILLS)]
    assert attempt(store, run_dir, how, chance, None, 0) == ""
    died = Counter(filter(None, ends))
    sys.stdout.write(json.dumps({"kills": died.total(), "at": dict(died)}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the libraries that were loaded have nothing to clean up


if __name__ == "__main__":
    pipeline.placement.dali()
    os.fsync, checkpoint._append_digest = told("fsync", os.fsync), told("sign", checkpoint._append_digest)
    train.trainer.loop.TrainingStep.__call__ = stepped
    sys.addaudithook(watch)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
