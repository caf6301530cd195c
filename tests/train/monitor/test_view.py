"""Tests of the choice between the live view and plain lines."""

from __future__ import annotations

import sys

import pytest

from train.monitor.console_view import ConsoleView, QuietView
from train.monitor.live_view import LiveView
from train.monitor.view import choose_view


def test_a_terminal_gets_the_live_view_and_a_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(choose_view()) is ConsoleView and type(choose_view(quiet=True)) is QuietView
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert type(choose_view()) is LiveView and type(choose_view(quiet=True)) is QuietView
