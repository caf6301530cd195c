"""Program that reads batches from a service in its own process.

    consumer.py STORE BATCH_SIZE SEED

The class ConsumerProcess starts this program for the tests. Each line of the standard input is a command. `open
NAME@HOST:PORT` opens a training loader, `take N` takes N batches, and `close` closes the loader. After each command the
program prints a JSON value. After `take`, the value is the list of the digests of the batches. After `open` and
`close`, the value is null.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.loader import Batch, TrainLoader, train_loader
from prep.cluster import connected
from tests.pipeline.streaming import take_batches


def digests(batches: Sequence[Batch]) -> list[str]:
    """Return one digest for each batch, over its images and labels."""
    return [sha256(b.images.numpy().tobytes() + b.labels.numpy().tobytes()).hexdigest() for b in batches]


class ConsumerProcess:
    """This program as a subprocess. `send` starts a command, and `answer` waits for the result of the command."""

    def __init__(self, store: Path, batch_size: int, seed: int) -> None:
        program = [sys.executable, "-m", "tests.pipeline.service.consumer", str(store), str(batch_size), str(seed)]
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def do(self, command: str) -> Any:
        self.send(command)
        return self.answer()

    def end(self) -> None:
        """Kill the process, and wait until it has ended."""
        self.process.kill()
        self.process.communicate()


def main() -> None:
    store, batch_size, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    loader: TrainLoader | None = None
    connection = None
    for line in sys.stdin:
        command, _, value = line.strip().partition(" ")
        result = None
        if command == "open":
            if connection is None:  # the program stays connected, because each new connection takes seconds
                connection = connected(value.partition("@")[2])
                connection.__enter__()
            loader = train_loader(store, batch_size, seed=seed, service=value, threads=1)
        elif command == "take":
            assert loader is not None
            result = digests(take_batches(loader, int(value)))
        elif command == "close":
            assert loader is not None
            loader.close()
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
