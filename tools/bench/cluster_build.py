"""Contestants of `python -m tools.bench.build --cluster`: builds with local processes, and with `--cluster local`.

Both rates come from the JSON output of alexprep. A rate covers the time from the end of listing the inputs until the
manifest is written. The remaining time of the command is measured separately. With a cluster, the remaining time
includes the start of Ray.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from statistics import median

from tools.bench.harness import Contestant, LineProcess


class ClusterRace:
    """Makes the two contestants: a build on a cluster and a build with local processes.

    command       command line of `alexprep build-lmdb` without --cluster
    make_process  function that creates a process that runs a command line
    reset         function that is called before each timed run
    """

    def __init__(
        self,
        command: Sequence[str],
        make_process: Callable[[str, Sequence[str]], LineProcess],
        reset: Callable[[], None],
    ) -> None:
        self._command, self._make_process, self._reset = command, make_process, reset
        self._start_s: dict[str, list[float]] = {}

    def contestants(self) -> list[Contestant]:
        """Return the two contestants: a build on a cluster and, as its upper bound, a build with local processes."""
        pool = "local processes"
        return [self._contestant("--cluster local", pool, "--cluster", "local"), self._contestant(pool, None)]

    def _contestant(self, name: str, bound: str | None, *words: str) -> Contestant:
        process = self._make_process(name, (*self._command, *words))

        def turn() -> float:
            started = time.perf_counter()
            process.start()
            result = json.loads(process.read_line())
            process.wait()
            self._start_s.setdefault(name, []).append(time.perf_counter() - started - result["seconds"])
            return float(result["images_per_s"])

        return Contestant(name, turn, bound, self._reset)

    def start_s(self) -> dict[str, float]:
        """Return {contestant: time in s for starting, listing and ending, as the median over all timed runs}.

        The rate of a contestant does not include this time.
        """
        return {name: round(median(times), 1) for name, times in self._start_s.items()}
