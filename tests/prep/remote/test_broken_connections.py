"""Tests of copies with broken connections, failing servers and changed bytes. An incomplete copy has no manifest."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from prep.console import UserError
from prep.remote import object_store
from prep.remote.object_store import INNER_RETRIES, WAITS_S
from prep.remote.urls import open_folder
from prep.store.manifest import Store
from tests.prep.remote.conftest import Copy, contents, put_store
from tests.prep.remote.s3_server import Fault, Proxy, Request, S3Server


def random_cuts(seed: int, share: float, longest: int) -> object:
    """Return a function for Proxy.decide that breaks the connection of a random `share` of the requests.

    The connection breaks within the request or within the answer, after at most `longest` bytes.
    """
    rng = np.random.default_rng(seed)

    def decide(request: Request) -> Fault | None:
        if rng.random() > share:
            return None
        after = int(rng.integers(0, longest))
        return Fault(cut_request_after=after) if rng.random() < 0.5 else Fault(cut_answer_after=after)

    return decide


@pytest.fixture
def inner_retries(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore repeats failed requests, as it does outside of the tests. Between two tries it waits only 5 ms."""
    retries = {"max_retries": 2, "backoff": {"init_backoff": timedelta(milliseconds=5)}}
    assert retries["max_retries"] == INNER_RETRIES["max_retries"]
    monkeypatch.setattr(object_store, "INNER_RETRIES", retries)
    open_folder.cache_clear()


