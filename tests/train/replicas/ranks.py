"""Runs the ranks of a group as threads of the test process. The ranks exchange values over gloo, as processes do."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list TCPStore in __all__

from train.replicas.group import ReplicaGroup, joined
from train.replicas.link import Link

Outcome = Any  # the result of a rank, or the exception that it raised


def run_ranks(
    monkeypatch: Any, size: int, work: Callable[[ReplicaGroup], Any], timeout_s: float = 20.0
) -> list[Outcome]:
    """Start one thread for each rank, and call `work(group)` in it. Return results or exceptions in rank order."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(
        "train.replicas.group.connect",
        lambda rank, size, timeout_s: Link(rank, size, "127.0.0.1", server.port, False, timeout_s),
    )
    for name in ("_QUIET_END_S", "_STOPPED_END_S"):
        monkeypatch.setattr(f"train.replicas.torchrun.{name}", 0.0)
    outcomes: list[Outcome] = [None] * size

    def run(rank: int) -> None:
        try:
            with joined(ReplicaGroup(rank, size, rank, size, launched=True), timeout_s) as group:
                outcomes[rank] = work(group)
        except BaseException as error:
            outcomes[rank] = error

    threads = [Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return outcomes
