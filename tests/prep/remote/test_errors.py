"""Tests of the errors of `alexprep copy`: one line that says what is wrong and what to do next."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner

from prep.cli import main
from prep.console import DiskFull, Progress, UserError
from prep.remote import copy_store, copy_task
from prep.remote.copy_store import planned_copy, run_copy
from prep.remote.urls import open_folder
from prep.workers import TaskProgress
from tests.helpers.building import COMMAND, InlineRunner
from tests.prep.remote.conftest import Copy, contents, put_store
from tests.prep.remote.s3_server import DEADLINE_S, Fault, Proxy, Request, S3Server


def failing(proxy: Proxy, prefix: str, path: str, method: str, status: int, code: str) -> None:
    """Let the proxy answer all requests of one method for one object with an error status."""

    def decide(request: Request) -> Fault | None:
        wanted = (request.method, request.path) == (method, f"{prefix}/{path}")
        return Fault(status=status, code=code) if wanted else None

    proxy.decide = decide


def test_a_missing_bucket_is_named(small_store: Path, copy: Copy, proxy: Proxy, tmp_path: Path) -> None:
    for source, target in ((small_store, "s3://no-such/store"), ("s3://no-such/store", tmp_path / "copy")):
        with pytest.raises(UserError, match=r"^s3://no-such/store: there is no bucket no-such\. Create the bucket, or"):
            copy(source, target)
    assert not (tmp_path / "copy").exists()


def test_a_missing_store_is_named(small_store: Path, copy: Copy, proxy: Proxy, url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{url}: the folder has no manifest\.json \(not a store\)"):
        copy(url, tmp_path / "copy")
    with pytest.raises(UserError, match=r"nowhere: no such store\. Build a store with"):
        copy(tmp_path / "nowhere", url)


@pytest.mark.parametrize("url", ["s3://bucket/store", "gs://bucket/store", "file:///nowhere/store"])
def test_a_url_as_store_of_another_command_names_copy(url: str) -> None:
    result = CliRunner().invoke(main, ["verify", "--store", url])
    assert result.exit_code == 1
    assert "a store is read from a local folder. First copy the store with: alexprep copy URL FOLDER" in result.stderr


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_a_refused_request_is_an_error_of_permission_and_not_repeated(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, prefix: str, code: str
) -> None:
    failing(proxy, prefix, "train/00000/data.mdb", "POST", 403, code)
    failing_shard = rf"{prefix}/train/00000/data\.mdb: permission denied \({code}\)\. Set AWS_ACCESS_KEY_ID and"
    with pytest.raises(UserError, match=failing_shard):
        copy(small_store, url)
    assert proxy.faults == 1


def test_a_broken_connection_to_a_name_with_403_is_no_error_of_permission(
    small_store: Path, copy: Copy, proxy: Proxy, url: str
) -> None:
    proxy.decide = lambda request: Fault(cut_request_after=0)
    with pytest.raises(UserError, match=r"HTTP error: .*, 7 tries in \d+ s\. Run the same command again"):
        copy(small_store, f"{url}/403")


def test_missing_credentials_name_the_variables(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without credentials, obstore asks the metadata service of EC2, which does not answer in this test."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    open_folder.cache_clear()
    with pytest.raises(UserError, match=r"no credentials found\. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"):
        copy(small_store, url)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("http://host/store", "http:// is not supported"),
        ("memory://store", "memory:// is not supported"),
        ("s3://", "expected s3://BUCKET/PREFIX"),
        ("s3:///store", "expected s3://BUCKET/PREFIX"),
        ("s3://bucket/a//b", "expected s3://BUCKET/PREFIX"),
        ("gs://bucket/../b", "expected gs://BUCKET/PREFIX"),
        ("file://host/store", "expected file:///PATH"),
    ],
)
def test_a_url_of_another_form_is_refused(small_store: Path, name: str, text: str) -> None:
    for words in ((str(small_store), name), (name, str(small_store))):
        result = CliRunner().invoke(main, ["copy", *words])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: {name}: {text}") and result.stderr.count("\n") == 1


def test_without_obstore_the_error_names_the_extra(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)
    open_folder.cache_clear()
    result = CliRunner().invoke(main, ["copy", str(small_store), "s3://bucket/store"])
    assert result.exit_code == 1
    expected = "s3:// needs obstore, which is not installed. Install obstore with: pip install 'obstore>=0.12,<0.13'"
    assert result.stderr == f"Error: {expected}\n"


def test_a_full_disk_ends_with_exit_code_3_and_the_copy_continues(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, prefix: str, server: S3Server, tmp_path: Path
) -> None:
    """The process cannot write files of more than 150 kB, so no training shard can be written."""
    put_store(server, prefix, small_store)
    limited = subprocess.run(
        [sys.executable, "-c", COMMAND, "copy", url, str(tmp_path / "copy"), "--jobs", "1"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert limited.returncode == 3, limited.stderr
    assert limited.stderr.count("\n") == 1
    assert "File too large. Correct this error, then run the same command again" in limited.stderr
    assert not list((tmp_path / "copy").rglob("data.mdb"))
    assert copy(url, tmp_path / "copy").files == 11
    assert contents(tmp_path / "copy") == contents(small_store)


def test_too_little_space_is_found_before_anything_is_copied(
    small_store: Path, copy: Copy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(copy_store, "free_bytes", lambda path: 100_000)
    with pytest.raises(DiskFull, match=r"the copy needs \d+\.\d KB, 100\.0 KB are free"):
        copy(small_store, tmp_path / "copy")
    assert contents(tmp_path / "copy") == {}


def test_a_damaged_shard_of_a_local_source_is_not_sent(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    shutil.copytree(small_store, tmp_path / "damaged")
    shard = tmp_path / "damaged" / "train" / "00001" / "data.mdb"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train/00001: digest \w{64}, the manifest says \w{64}\. .*alexprep verify"):
        copy(tmp_path / "damaged", url)
    assert "train/00001/data.mdb" not in server.objects(prefix)
    assert proxy.count("PUT", f"{prefix}/train/00001/data.mdb") == 0


def test_checksums_of_another_manifest_are_not_used(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    copy(small_store, url)
    sums = server.objects(prefix)["SHA256SUMS"].decode()
    other = re.sub("^[0-9a-f]{8}", "0" * 8, sums, flags=re.M)
    server.request("PUT", f"/photographs/{prefix}/SHA256SUMS", other.encode())
    copy(url, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(small_store)


def test_a_truncated_shard_in_a_bucket_is_refused_after_three_transfers(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    """The bucket holds only the first half of the shard, and no SHA256SUMS."""
    put_store(server, prefix, small_store)
    half = (small_store / "train" / "00000" / "data.mdb").read_bytes()[:100_000]
    server.request("PUT", f"/photographs/{prefix}/train/00000/data.mdb", half)
    server.request("DELETE", f"/photographs/{prefix}/SHA256SUMS")
    proxy.log.clear()
    with pytest.raises(UserError, match=r"train/00000: .* 100,000 bytes, expected .* 3 times"):
        copy(url, tmp_path / "copy")
    assert proxy.count("GET", f"{prefix}/train/00000/data.mdb") == copy_task.TRIES == 3
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_a_file_that_is_missing_in_the_source_is_named(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    put_store(server, prefix, small_store)
    server.request("DELETE", f"/photographs/{prefix}/val/colour.json")
    with pytest.raises(UserError, match=r"val/colour\.json is missing"):
        copy(url, tmp_path / "copy")
    with pytest.raises(
        UserError, match=r"has the manifest of this store\. .* another size: 1 \(first: val/colour\.json\)"
    ):
        copy(small_store, url)


def test_an_object_that_is_replaced_during_the_download_is_noticed(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    """After the first part of a shard was read, the shard is replaced by other bytes of the same length."""
    put_store(server, prefix, small_store)
    path, seen = "train/00000/data.mdb", list[int]()

    def decide(request: Request) -> None:
        if request.path == f"{prefix}/{path}":
            seen.append(1)
            if len(seen) == 2:
                size = (small_store / path).stat().st_size
                server.request("PUT", f"/photographs/{prefix}/{path}", bytes(size))

    proxy.decide = decide
    with pytest.raises(UserError, match=r"data\.mdb changed while it was read\. Run the same command again"):
        copy(url, tmp_path / "copy")


class RecordedProgress(Progress):
    """A Progress that keeps a list of all reported values of `done`."""

    def __init__(self, total: int) -> None:
        self.values: list[int] = []
        super().__init__(total, "kB")

    def update(self, done: int, bad: int = 0, size_bytes: int = 0) -> None:
        super().update(done, bad, size_bytes)
        self.values.append(done)


@pytest.mark.parametrize("is_upload", [True, False])
def test_progress_counts_each_byte_once_although_a_shard_is_transferred_twice(
    small_store: Path,
    copy: Copy,
    proxy: Proxy,
    url: str,
    prefix: str,
    server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_upload: bool,
) -> None:
    """The first transfer of one shard is damaged. The copy stops at val/mean_image.npy, and a second copy continues."""
    monkeypatch.setattr(copy_store, "MB", 1000)
    if not is_upload:
        put_store(server, prefix, small_store)
    source, target = (small_store, url) if is_upload else (url, tmp_path / "copy")
    flips = list[str]()

    def decide(request: Request) -> Fault | None:
        if request.path.endswith("val/mean_image.npy"):
            return Fault(status=403, code="AccessDenied")
        if request.path.endswith("00000/data.mdb") and request.method == ("PUT" if is_upload else "GET") and not flips:
            flips.append(request.path)
            return Fault(flip_request=is_upload, flip_answer=not is_upload)
        return None

    runs = []
    for decision in (decide, lambda request: None):
        proxy.decide = decision
        with planned_copy(str(source), str(target)) as plan:
            runs.append(RecordedProgress(plan.size_bytes // 1000))
            with pytest.raises(UserError, match="AccessDenied") if decision is decide else nullcontext():
                run_copy(plan, InlineRunner(), runs[-1])
    first, second = runs
    assert flips
    assert first.values == sorted(first.values) and second.values == sorted(second.values)
    left_kb = (small_store / "val" / "mean_image.npy").stat().st_size / 1000
    assert abs(first.total - left_kb - first.values[-1]) <= 2
    assert second.skipped == second.values[0] == first.values[-1]
    assert second.values[-1] == second.total


def test_progress_does_not_go_back_when_a_transfer_begins_again() -> None:
    task_progress, seen = TaskProgress(), []
    count = copy_task.ByteCounter(task_progress)
    for position in (100, 300, 50, 300, 400):
        count(position)
        seen.append(task_progress.counts.bytes)
    assert seen == [100, 300, 300, 300, 400]


def test_the_result_as_json_and_as_text(small_store: Path, proxy: Proxy, url: str, tmp_path: Path) -> None:
    size = sum(map(len, contents(small_store).values()))
    result = CliRunner().invoke(main, ["copy", str(small_store), url, "--jobs", "1", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts.pop("seconds") > 0
    manifest = json.loads((small_store / "manifest.json").read_bytes())
    assert facts == {
        "source": str(small_store),
        "target": url,
        "fingerprint": manifest["fingerprint"],
        "files": 11,
        "bytes": size,
        "copied_files": 11,
        "copied_bytes": size,
        "retries": 0,
        "already_complete": False,
    }
    result = CliRunner().invoke(main, ["copy", url, str(tmp_path / "copy"), "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'copy'}: 11 files, {size / 1000:.1f} KB, ")
    assert result.stdout.endswith(f". Fingerprint {manifest['fingerprint']}\n")