@pytest.mark.usefixtures("inner_retries")
def test_connections_that_break_at_random_are_retried_in_both_directions(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    """A quarter of the connections break after up to 150 kB. A part of an upload or download has 128 KiB."""
    proxy.decide = random_cuts(7, 0.25, 150_000)  # type: ignore[assignment]
    copy(small_store, url)
    sent_faults = proxy.faults
    copy(url, tmp_path / "back")
    assert sent_faults >= 8 and proxy.faults - sent_faults >= 2
    expected = contents(small_store)
    assert contents(tmp_path / "back") == expected
    objects = server.objects(prefix)
    del objects["SHA256SUMS"]
    assert objects == expected


def test_a_broken_download_continues_with_the_part_that_failed(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, server: S3Server, prefix: str, tmp_path: Path
) -> None:
    """The answer to every second request for a part of a shard breaks after 1,000 bytes.

    No part is requested more than twice.
    """
    put_store(server, prefix, small_store)
    proxy.log.clear()
    numbers = dict[str, int]()

    def decide(request: Request) -> Fault | None:
        number = numbers[request.path] = numbers.get(request.path, 0) + 1
        return Fault(cut_answer_after=1000) if request.path.endswith("data.mdb") and number % 2 else None

    proxy.decide = decide
    copy(url, tmp_path / "back")
    for path in [path for path in contents(small_store) if path.endswith("data.mdb")]:
        parts = -(-(small_store / path).stat().st_size // (1 << 17))
        assert proxy.count("GET", f"{prefix}/{path}") == 2 * parts, path
    assert contents(tmp_path / "back") == contents(small_store)


def test_a_server_that_answers_503_and_429_is_asked_again(
    small_store: Path, copy: Copy, proxy: Proxy, url: str
) -> None:
    """Requests of multipart uploads do not fail in this test.

    If a request of a multipart upload failed, all requests of the upload would be repeated.
    """
    numbers = dict[tuple[str, str, str], int]()

    def decide(request: Request) -> Fault | None:
        if request.query.startswith(("uploads", "uploadId", "partNumber")):
            return None
        key = request.method, request.path, request.query
        numbers[key] = numbers.get(key, 0) + 1
        return {1: Fault(status=503, code="SlowDown"), 2: Fault(status=429, code="TooMany")}.get(numbers[key])

    proxy.decide = decide
    result = copy(small_store, url)
    assert proxy.faults >= 40
    assert result.retries == proxy.faults


def test_a_server_that_is_away_for_a_while_delays_the_copy(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """During 1.5 s from the tenth request, the proxy resets every connection."""
    monkeypatch.setattr(object_store, "WAITS_S", (0.1, 0.2, 0.4, 0.8, 1.6))
    away: list[float] = []

    def decide(request: Request) -> Fault | None:
        if len(proxy.log) >= 10 and not away:
            away.append(time.monotonic())
        return Fault(cut_request_after=0) if away and time.monotonic() < away[0] + 1.5 else None

    proxy.decide = decide
    result = copy(small_store, url)
    assert away and result.retries >= 2 and result.copied_files == 11


def test_a_server_that_stays_away_ends_the_copy_which_then_continues(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str
) -> None:
    shard = f"{prefix}/train/00002/data.mdb"
    proxy.decide = lambda request: Fault(cut_request_after=0) if request.path == shard else None
    with pytest.raises(
        UserError, match=r"00002/data\.mdb: .*, 7 tries in \d+ s\. Run the same command again"
    ) as raised:
        copy(small_store, url)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert "manifest.json" not in server.objects(prefix)
    proxy.decide = lambda request: None
    proxy.log.clear()
    result = copy(small_store, url)
    assert result.copied_files == 11 - 2
    for path in ("train/00000/data.mdb", "train/00001/data.mdb"):
        assert proxy.count("PUT", f"{prefix}/{path}") == 0
    assert proxy.count("PUT", shard) >= 1


def test_a_bit_that_changes_on_the_way_up_is_found_by_reading_back(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str
) -> None:
    """The server stores the changed shard and answers with status 200. The copy must send the shard again."""
    shard, flips = f"{prefix}/train/00001/data.mdb", list[str]()

    def decide(request: Request) -> Fault | None:
        if request.method == "PUT" and request.path == shard and not flips:
            flips.append(request.query)
            return Fault(flip_request=True)
        return None

    proxy.decide = decide
    result = copy(small_store, url)
    assert flips and result.retries == 1
    parts = -(-(small_store / "train/00001/data.mdb").stat().st_size // (1 << 17))
    assert proxy.count("PUT", shard) == 2 * parts
    assert server.objects(prefix)["train/00001/data.mdb"] == (small_store / "train/00001/data.mdb").read_bytes()


@pytest.mark.parametrize("path", ["train/00001/data.mdb", "train/colour.json", "val/mean_image.npy", "manifest.json"])
def test_bits_that_always_change_on_the_way_up_leave_no_manifest(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, path: str
) -> None:
    def decide(request: Request) -> Fault | None:
        return Fault(flip_request=request.method == "PUT" and request.path == f"{prefix}/{path}")

    proxy.decide = decide
    with pytest.raises(UserError, match=rf"{path}.* reads back with"):
        copy(small_store, url)
    assert "manifest.json" not in server.objects(prefix)


@pytest.mark.parametrize("path", ["train/00001/data.mdb", "train/colour.json", "val/mean_image.npy", "manifest.json"])
@pytest.mark.parametrize("has_checksums", [True, False])
def test_bits_that_always_change_on_the_way_down_leave_no_store(
    small_store: Path,
    copy: Copy,
    proxy: Proxy,
    server: S3Server,
    url: str,
    prefix: str,
    tmp_path: Path,
    path: str,
    has_checksums: bool,
) -> None:
    """Without SHA256SUMS, the change is detected by the digests in the manifest.

    If another program has uploaded the store, SHA256SUMS is missing.
    """
    put_store(server, prefix, small_store)
    if not has_checksums:
        server.request("DELETE", f"/photographs/{prefix}/SHA256SUMS")
    proxy.decide = lambda request: Fault(flip_answer=request.method == "GET" and request.path == f"{prefix}/{path}")
    with pytest.raises(UserError, match=path.rpartition("/")[2]):
        copy(url, tmp_path / "back")
    assert not (tmp_path / "back" / path).exists()
    assert not (tmp_path / "back" / "manifest.json").exists()


def test_a_bit_that_changes_once_on_the_way_down_is_read_again(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, server: S3Server, prefix: str, tmp_path: Path
) -> None:
    put_store(server, prefix, small_store)
    flips = list[str]()

    def decide(request: Request) -> Fault | None:
        if request.method == "GET" and request.path == f"{prefix}/train/00000/data.mdb" and not flips:
            flips.append(request.path)
            return Fault(flip_answer=True)
        return None

    proxy.decide = decide
    assert copy(url, tmp_path / "back").retries == 1
    assert flips and contents(tmp_path / "back") == contents(small_store)


def test_a_server_that_is_killed_and_loses_everything_leaves_no_manifest(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, prefix: str
) -> None:
    """The server is killed during the copy, and starts again on the same port.

    The objects are lost, because the server keeps objects only in memory. At the end, files that were verified before
    are missing, so the copy fails. A copy to a new prefix succeeds.
    """
    first = S3Server()
    proxy.server = first
    restarted: list[S3Server] = []

    lock = threading.Lock()  # several threads call `decide`, because several parts are sent at the same time

    def decide(request: Request) -> None:
        with lock:
            if request.path == f"{prefix}/train/00002/data.mdb" and request.method == "PUT" and not restarted:
                first.kill()
                restarted.append(S3Server(first.port))

    proxy.decide = decide
    try:
        with pytest.raises(UserError, match="2 files changed after the copy had verified them"):
            copy(small_store, url)
        (second,) = restarted
        assert "manifest.json" not in second.objects(prefix)
        # The new server has no source.json. The files in the prefix could therefore belong to another program.
        with pytest.raises(UserError, match="is not empty and holds no unfinished copy"):
            copy(small_store, url)
        open_folder.cache_clear()
        assert copy(small_store, f"{url}-again").copied_files == 11
    finally:
        for started in (first, *restarted):
            started.kill()


def test_the_waits_between_tries_grow_and_last_half_a_minute() -> None:
    assert list(WAITS_S) == sorted(WAITS_S) and 25 <= sum(WAITS_S) <= 40


@pytest.mark.usefixtures("inner_retries")
def test_a_store_that_came_through_broken_connections_opens(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, tmp_path: Path
) -> None:
    """Connections break only within the first 600 bytes, that is, in small files and in XML answers."""
    proxy.decide = random_cuts(11, 0.3, 600)  # type: ignore[assignment]
    copy(small_store, url)
    copy(url, tmp_path / "back")
    assert Store.open(tmp_path / "back").fingerprint == Store.open(small_store).fingerprint
