"""Choice of the console view: live display, plain lines, or quiet."""

from __future__ import annotations

import sys

from train.monitor.console_view import ConsoleView, QuietView


def choose_view(quiet: bool = False) -> ConsoleView:
    """Choose a quiet view if `quiet`, a live display if standard error is a terminal, otherwise plain lines."""
    if quiet:
        return QuietView()
    if not sys.stderr.isatty():
        return ConsoleView()
    from train.monitor.live_view import LiveView

    return LiveView()
