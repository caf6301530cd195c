"""Starts and stops the processes of the service demo: nodes of a Ray cluster, and `alextrain run` commands."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from prep.cluster import ray_module
from prep.console import UserError, duration_text

NODE_BYTES = 150_000_000  # size of the object store of a node, in shared memory
LIMIT_S = 900.0  # longest time that `wait_until` waits by default


def script(name: str) -> Path:
    """Return the path of a command that is installed beside this Python."""
    return Path(sys.executable).parent / name


def wait_until(reached: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait until `reached()` returns True.

    Raises UserError after `limit_s` seconds. `what` describes the condition in the message of this error.
    """
    deadline = time.monotonic() + limit_s
    while not reached():
        if time.monotonic() > deadline:
            raise UserError(f"{what}: waited for {duration_text(limit_s)}. Run the demo again on an idle machine.")
        time.sleep(0.1)


@contextmanager
def cluster_of_nodes(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Start a Ray cluster with a head node without cores, and `count` nodes with one core each.

    Yields (cluster, list of the `count` nodes). All processes and files of the cluster are removed after the `with`
    block. The cluster has its own temporary folder. If another cluster runs on this machine, Ray's address `auto`
    therefore still means the other cluster. Raises UserError if a node does not start.
    """
    ray_module()
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = os.environ.get("RAY_TMPDIR")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        os.environ["RAY_TMPDIR"] = temporary
        # If Ctrl-C interrupts the start of a node, Ray kills the node only when this program exits, after the `with`
        # block. The files of the node are therefore deleted when this program exits.
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        cluster: Any = Cluster()
        try:
            try:
                cluster.add_node(num_cpus=0, object_store_memory=NODE_BYTES, include_dashboard=False)
                nodes = [cluster.add_node(num_cpus=1, object_store_memory=NODE_BYTES) for _ in range(count)]
            except Exception as error:  # Ray raises a plain Exception if a node does not start
                raise UserError(
                    f"a node of the Ray cluster does not start: {error} Try again on an idle machine."
                ) from None
            finally:
                for number, handler in handlers.items():  # restore the signal handlers, which Ray has replaced
                    signal.signal(number, handler)
            yield cluster, nodes
        finally:
            cluster.shutdown()
            del os.environ["RAY_TMPDIR"]
            if before is not None:
                os.environ["RAY_TMPDIR"] = before


class Trainer:
    """One `alextrain run` command in the background. The output of the command goes to a file beside the run folder."""

    def __init__(self, run_dir: Path, options: Sequence[str]) -> None:
        """Start the command. `options` are those of `alextrain run`, without --run-dir and --log-every."""
        self.run_dir, self._log = run_dir, run_dir.with_name(f"{run_dir.name}.log")
        command = [str(script("alextrain")), "run", "--run-dir", str(run_dir), "--log-every", "1", *options]
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ}  # idle threads leave the cores to other processes
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def step(self) -> int:
        """Number of steps that the run has logged so far."""
        from train.runs.run_dir import read_metrics  # loads NumPy, which --help does not need

        lines = read_metrics(self.run_dir)
        return int(lines[-1]["step"]) if lines else 0

    def ended(self) -> bool:
        """Return True if the command has ended. Raises UserError if the command failed."""
        code = self.process.poll()
        if code:
            lines = self._log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise UserError(f"{self.run_dir.name}: alextrain run ended with exit code {code}: {lines[-1][:500]}")
        return code is not None

    def stop(self) -> None:
        """Stop the command if it is still running."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextmanager
def running(commands: Sequence[tuple[Path, Sequence[str]]]) -> Iterator[list[Trainer]]:
    """Start a Trainer for each pair (run folder, options). The end of the `with` block stops running trainers."""
    with ExitStack() as stack:
        trainers = []
        for run_dir, options in commands:
            trainers.append(Trainer(run_dir, options))
            stack.callback(trainers[-1].stop)
        yield trainers


def wait_for_trainers(trainers: Sequence[Trainer]) -> None:
    """Wait until all trainers have ended. Raises UserError as soon as one trainer fails."""
    wait_until(lambda: not [trainer for trainer in trainers if not trainer.ended()], "the end of the trainers")
