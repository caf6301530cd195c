"""`alextrain` with a small network under the name alexnet. The environment variable FAULT can request a fault.

    torchrun --nproc-per-node 2 small_alextrain.py run --store STORE --run-dir RUN_DIR …

FAULT is one of

`kill SEED`
    In each of the first ten attempts of torchrun, one rank kills itself with SIGKILL just before an operation, and
    appends a line to the file RUN_DIR.kills. SEED and the number k of the attempt, counted from 0, determine the rank
    and the operation. There are three kinds of operations: operations of rank 0 on files (opening a file for writing,
    computing a digest, fsync, rename, link, removal of a file), exchanges between ranks, and ends of training steps.
    Operations are counted after the run has made k steps. All ten attempts are killed, because a finished run that is
    started again also makes exchanges and works on files.
`ACTION RANK STEP`
    After step STEP of the run, rank RANK performs an action, once. If RANK is `any`, the rank that first completes the
    step performs the action. ACTION is one of: SIGSTOP, SIGTERM (send this signal to the rank itself), stop-all (send
    SIGTERM to torchrun, and wait half a second), lose-node (kill torchrun and the rank with SIGKILL), wait (until the
    file RUN_DIR.go exists), error (raise an error that is not a UserError), full-disk (limit the size of files to
    60,000 bytes), nan (set a parameter to NaN).
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tests.helpers.small_training import SMALL_ALEXNET
from train.cli import main
from train.config.architecture import ARCHITECTURES
from train.replicas.link import Link
from train.runs import checkpoint
from train.trainer.step import TrainingStep

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1]) if "--run-dir" in sys.argv else Path()
torchrun_pid = int(os.environ["TORCHRUN_PID"])
fault, *numbers = os.environ.get("FAULT", "none").split()
steps_done = 0  # number of steps that the run has made
kind = ""  # kind of the operation before which this process is killed: file, exchange or step; "": it is not killed
operations_left = 0  # number of operations of this kind left before the kill


def before_operation(kind_of_operation: str, name: str) -> None:
    """Count an operation. Kills this process before the chosen operation."""
    global kind, operations_left
    if kind != kind_of_operation or steps_done < attempt:
        return
    if operations_left == 0:
        kind = ""  # writing the line does not count as an operation
        with open(f"{run_dir}.kills", "a") as file:
            file.write(f"{attempt} {rank} {name}\n")
        os.kill(os.getpid(), signal.SIGKILL)
    operations_left -= 1


def audit(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook (sys.addaudithook) that counts operations on files."""
    if event == "open" and isinstance(args[1], str) and args[1].strip("bt") in ("w", "a", "w+"):
        before_operation("file", "open")
    elif event in ("os.rename", "os.remove", "os.link"):
        before_operation("file", event)


def counted(name: str, real: Any) -> Any:
    """Return a function that calls `real` and counts each call as an operation on files."""

    def call(*args: Any, **options: Any) -> Any:
        before_operation("file", name)
        return real(*args, **options)

    return call


@contextmanager
def counted_exchange(self: Link, real: Any = Link.exchange) -> Iterator[None]:
    """Make an exchange, and count it as an operation. This function replaces Link.exchange."""
    before_operation("exchange", "exchange")
    with real(self):
        yield


def step_with_fault(self: TrainingStep, *batch: torch.Tensor, real: Any = TrainingStep.__call__) -> Any:
    """Make and count a step, and perform the action that FAULT requests. Replaces TrainingStep.__call__."""
    global steps_done
    result = real(self, *batch)
    steps_done += 1
    before_operation("step", "step")
    if numbers[1:] == [str(steps_done)] and numbers[0] in ("any", str(rank)):
        with suppress(FileExistsError):
            open(f"{run_dir}.{fault}", "x").close()
            act(self)
    return result


def act(step: TrainingStep) -> None:
    """Perform the action that FAULT requests."""
    if fault in ("SIGSTOP", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault == "stop-all":
        os.kill(torchrun_pid, signal.SIGTERM)
        time.sleep(0.5)
    elif fault == "lose-node":
        os.kill(torchrun_pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "wait":
        while not os.path.exists(f"{run_dir}.go"):
            time.sleep(0.01)
    elif fault == "error":
        raise RuntimeError("a fault of the program")
    elif fault == "full-disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    elif fault == "nan":
        with torch.no_grad():
            next(step.network.parameters()).fill_(torch.nan)


def prepare_kill() -> None:
    """If this rank is killed in this attempt, choose the operation before which it is killed."""
    global kind, operations_left
    generator = random.Random(f"{numbers[0]} {attempt}")
    victim = generator.randrange(int(os.environ["WORLD_SIZE"]))
    kinds = ["exchange"] + ["file"] * (victim == 0) + ["step"] * (attempt < 8)  # the run has 9 steps
    exchanges = {8: 8, 9: 4}.get(attempt, 20)  # in the last two attempts, only few exchanges are left
    chosen, operations = generator.choice(kinds), {"file": 8, "exchange": exchanges, "step": 1}
    if victim != rank or attempt >= 10:
        return
    kind, operations_left = chosen, generator.randrange(operations[chosen])
    os.fsync, checkpoint.append_digest = counted("fsync", os.fsync), counted("digest", checkpoint.append_digest)
    Link.exchange = counted_exchange  # type: ignore[method-assign]
    sys.addaudithook(audit)


if __name__ == "__main__":
    ARCHITECTURES["alexnet"] = SMALL_ALEXNET
    if paths := checkpoint.checkpoint_paths(run_dir):
        steps_done = int(paths[-1].stem[-8:])
    TrainingStep.__call__ = step_with_fault  # type: ignore[assignment, method-assign]
    if fault == "kill":
        prepare_kill()
    main(prog_name="alextrain")
