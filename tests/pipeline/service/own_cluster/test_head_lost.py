"""Tests of the loss of the head node while a consumer on another machine reads from the service.

Both machines are simulated: the processes of one machine do not see the processes of the other machine. All processes
of the head node are killed at once. The consumer is a program of its own, and the tests also check how this program
ends.
"""

from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from pipeline.loader import train_loader
from pipeline.service import client
from pipeline.service.client import ServiceClient
from pipeline.service.errors import ServiceLost
from pipeline.service.protocol import PROTOCOL_VERSION, Answer, Health, ServiceConfig, StreamKey
from pipeline.windows import WindowRequest
from prep.version import package_version
from tests.pipeline.service.conftest import DEADLINE_S
from tests.pipeline.service.consumer import digests
from tests.pipeline.service.faults import HOST, TOKEN, Machine, free_port, head_commands, node_commands, wait_for_file
from tests.pipeline.streaming import take_batches

SEED, BATCH, AFTER = 9, 4, 40
LOST_S = 4.0
CONSUMER = """
import json, os, sys
from pathlib import Path
from pipeline import train_loader
from pipeline.service.control import make_config, start_service
from pipeline.service.errors import ServiceError, ServiceLost
from prep.cluster import connected
from tests.pipeline.service.consumer import digests
from tests.pipeline.streaming import take_batches

store, address, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
result = {}
with connected(address) as ray:
    start_service(ray, make_config(store, "s", 1, 1, 1))
options = {"seed": SEED, "service": f"s@{address}", "threads": 1}
with (
    train_loader(store, BATCH, **options) as lost,
    train_loader(store, BATCH, service_fallback="local", **options) as kept,
):
    result["before"] = digests(take_batches(kept, 5))
    take_batches(lost, 5)
    (folder / "ready").write_text("ready\\n")
    while not (folder / "off").exists():
        pass
    result["after"] = digests(take_batches(kept, AFTER))
    result["state"] = kept.service_status().state
    try:
        take_batches(lost, AFTER)
    except ServiceLost as error:
        result["error"] = str(error)
    result["step"] = lost.epoch * len(lost) + lost.step
(folder / "result").write_text(json.dumps(result) + "\\n")
"""


@pytest.fixture(scope="module")
def ended(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Output, exit code and standard error of the consumer, and the seconds from the loss of the head to the exit."""
    folder = tmp_path_factory.mktemp("lost")
    address = f"{HOST}:{free_port()}"
    program = CONSUMER.replace("SEED", str(SEED)).replace("BATCH", str(BATCH)).replace("AFTER", str(AFTER))
    consumer = shlex.join([sys.executable, "-c", program, str(store), address, str(folder)])
    # The head node has the core on which the worker runs. The node of the consumer has no cores.
    head = Machine(head_commands(int(address.partition(":")[2])), **TOKEN)
    node = None
    try:
        node = Machine(
            f"({node_commands(address, cores=0)}) 2>{folder}/node & until {consumer} 2>{folder}/stderr; do "
            f"code=$?; [ -e {folder}/ready ] && exit $code; sleep 1; done",
            ALEXSTREAM_LOST_S=str(LOST_S),
            **TOKEN,
        )
        wait_for_file(folder / "ready", node, DEADLINE_S)
        head.switch_off()
        begun_s = time.monotonic()
        (folder / "off").touch()
        code, _, stderr_of_shell = node.wait(DEADLINE_S)
        assert (folder / "result").exists(), f"exit code {code}: {(folder / 'stderr').read_text()}{stderr_of_shell}"
        result: dict[str, Any] = json.loads((folder / "result").read_text())
        stderr = (folder / "stderr").read_text()
        return {**result, "code": code, "stderr": stderr, "seconds": time.monotonic() - begun_s}
    finally:
        head.switch_off()
        if node is not None:
            node.switch_off()


@pytest.mark.soak
def test_with_a_fallback_the_stream_continues_with_equal_bits(store: Path, ended: dict[str, Any]) -> None:
    with train_loader(store, BATCH, seed=SEED, threads=1) as local:
        expected = digests(take_batches(local, 5 + AFTER))
    assert ended["before"] == expected[:5]
    assert ended["after"] == expected[5:]
    assert ended["state"] == "local"


@pytest.mark.soak
def test_without_a_fallback_the_loader_tells_what_to_do(ended: dict[str, Any]) -> None:
    error = ended["error"]
    assert error.startswith("service s is lost: ") and "\n" not in error
    assert "Start the service again (alexstream serve)" in error and "--service-fallback local" in error
    assert ended["step"] >= 5


@pytest.mark.soak
def test_the_program_ends_cleanly(ended: dict[str, Any]) -> None:
    """The program prints one line to standard error: the message that it continues with the local store."""
    assert ended["code"] == 0
    lines = ended["stderr"].splitlines()
    assert len(lines) == 1 and "This process now makes the batches itself, from" in lines[0], ended["stderr"]
    assert ended["seconds"] < LOST_S + 40


def test_a_lost_service_is_left_when_no_thread_waits_in_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service answers one request for windows. The pixels of this answer and all later answers never arrive."""
    pixels_requested, waiting, waiting_at_exit = threading.Event(), set[int](), list[int]()

    def get(reference: Any, timeout: float) -> Any:
        if reference != b"pixels" and not pixels_requested.is_set():
            return reference
        if reference == b"pixels":
            pixels_requested.set()
        waiting.add(threading.get_ident())
        time.sleep(timeout)
        waiting.remove(threading.get_ident())
        raise ray.exceptions.GetTimeoutError

    @contextmanager
    def connected(address: str) -> Iterator[Any]:
        yield SimpleNamespace(get=get, exceptions=ray.exceptions)
        waiting_at_exit.append(len(waiting))

    answers = {
        "begin": (PROTOCOL_VERSION, package_version()),
        "config": ServiceConfig("s", "/store", {"train": "fingerprint"}),
        "alive": Health(1, 0),
        "fetch": Answer((b"pixels",), np.zeros(1, np.int64)),
    }
    methods = {
        name: SimpleNamespace(options=lambda answer=answer, **_: SimpleNamespace(remote=lambda *_: answer))
        for name, answer in answers.items()
    }
    monkeypatch.setattr(client, "connected", connected)
    monkeypatch.setattr(client, "find_service", lambda *_: SimpleNamespace(**methods))
    monkeypatch.setattr(client, "_ALIVE_S", 0.1)
    monkeypatch.setattr(client, "_GET_S", 1.0)
    monkeypatch.setattr(client, "LOST_S", 0.3)
    consumer = ServiceClient("s", StreamKey(1, "train", "fingerprint", 0, 1, 0, 1, "random", 0), lambda: 0.0)
    request = WindowRequest("train", np.zeros(1, np.int64), np.zeros((1, 2), np.int32), 224)
    with pytest.raises(ServiceLost, match="service s is lost: the service has not answered for"):
        consumer.fetch(0, [request])
    consumer.close()
    assert waiting_at_exit == [0]
