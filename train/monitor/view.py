"""Which view of a run standard error can show."""

from __future__ import annotations

import sys

from train.monitor.console_view import ConsoleView, QuietView


def choose_view(quiet: bool = False) -> ConsoleView:
    """The view that standard error can show: one that moves on a terminal, lines elsewhere, or a quiet one."""
    if quiet:
        return QuietView()
    if not sys.stderr.isatty():
        return ConsoleView()
    from train.monitor.live_view import LiveView

    return LiveView()
