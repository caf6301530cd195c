"""Tests that a killed or interrupted copy continues with the same command, and transfers no verified file again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from prep.console import UserError
from prep.files import hold_lock
from prep.store.manifest import Store, StoreError
from tests.helpers.building import COMMAND, process_group
from tests.prep.remote.conftest import Copy, contents, put_store
from tests.prep.remote.s3_server import DEADLINE_S, Proxy, Request, S3Server


class CopyCommand:
    """A running `alexprep copy` with two workers, in its own process group."""

    def __init__(self, source: object, target: object, *words: str) -> None:
        program = [sys.executable, "-c", COMMAND, "copy", str(source), str(target), "--jobs", "2", *words]
        self.process = subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def end(self) -> tuple[int, str, str]:
        """Wait until all processes of the group have ended. Returns (exit code, standard output, standard error)."""
        stdout, stderr = self.process.communicate(timeout=DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while left := process_group(self.process.pid):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.01)
        return self.process.returncode, stdout, stderr


def kill_at_request(proxy: Proxy, command: CopyCommand, number: int, signum: int = signal.SIGKILL) -> None:
    """Send a signal to the command at its `number`-th request from now, before the proxy forwards this request."""
    left, lock = [number], threading.Lock()

    def decide(request: Request) -> None:
        with lock:
            left[0] -= 1
            if left[0] == 0:
                command.process.send_signal(signum)
                time.sleep(0.05)

    proxy.decide = decide


def recorded(files: dict[str, bytes]) -> set[str]:
    """Return the paths of the files that the journal lists as verified.

    Temporary files, which a kill can leave in the journal, do not count.
    """
    return {
        path.removeprefix(".copy/").removesuffix(".json")
        for path in files
        if path.startswith(".copy/") and path != ".copy/source.json" and not path.startswith(".copy/incoming")
        if not path.endswith(".tmp")
    }


@pytest.mark.parametrize("is_upload", [True, False])
def test_a_copy_that_is_killed_again_and_again_transfers_no_verified_file_twice(
    small_store: Path,
    copy: Copy,
    proxy: Proxy,
    server: S3Server,
    url: str,
    prefix: str,
    tmp_path: Path,
    is_upload: bool,
) -> None:
    """The command is killed twice at random requests, and then runs to its end.

    After each kill, the workers of the command must end, too.
    """
    rng = np.random.default_rng(31)
    if not is_upload:
        put_store(server, prefix, small_store)
    source, target = (small_store, url) if is_upload else (url, tmp_path / "copy")
    method = "PUT" if is_upload else "GET"

    def arrived() -> dict[str, bytes]:
        return server.objects(prefix) if is_upload else contents(tmp_path / "copy")

    # `kept` has the number of verified files after each kill, and `first` has the shards verified at the last kill.
    kept, first = list[int](), set[str]()
    for _ in range(2):
        command = CopyCommand(source, target)
        kill_at_request(proxy, command, int(rng.integers(*((20, 28) if is_upload else (5, 7)))))
        code, _, _ = command.end()
        assert code == -signal.SIGKILL
        files = arrived()
        assert "manifest.json" not in files
        done = recorded(files)
        assert all(files[path] == (small_store / path).read_bytes() for path in done)
        kept.append(len(done))
        assert {path: proxy.count(method, f"{prefix}/{path}") for path in first} == dict.fromkeys(first, 0)
        if not is_upload:
            with pytest.raises(StoreError, match="run the same alexprep copy again"):
                Store.open(tmp_path / "copy")
        proxy.log.clear()
        proxy.decide = lambda request: None
        first = {path for path in done if path.endswith("data.mdb")}
    assert kept == sorted(kept) and kept[-1] >= 1
    code, stdout, stderr = CopyCommand(source, target, "--json").end()
    assert code == 0, stderr
    result = json.loads(stdout)
    # At the last kill, a request may have been on its way to the server, and may have arrived after the count.
    assert 11 - kept[-1] - 1 <= result["copied_files"] <= 11 - kept[-1]
    assert f"resuming; {kept[-1]} of 10 files have arrived" in stderr
    assert {path: proxy.count(method, f"{prefix}/{path}") for path in first} == dict.fromkeys(first, 0)
    files = arrived()
    files.pop("SHA256SUMS", None)
    assert files == contents(small_store)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_copy_which_can_be_resumed(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, tmp_path: Path, signum: int, code: int
) -> None:
    command = CopyCommand(small_store, url)
    kill_at_request(proxy, command, 25, signum)
    returned, stdout, stderr = command.end()
    assert (returned, stdout) == (code, "")
    assert stderr.strip().splitlines()[-1] == "Interrupted. Run the same command again to continue from here."
    assert "Traceback" not in stderr
    proxy.decide = lambda request: None
    assert 1 <= copy(small_store, url).copied_files < 11
    copy(url, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(small_store)


def test_ctrl_c_ends_a_copy_at_once_although_the_server_does_not_answer(
    small_store: Path, proxy: Proxy, url: str
) -> None:
    """The server accepts the first request and never answers. obstore alone would wait for its timeout of a minute."""
    asked, released = threading.Event(), threading.Event()

    def decide(request: Request) -> None:
        asked.set()
        released.wait(DEADLINE_S)

    proxy.decide = decide
    command = CopyCommand(small_store, url)
    try:
        assert asked.wait(DEADLINE_S)
        began = time.monotonic()
        command.process.send_signal(signal.SIGINT)
        code, _, stderr = command.end()
        assert time.monotonic() - began < 20
        assert (code, stderr) == (130, "Interrupted. Run the same command again to continue from here.\n")
    finally:
        released.set()


@pytest.mark.parametrize("is_upload", [True, False])
def test_a_copy_that_failed_between_manifest_and_end_is_complete_and_the_journal_is_removed(
    small_store: Path,
    copy: Copy,
    proxy: Proxy,
    server: S3Server,
    url: str,
    prefix: str,
    tmp_path: Path,
    is_upload: bool,
) -> None:
    target = url if is_upload else str(tmp_path / "copy")
    copy(small_store, target)
    leftover = b'{"manifest": "", "fingerprint": "", "name": ""}'
    if is_upload:
        server.request("PUT", f"/photographs/{prefix}/.copy/source.json", leftover)
    else:
        (tmp_path / "copy" / ".copy").mkdir()
        (tmp_path / "copy" / ".copy" / "source.json").write_bytes(leftover)
    assert copy(small_store, target).copied_files == 0
    files = server.objects(prefix) if is_upload else contents(tmp_path / "copy")
    assert set(files) - {"SHA256SUMS"} == set(contents(small_store))


def test_a_file_that_changed_after_it_arrived_is_copied_again(small_store: Path, copy: Copy, tmp_path: Path) -> None:
    """The journal lists the size and the modification time of each file that has arrived."""
    shutil.copytree(small_store, tmp_path / "cut")
    (tmp_path / "cut" / "val" / "inputs.jsonl").write_text("{}\n")
    with pytest.raises(UserError):
        copy(tmp_path / "cut", tmp_path / "copy")
    shard = tmp_path / "copy" / "train" / "00001" / "data.mdb"
    before = {path: path.stat().st_mtime_ns for path in shard.parents[1].rglob("*.mdb")}
    changed = bytearray(shard.read_bytes())
    changed[-5000] ^= 1
    shard.write_bytes(changed)
    copy(small_store, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(small_store)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path for path in before if before[path] != after[path]] == [shard]


def test_a_damaged_journal_entry_means_that_the_file_is_copied_again(
    small_store: Path, copy: Copy, tmp_path: Path
) -> None:
    shutil.copytree(small_store, tmp_path / "cut")
    (tmp_path / "cut" / "val" / "inputs.jsonl").write_text("{}\n")
    with pytest.raises(UserError):
        copy(tmp_path / "cut", tmp_path / "copy")
    for path, text in (
        ("train/00000/data.mdb", "{"),
        ("train/00001/data.mdb", "[]"),
        ("train/colour.json", '{"a": 1}'),
    ):
        (tmp_path / "copy" / ".copy" / f"{path}.json").write_text(text)
    assert copy(small_store, tmp_path / "copy").copied_files == 3 + 2
    (tmp_path / "again" / ".copy").mkdir(parents=True)
    (tmp_path / "again" / ".copy" / "source.json").write_text("{")
    with pytest.raises(UserError, match=r"the file source\.json of the copy is damaged"):
        copy(small_store, tmp_path / "again")


def test_a_second_command_on_the_same_folder_is_refused(small_store: Path, copy: Copy, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    with hold_lock(tmp_path / "copy", "build"), pytest.raises(UserError, match="another build or copy is at work"):
        copy(small_store, tmp_path / "copy")
    assert os.listdir(tmp_path / "copy") == [".lock"]
