"""Tests of the plain console lines of a run."""

from __future__ import annotations

import pytest

from pipeline.service.status import ServiceStatus
from tests.helpers.metrics import training_line
from train.monitor.console_view import ConsoleView


@pytest.mark.parametrize(
    ("status", "end"),
    [
        (None, "stream waits 20.0%"),
        (ServiceStatus("imagenet", 1, 1200, "connected"), "  service imagenet: 1 worker, 1,200 batches queued"),
        (ServiceStatus("imagenet", 0, 0, "local"), "  service imagenet lost, this machine decodes"),
    ],
)
def test_a_training_line_ends_with_the_state_of_the_service(
    capsys: pytest.CaptureFixture[str], status: ServiceStatus | None, end: str
) -> None:
    view = ConsoleView()
    view.follow_service(lambda: status)
    view.train(training_line(10))
    line = capsys.readouterr().err
    assert line.startswith("epoch   1.00  step 10  loss 0.300") and line.endswith(f"{end}\n")
