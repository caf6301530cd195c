"""Tests of the connection to Ray: addresses, a missing cluster, signal handlers, and several users of a connection."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prep.cluster import check_address
from prep.console import UserError
from tests.helpers.project import own_namespaces

DEADLINE_S = 240.0
_ATTEMPTS = 4
LOCAL = """
import json, signal, threading, time
from prep.cluster import connected

def on_signal(number, frame):
    seen.append(number)

seen, facts = [], {}
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, on_signal)
with connected("local", cores=1) as ray:
    facts["cores"] = ray.cluster_resources()["CPU"]
    with connected("local") as second:
        facts["same"] = second is ray
    facts["open_after_second"] = ray.is_initialized()

    def use():
        with connected("auto") as third:
            facts["thread"] = third.get(third.put(7))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    facts["after"] = ray.get(ray.put(8))
facts["closed"] = not ray.is_initialized()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.raise_signal(number)
facts["seen"] = seen
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
with connected("auto"):
    pass
facts["kept"] = ray.is_initialized()  # the program's own connection stays open
ray.shutdown()
print(json.dumps(facts))
"""
REFUSED = """
import sys
from prep.cluster import connected
from prep.console import UserError
for address in sys.argv[1:]:
    try:
        with connected(address):
            print("connected")
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("address", ["local", "auto", "head:6379", "192.168.0.1:1", "[::1]:6379"])
def test_addresses(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize("address", ["", "head", "6379", ":6379", "head:", "head:port", "head:123456", "a b:6379"])
def test_texts_that_are_not_addresses_are_refused(address: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"cluster {address!r}: expected local, auto or HOST:PORT.")):
        check_address(address)


def test_ray_client_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"ray://head:10001: Ray Client is not supported.*ray start --address HOST:PORT"
    ):
        check_address("ray://head:10001")


def test_on_a_machine_without_a_cluster_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    """The program runs in its own namespaces and sees no other processes. Ray looks for clusters in an empty folder."""
    spaces = own_namespaces("--pid", "--fork", "--mount", "--mount-proc", "--kill-child")
    ended = subprocess.run(
        [*spaces, sys.executable, "-c", REFUSED, "auto", "127.0.0.1:1"],
        env={**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "RAY_TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    auto, other = ended.stdout.splitlines()
    assert auto.startswith("cluster auto: no Ray cluster runs on this machine. Start one (ray start --head)")
    assert (
        other.startswith("cluster 127.0.0.1:1: no program answers at this address (") and "Connection refused" in other
    )


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """The values that a program prints after it has used a local cluster.

    On a busy machine, the start of the cluster can fail. The start is then tried again.
    """
    for _ in range(_ATTEMPTS):
        ended = subprocess.run(
            [sys.executable, "-c", LOCAL], capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )
        if "timed out during startup" not in ended.stderr:
            break
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_the_program_keeps_its_signal_handlers(facts: dict[str, Any]) -> None:
    assert facts["seen"] == [2, 15, 2, 15]


def test_the_last_user_of_a_connection_ends_it(facts: dict[str, Any]) -> None:
    assert facts["same"] and facts["open_after_second"] and facts["closed"] and facts["cores"] == 1
    assert (facts["thread"], facts["after"]) == (7, 8)


def test_a_connection_that_the_program_has_is_used_and_stays(facts: dict[str, Any]) -> None:
    assert facts["kept"]
