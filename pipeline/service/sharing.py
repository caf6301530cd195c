"""Decides how consumers share a stream: how long a batch is kept, and how far ahead the fastest consumer may be.

Consumers (loaders) of one stream whose positions are close to each other form the group of the stream. Each batch is
made once for the whole group. Within the group, a consumer waits when it is more than `ahead` steps ahead of the
slowest consumer. A consumer outside of the group waits for no other consumer, and no other consumer waits for it. The
batches of a consumer outside of the group are made for this consumer alone. A consumer is outside of the group in two
cases:

- The consumer joins the stream more than `ahead` steps away from the group, for example after resuming from an old
  checkpoint.
- The consumer has made no progress for `patience_s` seconds, and another consumer would have to wait for it.

A consumer that comes within `ahead` steps of the group's fastest consumer joins the group. A consumer that has sent no
call for `forget_s` seconds is removed. A batch is kept while at least one consumer may still request it. A consumer may
request the batches from the lowest position that it has not received yet to `ahead` steps after this position.

The class Sharing does not use Ray, and has no clock: callers pass the time to its methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.service.protocol import Call, StreamKey


@dataclass
class Consumer:
    """One loader that reads from a stream."""

    stream: StreamKey
    first_needed: int  # lowest position whose batch the consumer has not received yet
    heard_s: float  # time of the consumer's last call
    moved_s: float  # time at which `first_needed` last changed
    in_group: bool = True
    number: int = 0  # Call.number of the consumer's latest call


class Sharing:
    """The consumers of all streams of a service."""

    def __init__(self, ahead: int, expected: int, patience_s: float, forget_s: float) -> None:
        """The arguments are the fields `ahead`, `consumers`, `patience_s` and `forget_s` of ServiceConfig."""
        self._ahead, self._expected, self._patience_s, self._forget_s = ahead, expected, patience_s, forget_s
        self.consumers: dict[str, Consumer] = {}
        # Time at which the first consumer of a stream connected. None: the first batch of the stream may be served.
        self._begun: dict[StreamKey, float | None] = {}

    def touch(self, call: Call, now_s: float) -> bool:
        """Record a call of a consumer.

        Returns True if the consumer has moved in the stream, so that some batches may no longer be needed.
        """
        known = self.consumers.get(call.consumer)
        if known is None or known.stream != call.stream:
            known = Consumer(call.stream, call.first_needed, now_s, now_s, self._is_near(call, default=True))
            self.consumers[call.consumer] = known
            self._begun.setdefault(call.stream, now_s)
        known.heard_s = now_s
        if call.number < known.number:  # this call arrived after a call that was sent later
            return False
        known.number = call.number
        has_moved = known.first_needed != call.first_needed
        if has_moved:
            known.first_needed, known.moved_s = call.first_needed, now_s
        if not known.in_group and self._is_near(call, default=True):
            known.in_group = True
        return has_moved

    def leave(self, consumer: str) -> None:
        """Remove a consumer that has ended."""
        known = self.consumers.pop(consumer, None)
        if known is not None and not any(other.stream == known.stream for other in self.consumers.values()):
            self._begun.pop(known.stream, None)

    def forget_silent(self, now_s: float) -> list[str]:
        """Remove the consumers that have sent no call for `forget_s` seconds. Returns their names."""
        silent = [name for name, known in self.consumers.items() if now_s - known.heard_s > self._forget_s]
        for name in silent:
            self.leave(name)
        return silent

    def may_have(self, consumer: str, position: int, now_s: float) -> bool:
        """Return whether a consumer may receive the batch at a position now.

        If False is returned, the consumer must wait for slower consumers, or for consumers that have not connected yet.
        """
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
        """Return whether some consumer may still request one of the `steps` batches that begin at a position."""
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
        """Return whether a consumer is within `ahead` steps of the fastest other consumer in the group of its stream.

        Returns `default` if the group has no other consumer.
        """
        others = [other for other in self._group(call.stream) if other is not self.consumers.get(call.consumer)]
        if not others:
            return default
        return abs(max(other.first_needed for other in others) - call.first_needed) <= self._ahead

    def _group(self, stream: StreamKey) -> list[Consumer]:
        return [known for known in self._of(stream) if known.in_group]

    def _of(self, stream: StreamKey) -> Iterable[Consumer]:
        return (known for known in self.consumers.values() if known.stream == stream)
