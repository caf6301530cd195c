"""Which view of a run standard error can show."""

from __future__ import annotations

import sys

from train.monitor.console_view import Lines, Quiet


def view_for(quiet: bool = False) -> Lines:
    """The view that standard error can show: one that moves on a terminal, lines elsewhere, or a quiet one."""
    if quiet:
        return Quiet()
    if not sys.stderr.isatty():
        return Lines()
    from train.monitor.live_view import Live

    return Live()
