"""Tests of the live display of a run on a terminal."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.service.status import ServiceStatus
from prep.console import Progress
from tests.helpers.metrics import RUN_LENGTH, training_line
from tests.train.monitor.conftest import ObservedRun
from tests.train.monitor.terminal import run_in_terminal
from train.evaluation.evaluate import EvalResult
from train.monitor.console_view import ConsoleView
from train.monitor.live_view import LiveView, sparkline
from train.monitor.metrics_log import MetricsLog


def test_a_terminal_shows_a_run_and_its_cursor_is_restored(observed_run: ObservedRun) -> None:
    output = observed_run.terminal_output
    assert "step" in output and "of 9" in output and "images/s" in output
    assert output.count("centre view") == 3
    cursor_hidden, first_validation = output.rindex("\x1b[?25l"), output.index("centre view")
    # The cursor is shown again before the line of the first validation, not only at the end of the run.
    assert cursor_hidden < output.index("\x1b[?25h") < first_validation
    assert "epoch   0.33" not in output  # with the live view, no plain lines are printed


def test_the_live_view_shows_curves_rates_memory_and_the_time_left() -> None:
    console = Console(force_terminal=True, record=True, width=100, file=io.StringIO())
    live = LiveView(console)
    live.begin(RUN_LENGTH, [training_line(step) for step in range(1, 9)], 8)
    live.follow(lambda: 2)
    live.train(training_line(10, loss=0.25, gpu_memory_mb=[2500.0, 700.0]))
    live.validation({"kind": "val", "epoch": 1, "step": 10, "images": 12, **vars(EvalResult(0.5, 0.25, 2.0, 12))})
    live.validation({"kind": "val", "epoch": 2, "step": 10, "images": 12, **vars(EvalResult(0.625, 0.25, 2.0, 12))})
    live.end()
    console.export_text()
    console.print(live)
    text = console.export_text()
    assert "12 of 100" in text and "1.20" in text and "0.250" in text
    assert "44 s left" in text  # 88 steps of 8 images take 44 s at 16 images a second
    assert "lr 0.01   16.0 images/s   waits for stream 10.0%" in text
    assert "memory 1.2 GB, GPU 2.5 GB, GPU 700.0 MB" in text
    assert "validation at epoch 2: top-1 error 62.5%, top-5 error 25.0%; best top-1 error 50.0% at epoch 1" in text
    assert sparkline([3.0 / step for step in range(1, 9)] + [0.25]) in text
    with live.progress("validation", 500, "images") as report:
        report.advance(40)
        console.print(live)
    assert "validation: 40 of 500 images" in console.export_text()


def test_the_live_view_shows_the_service_as_it_is_now() -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    live = LiveView(console)
    statuses = iter([None, ServiceStatus("imagenet", 3, 1, "connected"), ServiceStatus("imagenet", 0, 0, "local")])
    live.follow_service(lambda: next(statuses))
    texts = []
    for _ in range(3):
        console.print(live)
        texts.append(console.export_text())
    assert "service" not in texts[0]
    assert "service imagenet: 3 workers, 1 batch queued\n" in texts[1]
    assert "service imagenet lost, this machine decodes\n" in texts[2]


def test_a_sparkline_is_scaled_from_its_lowest_to_its_highest_mean() -> None:
    assert sparkline([10, 20, 30, 40, 50, 60, 70, 80]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▁▁" and sparkline([]) == ""
    assert sparkline([0, 4, 8, 8, 1, 1], 3) == "▂█▁"


def test_a_validation_that_ends_while_the_display_is_drawn_causes_no_error() -> None:
    class EndsAfterFirstRead(LiveView):
        reads = 0

        @property
        def _validation(self) -> tuple[str, Progress] | None:
            self.reads += 1
            return ("validation", Progress(500, "images")) if self.reads == 1 else None

        @_validation.setter
        def _validation(self, value: object) -> None:
            pass

    console = Console(record=True, width=100, file=io.StringIO())
    console.print(EndsAfterFirstRead(console))
    assert "validation: 0 of 500 images" in console.export_text()


def test_a_network_of_five_classes_has_no_top_5_error_on_a_terminal_and_in_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    validation = {"kind": "val", "epoch": 1, "step": 10, "images": 12, **vars(EvalResult(0.5, 0.0, 2.0, 12))}
    for classes, parts in ((5, ["top-1 error  50.0%"]), (6, ["top-1 error  50.0%", "top-5 error   0.0%"])):
        length = RUN_LENGTH._replace(classes=classes)
        console = Console(force_terminal=True, record=True, width=100, file=io.StringIO())
        live, lines = LiveView(console), ConsoleView()
        for view in (live, lines):
            view.begin(length, [training_line(1)], 1)
            view.validation(validation)
            view.end()
        console.print(live)
        printed = capsys.readouterr().err
        assert "  ".join(["loss 2.000", *parts, "of 12 images"]) in printed
        for text in (console.export_text(), printed):
            assert ("top-5" in text) == (classes == 6)


_STOPPED_RUN = """
import time
import click
from prep.console import Group, say
from tests.helpers.metrics import RUN_LENGTH, training_line
from train.monitor.live_view import LiveView
from train.trainer.stop_requests import stop_requests

@click.group(cls=Group, resumable=("run",))
def main(): pass

@main.command()
def run():
    say("before")
    view = LiveView()
    view.begin(RUN_LENGTH, [training_line(1)], 1)
    try:
        with stop_requests() as stop:
            view.warn("a warning")
            print("ready", flush=True)
            while not stop.requested:
                time.sleep(0.02)
            time.sleep(0.6)  # the step ends; the display is drawn twice a second
            raise stop.requested
    finally:
        view.end()

main()
"""


@pytest.mark.parametrize("columns", [80, 40])
def test_ctrl_c_leaves_a_clean_screen_with_its_messages(columns: int) -> None:
    """When Ctrl-C is typed, the terminal itself prints ^C at the cursor, which is within the live display."""
    code, screen = run_in_terminal([sys.executable, "-c", _STOPPED_RUN, "run"], columns, keys={"ready": b"\x03"})
    assert code == 130
    lines = [
        *("before", "a warning", "ready"),
        "Stopping after this step, with a checkpoint.",
        "Interrupted. Run the same command again to continue from here.",
    ]
    assert screen == [row for line in lines for row in rows_of(line, columns)]


def rows_of(line: str, columns: int) -> list[str]:
    """Return the rows that a terminal of `columns` columns shows for a line."""
    return [line[first : first + columns].rstrip() for first in range(0, len(line), columns)]


def test_a_run_continues_after_its_terminal_was_closed(tmp_path: Path) -> None:
    class ClosedTerminal(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    live = LiveView(Console(file=ClosedTerminal()))
    live.begin = live.end = lambda *args: live._console.print("…")  # type: ignore[method-assign]
    with pytest.raises(OSError, match="Input"):
        live.end()
    result = EvalResult(0.5, 0.25, 2.0, 12)
    live.begin = lambda *args: None  # type: ignore[method-assign]
    with MetricsLog(tmp_path, RUN_LENGTH, 0, False, live) as log:
        log.validation(1, 10, result)
    assert json.loads((tmp_path / "status.json").read_bytes())["state"] == "finished"
