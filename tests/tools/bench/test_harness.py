"""Tests of the harness of the benchmarks: rounds, ratios, tables, and subprocesses that read commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prep.console import UserError
from tools.bench.harness import Contestant, LineProcess, race, speedup_lines, speedups, table


def contestant(name: str, rates: list[float], turns: list[str], **fields: str) -> Contestant:
    """Return a contestant with the given rates, one for each round. The first round is not counted."""
    remaining = iter(rates)

    def rate() -> float:
        turns.append(name)
        return next(remaining)

    return Contestant(name, rate, prepare=lambda: turns.append(f"prepare {name}"), **fields)


def test_contestants_take_turns_and_ratios_are_medians_of_the_rounds() -> None:
    turns: list[str] = []
    ours = contestant("ours", [1.0, 100.0, 300.0, 200.0], turns, bound="bound")
    peer = contestant("peer", [1.0, 50.0, 100.0, 200.0], turns)
    bound = contestant("bound", [1.0, 200.0, 400.0, 400.0], turns, ours="peer")
    rows = race([ours, peer, bound], 3, pause_s=0.0)
    assert turns == [
        f"{verb}{name}" for _ in range(4) for name in ("ours", "peer", "bound") for verb in ("prepare ", "")
    ]
    assert [(row.images_per_s, row.least, row.most) for row in rows] == [
        (200.0, 100.0, 300.0),
        (100.0, 50.0, 200.0),
        (400.0, 200.0, 400.0),
    ]
    # The ratio 0.5 is the median of 1/2, 1/3 and 1. The ratio 4 is the median of 4, 4 and 2.
    assert [row.of_ours for row in rows] == [1.0, 0.5, 4.0]
    assert [row.of_bound for row in rows] == [0.5, None, None]  # the median of 1/2, 3/4 and 1/2
    assert speedups(rows) == {"peer": 2.0, "bound": 0.25}
    assert speedup_lines(rows) == "ours / peer: 2.00\npeer / bound: 0.25"
    assert table(rows).splitlines()[2].split() == ["peer", "100", "50.0", "..", "200", "0.50"]


def test_a_process_is_controlled_by_lines(tmp_path: Path) -> None:
    script = "import sys\nprint('ready', flush=True)\nfor line in sys.stdin: print('did ' + line, end='', flush=True)"
    process = LineProcess("echo", [sys.executable, "-c", script], tmp_path / "errors.txt")
    process.start()
    assert process.read_line() == "ready"
    process.send("go 1")
    assert process.read_line() == "did go 1"
    process.wait()  # wait() closes the standard input of the process


def test_a_process_that_fails_is_reported_with_its_last_error(tmp_path: Path) -> None:
    script = "raise ValueError('two batches are equal')"
    process = LineProcess("peer", [sys.executable, "-c", script], tmp_path / "errors.txt")
    process.start()
    with pytest.raises(UserError, match=r"^peer: exit code 1\. ValueError: two batches are equal$"):
        process.read_line()
    process.stop()
