"""Console output of an ensemble. The log lines of all members are shown as one line with their mean values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.service.status import ServiceStatus
from prep.console import Progress
from train.monitor.console_view import MEMBER_LOSSES, MEMBER_TOP1_ERRORS, ConsoleView, Line, RunLength

_AVERAGED = ("loss", "top1_error", "top5_error")


class EnsembleView:
    """Collects the log lines of the members, and shows one line for all members in `view`.

    Members can be at different steps. The line of a step is shown as soon as every member still in training has
    logged this step. The shown line has the mean of the losses and errors, and the loss or error of each member.
    """

    def __init__(self, view: ConsoleView, names: Sequence[str]) -> None:
        """`view` shows the mean lines. `names` are the names of the members."""
        self.view, self._names = view, list(names)
        self._members = {name: _MemberView(self, name) for name in names}
        self._lengths: list[RunLength] = []
        self._waiting: dict[tuple[int, str], dict[str, Line]] = {}  # log lines by (step, kind), then by member
        self._is_shown = False

    def member(self, name: str) -> ConsoleView:
        """Return the view of a member."""
        return self._members[name]

    def begin(self, length: RunLength) -> None:
        """Begin the output as soon as all members have begun their output."""
        self._lengths.append(length)
        if len(self._lengths) < len(self._names):
            return
        earlier: dict[tuple[int, str], dict[str, Line]] = {}
        for name, member in self._members.items():
            for line in member.earlier_lines:
                earlier.setdefault((line["step"], line["kind"]), {})[name] = line
        lines = [_mean_line(earlier[key]) for key in sorted(earlier)]
        self._is_shown = True
        self.view.begin(length, lines, min(member.newest[0] for member in self._members.values()))

    def add(self, name: str, line: Line) -> None:
        """Keep a log line of a member, and show it if all members have now logged its step."""
        self._waiting.setdefault((line["step"], line["kind"]), {})[name] = line
        self.show_complete()

    def show_complete(self) -> None:
        """Show the line of each step that every member still in training has logged."""
        members = [member for member in self._members.values() if not member.has_ended]
        for key in sorted(self._waiting):
            if all(member.newest >= key for member in members):
                line = _mean_line(self._waiting.pop(key))
                (self.view.train if key[1] == "train" else self.view.validation)(line)

    def end(self) -> None:
        """Show the remaining lines. End the output when all members have ended."""
        self.show_complete()
        if self._is_shown and all(member.has_ended for member in self._members.values()):
            self._is_shown = False
            self.view.end()


class _MemberView(ConsoleView):
    """The view of one member. Passes all calls to the EnsembleView."""

    def __init__(self, ensemble: EnsembleView, name: str) -> None:
        super().__init__()
        self._ensemble, self._name = ensemble, name
        self.earlier_lines: Sequence[Line] = ()
        self.newest = 0, "train"  # (step, kind) of the newest log line
        self.has_ended = False

    def note(self, text: str) -> None:
        self._ensemble.view.note(text)

    def warn(self, text: str) -> None:
        self._ensemble.view.warn(f"{self._name}: {text}")

    def begin(self, length: RunLength, lines: Sequence[Line], step: int) -> None:
        self.earlier_lines = lines
        self.newest = max([(step, "train"), *((line["step"], line["kind"]) for line in lines[-1:])])
        self._ensemble.begin(length)

    def follow(self, steps_since_line: Callable[[], int]) -> None:
        self._ensemble.view.follow(steps_since_line)

    def follow_service(self, status: Callable[[], ServiceStatus | None]) -> None:
        self._ensemble.view.follow_service(status)

    def train(self, line: Line) -> None:
        self._add(line)

    def validation(self, line: Line) -> None:
        self._add(line)

    def _add(self, line: Line) -> None:
        self.newest = line["step"], line["kind"]
        self._ensemble.add(self._name, line)

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Progress]:
        with self._ensemble.view.progress(f"{label} of {self._name}", total, unit) as counter:
            yield counter

    def end(self) -> None:
        self.has_ended = True
        self._ensemble.end()


def _mean_line(lines: Mapping[str, Line]) -> dict[str, Any]:
    """Return the mean of the members' log lines of a step: the mean loss and the mean errors.

    The returned line also has the loss or the top-1 error of each member. The other values are the last member's.
    """
    *_, last = lines.values()
    means = {key: sum(line[key] for line in lines.values()) / len(lines) for key in _AVERAGED}
    kind = {"train": (MEMBER_LOSSES, "loss"), "val": (MEMBER_TOP1_ERRORS, "top1_error")}
    name, key = kind[last["kind"]]
    return {**last, **means, name: {member: line[key] for member, line in lines.items()}}
