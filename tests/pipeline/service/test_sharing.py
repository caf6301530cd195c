"""Tests of the rules by which consumers wait for each other: examples and random histories, with a simulated clock.

A random history consists of consumers of different speeds and a model of the coordinator. The model keeps a batch while
Sharing.is_needed is true, and counts how often each batch is made.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from pipeline.service.protocol import Call, StreamKey
from pipeline.service.sharing import Sharing

AHEAD, PATIENCE_S, FORGET_S = 4, 60.0, 15.0
STREAM = StreamKey(3, "train", "f" * 64, 0, 128, 0, 1, "random", 1)
OTHER = STREAM._replace(seed=1)


class Consumers:
    """A Sharing object with a simulated clock. Short names identify the consumers."""

    def __init__(self, expected: int = 1) -> None:
        self.sharing = Sharing(AHEAD, expected, PATIENCE_S, FORGET_S)
        self.now_s = 1000.0
        self._calls = 0

    def says(self, consumer: str, first_needed: int, stream: StreamKey = STREAM, number: int | None = None) -> None:
        self._calls += 1
        number = self._calls if number is None else number
        self.sharing.touch(Call(consumer, stream, first_needed, 0.0, number), self.now_s)

    def may(self, consumer: str, position: int) -> bool:
        return self.sharing.may_have(consumer, position, self.now_s)

    def shares(self, consumer: str) -> bool:
        return self.sharing.consumers[consumer].in_group


def test_the_fastest_consumer_runs_ahead_by_at_most_ahead_steps() -> None:
    c = Consumers()
    c.says("a", 0)
    c.says("b", 0)
    assert [c.may("a", position) for position in range(7)] == [True] * 5 + [False] * 2
    c.says("b", 2)
    assert [c.may("a", position) for position in range(9)] == [True] * 7 + [False] * 2
    assert c.may("b", 2)


def test_one_consumer_and_consumers_of_other_streams_never_wait() -> None:
    c = Consumers()
    c.says("a", 0)
    c.says("b", 0, OTHER)
    assert c.may("a", 1000) and c.may("b", 1000)


def test_a_batch_is_kept_as_long_as_a_consumer_may_need_it() -> None:
    c = Consumers()
    c.says("a", 3)
    c.says("b", 5)
    kept = [position for position in range(20) if c.sharing.is_needed(STREAM, position)]
    assert kept == list(range(3, 5 + AHEAD + 1))
    assert not c.sharing.is_needed(OTHER, 3)
    blocks = [position for position in range(0, 20, 2) if c.sharing.is_needed(STREAM, position, steps=2)]
    assert blocks == [position for position in range(0, 20, 2) if {position, position + 1} & set(kept)]
    c.sharing.leave("a")
    c.sharing.leave("b")
    assert not c.sharing.is_needed(STREAM, 5)


def test_a_consumer_that_does_not_move_stops_holding_the_others_after_patience_s() -> None:
    c = Consumers()
    c.says("slow", 0)
    c.says("fast", 4)
    for _ in range(int(PATIENCE_S)):
        c.now_s += 1
        c.says("slow", 0)  # the consumer still sends calls, but makes no progress
        assert not c.may("fast", 5) and c.shares("slow")
    c.now_s += 0.1
    assert c.may("fast", 5) and not c.shares("slow")
    assert c.may("slow", 0)  # the slow consumer does not wait, either
    assert c.sharing.is_needed(STREAM, 0)  # the batches of the slow consumer are kept


def test_a_consumer_that_moves_slowly_holds_the_others_for_any_time() -> None:
    c = Consumers()
    c.says("slow", 0)
    c.says("fast", 4)
    for position in range(50):
        c.now_s += PATIENCE_S - 0.1
        c.says("fast", position + 4)
        assert not c.may("fast", position + 5)
        c.says("slow", position + 1)


def test_a_consumer_that_is_close_again_shares_again() -> None:
    c = Consumers()
    c.says("fast", 100)
    c.says("late", 0)
    assert c.shares("fast") and not c.shares("late")
    assert c.may("fast", 500) and c.may("late", 0)
    c.says("late", 95)
    assert not c.shares("late")
    c.says("late", 96)
    assert c.shares("late") and not c.may("fast", 101)


def test_a_silent_consumer_is_forgotten_after_forget_s() -> None:
    c = Consumers()
    c.says("dead", 0)
    c.says("fast", 4)
    c.now_s += FORGET_S
    c.says("fast", 4)
    assert c.sharing.forget_silent(c.now_s) == [] and not c.may("fast", 5)
    c.now_s += 0.1
    assert c.sharing.forget_silent(c.now_s) == ["dead"] and c.may("fast", 5)
    assert not c.sharing.is_needed(STREAM, 0)


def test_a_stream_waits_for_the_expected_consumers_at_its_first_batch() -> None:
    c = Consumers(expected=3)
    c.says("a", 0)
    c.says("b", 0)
    assert not c.may("a", 0) and not c.may("b", 0)
    c.says("x", 0, OTHER)  # a consumer of another stream does not count
    assert not c.may("a", 0)
    c.says("c", 0)
    assert c.may("a", 0) and c.may("b", 0) and c.may("c", 0)
    c.sharing.leave("c")
    assert c.may("a", 1)  # a stream that has begun does not wait again
    c.sharing.leave("a")
    c.sharing.leave("b")
    c.says("a", 0)
    assert not c.may("a", 0)  # after all consumers have left, the stream waits for three consumers again


def test_a_stream_does_not_wait_longer_than_patience_s_for_the_expected_consumers() -> None:
    c = Consumers(expected=2)
    c.says("a", 0)
    c.now_s += PATIENCE_S
    c.says("a", 0)
    assert not c.may("a", 0)
    c.now_s += 0.1
    assert c.may("a", 0)


def test_a_call_that_arrives_late_does_not_move_a_consumer_back() -> None:
    c = Consumers()
    c.says("a", 7, number=10)
    c.says("a", 5, number=9)
    assert c.sharing.consumers["a"].first_needed == 7
    c.says("a", 2, number=11)  # the loader continued at an earlier position
    assert c.sharing.consumers["a"].first_needed == 2


@pytest.mark.parametrize("seed", range(100))
def test_random_histories(seed: int) -> None:
    """Consumers of random speeds share a stream. Some consumers pause for a while, and some consumers die.

    The test checks four properties. No living consumer waits forever. While all consumers share, each batch is made
    once. A consumer is at most `ahead` steps after the lowest position that another consumer needs. The coordinator
    keeps at most `ahead` + 1 batches for each consumer.
    """
    rng = random.Random(seed)
    c, names = Consumers(), [chr(97 + k) for k in range(rng.randint(1, 5))]
    read_ahead, end = rng.randint(1, AHEAD), 30
    is_steady = rng.random() < 0.5
    speed = {name: rng.uniform(0.05, 1) for name in names}
    begins = {name: 1000.0 if is_steady else 1000 + rng.choice([0.0, 0.0, 30.0]) for name in names}
    paused = dict.fromkeys(names, (0.0, 0.0))
    if not is_steady:
        for name in names:
            start_s = 1000 + rng.uniform(0, 60)
            paused[name] = rng.choice([(0.0, 0.0), (start_s, start_s + rng.uniform(5, 100)), (start_s, 1e9)])
    received: dict[str, set[int]] = defaultdict(set)
    made, kept = Counter[int](), set[int]()

    def first_needed(name: str) -> int:
        return next(k for k in range(end + 1) if k not in received[name])

    def is_done(name: str) -> bool:
        return len(received[name]) == end or paused[name][1] == 1e9

    def lives(name: str) -> bool:
        return begins[name] <= c.now_s and not paused[name][0] <= c.now_s < paused[name][1]

    while c.now_s < 1000 + 3000 and not all(is_done(name) for name in names):
        c.now_s += 0.25
        rng.shuffle(names)
        for name in names:
            if not lives(name) or len(received[name]) == end:
                continue
            first = first_needed(name)
            c.says(name, first)
            if rng.random() > speed[name]:
                continue
            window = range(first, min(end, first + read_ahead))
            position = rng.choice([k for k in window if k not in received[name]])
            if not c.may(name, position):
                continue
            if is_steady:
                slowest = min(known.first_needed for known in c.sharing.consumers.values())
                assert position <= slowest + AHEAD
            assert c.sharing.is_needed(STREAM, position)
            if position not in kept:
                kept.add(position)
                made[position] += 1
            received[name].add(position)
            if len(received[name]) == end:
                c.sharing.leave(name)
        c.sharing.forget_silent(c.now_s)
        kept = {position for position in kept if c.sharing.is_needed(STREAM, position)}
        assert len(kept) <= (AHEAD + 1) * len(c.sharing.consumers)
    assert all(is_done(name) for name in names), {name: first_needed(name) for name in names}
    if is_steady:
        assert set(made.values()) == {1}
