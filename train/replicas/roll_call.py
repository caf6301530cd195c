"""The roll call after a failed exchange.

The roll call finds out which ranks have ended, hang, or wait for another rank. A rank whose exchange failed writes the
key "roll call" into the store. A thread of every rank looks for this key twice a second. The thread answers with the
number of exchanges that its rank has begun. The thread also answers while the main thread waits in an exchange. A rank
is missing if it gives no answer, or if it has begun fewer exchanges than other ranks. If a rank ends because of an
error, it first writes the error into the store.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from typing import Any

from train.replicas.errors import OtherReplicaFailed, ReplicaLost, is_stop
from train.replicas.session import has_ended, ranks_text

_POLL_S = 0.5
_ANSWER_S = 5.0  # time within which a living process answers


class RollCall:
    """The thread with which a rank answers roll calls, and the roll call that the rank itself can start."""

    def __init__(self, store: Any, rank: int, places: tuple[str, ...], timeout_s: float) -> None:
        """`store` is a torch.distributed.Store that only this group uses, on a connection of its own."""
        self._store, self._rank, self._places, self._timeout_s = store, rank, places, timeout_s
        self.begun = 0  # number of exchanges that this rank has begun
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._answer_calls, name="roll call", daemon=True)
        self._thread.start()

    def leave(self, error: dict[str, Any] | None = None) -> None:
        """End the thread. `error` describes the error that this rank prints; None: this rank prints no error."""
        self._ended.set()
        self._thread.join()
        with suppress(Exception), self._lock:
            self._store.set(f"left/{self._rank}", json.dumps(error))

    def wait_for_others(self, longest_s: float) -> None:
        """Wait until all ranks have called `leave`, but not longer than `longest_s`."""
        deadline = time.monotonic() + longest_s
        with suppress(Exception):
            while time.monotonic() < deadline:
                if all(self._exists(f"left/{rank}") for rank in range(len(self._places))):
                    return
                time.sleep(0.01)

    def error_of_other(self) -> dict[str, Any] | None:
        """Return the error with which another rank has ended. Requests to stop do not count.

        Returns None if no other rank has ended with an error, or if the store is lost.
        """
        with suppress(Exception):
            for rank in range(len(self._places)):
                error = self._read(f"left/{rank}") if rank != self._rank and self._exists(f"left/{rank}") else None
                if error is not None and not is_stop(error["kind"]):
                    return dict(error)
        return None

    def call(self, waited_s: float, cause: str) -> ReplicaLost | OtherReplicaFailed:
        """Find the ranks that are missing.

        Returns the error to raise: ReplicaLost, or OtherReplicaFailed if another rank prints the error.

        waited_s  seconds for which this rank has waited for the other ranks
        cause     error message of the failed exchange
        """
        try:
            answers = self._ask()
        except Exception as error:  # the store is also lost: torch raises several types of exceptions
            return ReplicaLost(f"the connection to the other replicas is lost ({_first_line(error)}; {cause}).")
        return self._error(*answers, waited_s, cause)

    def _ask(self) -> tuple[dict[int, int], dict[int, Any]]:
        """Start a roll call. Returns two dicts whose keys are ranks.

        The first dict has, for each rank that answered, the number of exchanges that the rank has begun. The second
        dict has, for each rank that has called `leave`, the error that the rank prints, or None.
        """
        with self._lock:
            self._store.set("roll call", b"1")
        self._answer()
        ranks = set(range(len(self._places)))
        deadline = time.monotonic() + _ANSWER_S
        while True:
            begun = {rank: self._read(f"begun/{rank}") for rank in ranks if self._exists(f"begun/{rank}")}
            left = {rank: self._read(f"left/{rank}") for rank in ranks if self._exists(f"left/{rank}")}
            silent = ranks - begun.keys() - left.keys()
            if all(has_ended(self._places[rank]) for rank in silent) or time.monotonic() > deadline:
                return begun, left
            time.sleep(0.05)

    def _error(
        self, begun: dict[int, int], left: dict[int, Any], waited_s: float, cause: str
    ) -> ReplicaLost | OtherReplicaFailed:
        printed = [error for error in left.values() if error is not None]
        if printed:
            return OtherReplicaFailed(**printed[0])
        waiting = sorted(begun)  # ranks that answered; some of them may have left afterwards
        silent = [rank for rank in range(len(self._places)) if rank not in begun and rank not in left]
        furthest = max(begun[rank] for rank in waiting)
        late = [rank for rank in waiting if begun[rank] < furthest]
        timed_out = waited_s > 0.9 * self._timeout_s
        gone = [rank for rank in left if rank not in waiting]
        if timed_out and (silent or late):
            text = (
                f"{self._named(silent or late)} did not take part in an exchange within {self._timeout_s:g} s, so the "
                "other replicas stop. Find out what that process waits for, or pass a larger --replica-timeout."
            )
        elif silent or gone:
            text = (
                f"{self._named(silent or gone)} has ended, so the other replicas stop. If that process has printed no "
                "error, it was killed, for example because memory ran out. Run the same command again."
            )
        else:
            text = f"the replicas could not exchange values ({cause})."
        if min(set(waiting) - set(late)) != self._rank:
            return OtherReplicaFailed(text, ReplicaLost.exit_code, ReplicaLost.__name__)
        return ReplicaLost(text)

    def _named(self, ranks: list[int]) -> str:
        places = "; ".join(self._places[rank] for rank in ranks)
        return f"{ranks_text(ranks)} of {len(self._places)} ({places})"

    def _answer(self) -> None:
        with self._lock:
            self._store.set(f"begun/{self._rank}", json.dumps(self.begun))

    def _exists(self, key: str) -> bool:
        with self._lock:
            return bool(self._store.check([key]))

    def _read(self, key: str) -> Any:
        with self._lock:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _answer_calls(self) -> None:
        with suppress(Exception):  # without the store, this rank cannot answer, and its own exchanges also fail
            while not self._ended.wait(_POLL_S):
                if self._exists("roll call"):
                    self._answer()
                    return


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
