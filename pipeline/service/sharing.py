"""Which consumers share a stream: how long a made batch is kept, and how far the fastest consumer may run ahead.

Consumers of a stream that are close to each other form its group. Batches are made once for the group. A consumer of
the group may ask for a position only if it is at most `ahead` steps after the first position that each other consumer
of the group still needs. Otherwise the consumer waits. Consumers outside of the group do not wait, and nobody waits for
them; their batches are made for them alone. A consumer is outside

- if it joins more than `ahead` steps away from the group, for example because it resumed from an older checkpoint,
- if another consumer would have to wait for it and it has not moved for `patience_s`.

A consumer that comes within `ahead` steps of the group's fastest consumer joins the group again. A consumer that has
not called for `forget_s` is forgotten. A batch is kept while a consumer may still need it: while its position is 0 to
`ahead` steps after the first position that some consumer needs.

The class has no clock and does not know Ray: callers pass the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.service.protocol import Call, StreamKey


@dataclass
class Consumer:
    """One loader that reads from a stream."""

    stream: StreamKey
    first_needed: int  # the first position that it has not received
    heard_s: float  # time of its last call
    moved_s: float  # time at which `first_needed` changed last
    in_group: bool = True
    number: int = 0  # number of its latest call


class Sharing:
    """The consumers of all streams of a service."""

    def __init__(self, ahead: int, expected: int, patience_s: float, forget_s: float) -> None:
        """`expected` is the number of consumers that a stream waits for at its first batch."""
        self._ahead, self._expected, self._patience_s, self._forget_s = ahead, expected, patience_s, forget_s
        self.consumers: dict[str, Consumer] = {}
        self._begun: dict[StreamKey, float | None] = {}  # time at which a stream's first consumer came; None: it began

    def touch(self, call: Call, now_s: float) -> bool:
        """Note a call of a consumer. Returns whether the consumer has moved, so that batches may be unneeded."""
        known = self.consumers.get(call.consumer)
        if known is None or known.stream != call.stream:
            known = Consumer(call.stream, call.first_needed, now_s, now_s, self._is_near(call, default=True))
            self.consumers[call.consumer] = known
            self._begun.setdefault(call.stream, now_s)
        known.heard_s = now_s
        if call.number < known.number:  # an older call that arrived late
            return False
        known.number = call.number
        has_moved = known.first_needed != call.first_needed
        if has_moved:
            known.first_needed, known.moved_s = call.first_needed, now_s
        if not known.in_group and self._is_near(call, default=True):
            known.in_group = True
        return has_moved

    def leave(self, consumer: str) -> None:
        """Forget a consumer that has ended."""
        known = self.consumers.pop(consumer, None)
        if known is not None and not any(other.stream == known.stream for other in self.consumers.values()):
            self._begun.pop(known.stream, None)

    def forget_silent(self, now_s: float) -> list[str]:
        """Forget the consumers that have not called for `forget_s`. Returns their names."""
        silent = [name for name, known in self.consumers.items() if now_s - known.heard_s > self._forget_s]
        for name in silent:
            self.leave(name)
        return silent

    def may_have(self, consumer: str, position: int, now_s: float) -> bool:
        """Whether a consumer may have the batch at a position now. False if it must wait for other consumers."""
        known = self.consumers[consumer]
        group = [other for other in self._group(known.stream) if other is not known]
        if not known.in_group:
            return True
        if self._waits_to_begin(known.stream, len(group) + 1, now_s):
            return False
        held = False
        for other in group:
            if position - other.first_needed > self._ahead:
                if now_s - other.moved_s > self._patience_s:
                    other.in_group = False
                else:
                    held = True
        return not held

    def is_needed(self, stream: StreamKey, position: int, steps: int = 1) -> bool:
        """Whether the `steps` batches from a position on must be kept."""
        return any(-steps < position - known.first_needed <= self._ahead for known in self._of(stream))

    def _waits_to_begin(self, stream: StreamKey, joined: int, now_s: float) -> bool:
        since_s = self._begun.get(stream)
        if since_s is None:
            return False
        if joined < self._expected and now_s - since_s <= self._patience_s:
            return True
        self._begun[stream] = None
        return False

    def _is_near(self, call: Call, default: bool) -> bool:
        """Whether a consumer is within `ahead` steps of the fastest other consumer of its stream's group."""
        others = [other for other in self._group(call.stream) if other is not self.consumers.get(call.consumer)]
        if not others:
            return default
        return abs(max(other.first_needed for other in others) - call.first_needed) <= self._ahead

    def _group(self, stream: StreamKey) -> list[Consumer]:
        return [known for known in self._of(stream) if known.in_group]

    def _of(self, stream: StreamKey) -> Iterable[Consumer]:
        return (known for known in self.consumers.values() if known.stream == stream)
