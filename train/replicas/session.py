"""The start of a group of replicas: the ranks find each other in the store of torchrun, and agree on a session name.

torchrun keeps its store while it restarts the processes of a group. The store can therefore hold keys of processes that
have ended. Each process therefore has its own random name. Rank 0 collects the names and writes a list of them, with a
new random session name. A rank accepts only a list that contains its own name. All later keys of the group begin with
the session name. No process therefore reads a key of an earlier group.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from train.replicas.errors import ReplicaLost

_POLL_S = 0.02


@dataclass(frozen=True)
class Session:
    """The name of a group's session, and where each rank runs: `host alpha, process 4711`."""

    name: str
    places: tuple[str, ...]


def begin_session(store: Any, rank: int, size: int, timeout_s: float) -> Session:
    """Wait until all ranks have called this function. Every rank gets the same Session.

    store  torch.distributed.Store that all ranks share

    Raises ReplicaLost with the missing ranks if a rank does not call the function within `timeout_s`.
    """
    own = {"name": secrets.token_hex(8), "place": f"host {platform.node()}, process {os.getpid()}"}
    deadline = time.monotonic() + timeout_s
    store.set(f"process/{rank}", json.dumps(own))
    if rank != 0:
        return _wait_for_list(store, rank, own, deadline, timeout_s)
    processes: list[Any] = []
    session: dict[str, Any] = {}
    while True:
        found = [_read(store, f"process/{other}") for other in range(size)]
        # `found` changes when a process of this group overwrites the name of a process of an earlier group.
        if found != processes and None not in found:
            processes, session = found, {"name": secrets.token_hex(8), "processes": found}
            store.set("session", json.dumps(session))
        accepted = [_read(store, f"accepted/{other}") for other in range(1, size)]
        if session and all(name == session["name"] for name in accepted):
            return _session(session)
        if time.monotonic() > deadline:
            missing = [other for other in range(size) if found[other] is None]
            missing = missing or [n for n, name in enumerate(accepted, 1) if name != session["name"]]
            raise ReplicaLost(
                f"{ranks_text(missing)} of {size} did not start within {timeout_s:g} s. Look for an error message of "
                "that process, or pass a larger --replica-timeout."
            )
        time.sleep(_POLL_S)


def _wait_for_list(store: Any, rank: int, own: dict[str, str], deadline: float, timeout_s: float) -> Session:
    while True:
        session = _read(store, "session")
        if session and rank < len(session["processes"]) and session["processes"][rank] == own:
            store.set(f"accepted/{rank}", json.dumps(session["name"]))
            return _session(session)
        if time.monotonic() > deadline:
            raise ReplicaLost(
                f"rank 0 did not start the group within {timeout_s:g} s. Look for an error message of rank 0, or pass "
                "a larger --replica-timeout."
            )
        time.sleep(_POLL_S)


def has_ended(place: str) -> bool:
    """Return True if `place`, an item of Session.places, is a process of this machine that has ended.

    A zombie counts as ended.
    """
    process = re.fullmatch(rf"host {re.escape(platform.node())}, process (\d+)", place)
    if process is None:
        return False
    try:
        with open(f"/proc/{process[1]}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return os.path.exists("/proc/self/stat")
    except OSError:
        return False


def ranks_text(ranks: list[int]) -> str:
    """Return `rank 2` or `ranks 2, 3`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _session(content: dict[str, Any]) -> Session:
    return Session(content["name"], tuple(process["place"] for process in content["processes"]))


def _read(store: Any, key: str) -> Any:
    return json.loads(store.get(key)) if store.check([key]) else None
