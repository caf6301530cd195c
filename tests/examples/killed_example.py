"""Program for torchrun: runs an example. Rank 1 kills itself in step KILL_AT, counted from 0.

    torchrun … -m tests.examples.killed_example EXAMPLE STORE OUTPUT …

KILL_AT and ATTEMPT are environment variables. Each rank writes the labels of each step into the file
OUTPUT.ATTEMPT.RANK.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from typing import Any

from torch import Tensor, nn

rank, attempt = os.environ["RANK"], os.environ["ATTEMPT"]
real: Any = nn.functional.cross_entropy
steps = 0


def cross_entropy(logits: Tensor, labels: Tensor) -> Any:
    global steps
    if (rank, str(steps)) == ("1", os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    steps += 1
    with open(f"{sys.argv[3]}.{attempt}.{rank}", "a") as file:
        file.write(json.dumps(labels.tolist()) + "\n")
    return real(logits, labels)


if __name__ == "__main__":
    nn.functional.cross_entropy = cross_entropy
    import_module(f"examples.{sys.argv[1]}").main(sys.argv[2:])
