"""Tests that a copy has the bytes of its source, and that the manifest is written last.

Other tests copy to destinations that must be refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from prep.cli import main
from prep.console import UserError
from prep.store.manifest import Store, StoreError, split_fingerprint
from tests.prep.remote.conftest import Copy, contents
from tests.prep.remote.s3_server import BUCKET, Proxy, Request, S3Server


def put_paths(proxy: Proxy) -> list[str]:
    return [request.path for request in proxy.log if request.method == "PUT"]


def test_a_store_comes_back_from_s3_with_equal_bytes(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    sent = copy(small_store, url)
    back = copy(url, tmp_path / "back")
    expected = contents(small_store)
    assert len(expected) == 4 + 2 * 3 + 1
    assert contents(tmp_path / "back") == expected
    objects = server.objects(prefix)
    sums = objects.pop("SHA256SUMS").decode()
    assert objects == expected
    assert sums == "".join(f"{hashlib.sha256(expected[p]).hexdigest()}  {p}\n" for p in sorted(expected))
    store = Store.open(tmp_path / "back")
    assert store.fingerprint == Store.open(small_store).fingerprint == sent.fingerprint == back.fingerprint
    total = sum(map(len, expected.values()))
    for result in (sent, back):
        assert (result.files, result.copied_files, result.retries) == (11, 11, 0)
        assert (result.bytes, result.copied_bytes) == (total, total)


def test_the_copied_store_passes_verify_with_decoded_images(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, tmp_path: Path
) -> None:
    copy(small_store, url)
    copy(url, tmp_path / "back")
    result = CliRunner().invoke(main, ["verify", "--store", str(tmp_path / "back"), "--jobs", "1", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["ok"], facts["records"]) == (True, 204)


def test_sha256sum_accepts_the_checksums(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    copy(small_store, url)
    for path, content in server.objects(prefix).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)


def test_the_manifest_arrives_last_and_every_shard_is_read_back_before(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, prefix: str
) -> None:
    copy(small_store, url)
    order = [path.removeprefix(f"{prefix}/") for path in put_paths(proxy) if not path.startswith(f"{prefix}/.copy/")]
    distinct = list(dict.fromkeys(order))
    assert distinct[-2:] == ["SHA256SUMS", "manifest.json"]
    assert set(distinct) == {*contents(small_store), "SHA256SUMS"}
    manifest = proxy.log.index(next(r for r in proxy.log if (r.method, r.path) == ("PUT", f"{prefix}/manifest.json")))
    for path in distinct[:-2]:
        if (small_store / path).stat().st_size:
            reads = [i for i, r in enumerate(proxy.log) if (r.method, r.path) == ("GET", f"{prefix}/{path}")]
            assert reads and max(reads) < manifest, path
    assert any("partNumber=2" in request.query for request in proxy.log)  # a shard was sent in several parts


def test_a_store_comes_back_from_gcs_with_equal_bytes(
    small_store: Path,
    copy: Copy,
    proxy: Proxy,
    server: S3Server,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Google's XML interface differs from that of S3 in two respects: escapes in keys, and authorization."""
    account = {"gcs_base_url": proxy.url, "disable_oauth": True, "client_email": "", "private_key": ""}
    (tmp_path / "account.json").write_text(json.dumps({**account, "private_key_id": ""}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    proxy.is_gcs = True
    copy(small_store, f"gs://{BUCKET}/{prefix}")
    assert any("partNumber=2" in request.query for request in proxy.log)
    copy(f"gs://{BUCKET}/{prefix}", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(small_store)
    assert set(server.objects(prefix)) == {*contents(small_store), "SHA256SUMS"}


def test_copies_between_prefixes_and_between_local_folders_have_equal_bytes(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    copy(small_store, f"{url}-1")
    copy(f"{url}-1", f"{url}-2")
    assert server.objects(f"{prefix}-2") == server.objects(f"{prefix}-1")
    copy(small_store, tmp_path / "a b%c")
    copy(f"file://{tmp_path}/a%20b%25c", tmp_path / "d")
    assert contents(tmp_path / "a b%c") == contents(tmp_path / "d") == contents(small_store)


def test_a_complete_copy_is_left_as_it_is(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, tmp_path: Path
) -> None:
    for target in (url, tmp_path / "local"):
        copy(small_store, target)
        proxy.log.clear()
        again = copy(small_store, target)
        assert (again.files, again.copied_files, again.copied_bytes) == (11, 0, 0)
        assert {request.method for request in proxy.log} <= {"GET"}
    result = CliRunner().invoke(main, ["copy", str(small_store), url])
    assert result.exit_code == 0, result.output
    assert "already there; nothing to do" in result.stdout


def other_store(small_store: Path, folder: Path) -> Path:
    """Return a copy of the store with another fingerprint. In the copy, one class has another name."""
    shutil.copytree(small_store, folder)
    store = Store.open(folder)
    classes = ("another", *store.classes[1:])
    splits = {
        name: replace(split, fingerprint=split_fingerprint(classes, split.shards))
        for name, split in store.splits.items()
    }
    replace(store, classes=classes, splits=splits).save()
    return folder


@pytest.mark.parametrize("is_remote", [True, False])
def test_another_store_in_the_destination_is_refused_with_both_fingerprints(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, tmp_path: Path, is_remote: bool
) -> None:
    other = other_store(small_store, tmp_path / "other")
    target = url if is_remote else str(tmp_path / "copy")
    copy(small_store, target)
    fingerprints = Store.open(other).fingerprint, Store.open(small_store).fingerprint
    assert len(set(fingerprints)) == 2
    with pytest.raises(UserError, match=rf"another store \(fingerprint {fingerprints[1]}.*{fingerprints[0]}"):
        copy(other, target)


@pytest.mark.parametrize("is_remote", [True, False])
def test_an_unfinished_copy_of_another_store_is_refused_with_both_fingerprints(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, tmp_path: Path, is_remote: bool
) -> None:
    other = other_store(small_store, tmp_path / "other")
    target = url if is_remote else str(tmp_path / "copy")
    shutil.copytree(small_store, tmp_path / "cut")
    (tmp_path / "cut" / "val" / "inputs.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"val/inputs\.jsonl: SHA-256 \w{64}, the manifest says \w{64}"):
        copy(tmp_path / "cut", target)
    fingerprints = Store.open(small_store).fingerprint, Store.open(other).fingerprint
    with pytest.raises(UserError, match=rf"unfinished copy of another store \(.*{fingerprints[0]};.*{fingerprints[1]}"):
        copy(other, target)
    copy(small_store, target)  # the copy continues from an undamaged source with the same fingerprint


def test_a_folder_or_prefix_with_other_files_is_refused_and_not_changed(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("Dear")
    server.request("PUT", f"/photographs/{prefix}/letter.txt", b"Dear")
    for target in (tmp_path / "full", url):
        with pytest.raises(UserError, match="is not empty and holds no unfinished copy"):
            copy(small_store, target)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]
    assert server.objects(prefix) == {"letter.txt": b"Dear"}


def test_the_source_itself_is_refused(small_store: Path, copy: Copy, proxy: Proxy, url: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small_store)
    for source, target in ((small_store, tmp_path / "link"), (url, f"{url}/"), (small_store, f"file://{small_store}")):
        with pytest.raises(UserError, match="is the source itself"):
            copy(source, target)


def test_an_unfinished_copy_is_no_store_and_names_the_command(
    small_store: Path, copy: Copy, proxy: Proxy, url: str, tmp_path: Path
) -> None:
    shutil.copytree(small_store, tmp_path / "cut")
    (tmp_path / "cut" / "val" / "colour.json").write_text("{}")
    for target in (url, str(tmp_path / "copy")):
        with pytest.raises(UserError, match=r"colour\.json cannot be read"):
            copy(tmp_path / "cut", target)
        with pytest.raises(StoreError, match="a copy was not finished: run the same alexprep copy again"):
            copy(target, tmp_path / "third")
    with pytest.raises(StoreError, match="a copy was not finished: run the same alexprep copy again"):
        Store.open(tmp_path / "copy")


def test_a_source_that_changes_during_the_copy_is_noticed(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str, tmp_path: Path
) -> None:
    """The manifest of the source changes while the last file arrives."""
    other = other_store(small_store, tmp_path / "source")
    manifests = [(other / "manifest.json").read_bytes(), (small_store / "manifest.json").read_bytes()]

    def decide(request: Request) -> None:
        if request.method == "PUT" and request.path == f"{prefix}/val/inputs.jsonl":
            (other / "manifest.json").write_bytes(manifests[1])

    proxy.decide = decide
    with pytest.raises(UserError, match="the manifest changed during the copy"):
        copy(other, url)
    assert "manifest.json" not in server.objects(prefix)


def test_a_file_that_another_program_overwrites_during_the_copy_is_noticed(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str
) -> None:
    """A verified shard is replaced by other bytes of the same length. The next copy sends the shard again."""
    path = "train/00001/data.mdb"

    def decide(request: Request) -> None:
        if request.method == "PUT" and request.path == f"{prefix}/val/inputs.jsonl":
            server.request("PUT", f"/photographs/{prefix}/{path}", bytes((small_store / path).stat().st_size))

    proxy.decide = decide
    with pytest.raises(UserError, match=rf"1 file changed after the copy had verified them \(first: {path}\)"):
        copy(small_store, url)
    assert "manifest.json" not in server.objects(prefix)
    proxy.decide = lambda request: None
    assert copy(small_store, url).copied_files == 2  # the files that are copied again are the shard and the manifest
    assert server.objects(prefix)[path] == (small_store / path).read_bytes()


def test_two_stores_that_are_copied_to_one_prefix_at_the_same_time_are_noticed(
    small_store: Path, copy: Copy, proxy: Proxy, server: S3Server, url: str, prefix: str
) -> None:
    """The second command begins later, and replaces the source.json that the first command wrote."""

    def decide(request: Request) -> None:
        if request.method == "PUT" and request.path == f"{prefix}/val/inputs.jsonl":
            begun = {"manifest": "0" * 64, "fingerprint": "0" * 64, "name": "s3://elsewhere/store"}
            server.request("PUT", f"/photographs/{prefix}/.copy/source.json", json.dumps(begun).encode())

    proxy.decide = decide
    with pytest.raises(UserError, match="another command began a copy of s3://elsewhere/store here"):
        copy(small_store, url)
    assert "manifest.json" not in server.objects(prefix)


def test_a_manifest_whose_paths_leave_the_store_is_refused(
    small_store: Path, copy: Copy, proxy: Proxy, tmp_path: Path
) -> None:
    shutil.copytree(small_store, tmp_path / "evil")
    store = Store.open(tmp_path / "evil")
    for path in ("../../outside", "/etc", "train/../../x", "train//00000", "train/00000/deeper"):
        split = store.split("train")
        shards = (replace(split.shards[0], path=path), *split.shards[1:])
        replace(store, splits={**store.splits, "train": replace(split, shards=shards)}).save()
        with pytest.raises(StoreError, match=r"shards\.0\.path is .*, expected a path such as train/00000"):
            copy(tmp_path / "evil", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_changed_manifest_is_refused(small_store: Path, copy: Copy, proxy: Proxy, tmp_path: Path) -> None:
    shutil.copytree(small_store, tmp_path / "changed")
    path = tmp_path / "changed" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(StoreError, match=r"manifest\.json: was changed: checksum \w{64}, the file says \w{64}"):
        copy(tmp_path / "changed", tmp_path / "copy")


def test_a_file_that_is_far_too_large_is_refused_before_the_copy(
    small_store: Path, copy: Copy, proxy: Proxy, tmp_path: Path
) -> None:
    for name in ("mean_image.npy", "colour.json"):
        large = tmp_path / name / "large"
        shutil.copytree(small_store, large)
        os.truncate(large / "train" / name, 3_000_000_000)
        with pytest.raises(UserError, match=rf"train/{name} has 3,000,000,000 bytes, expected at most "):
            copy(large, tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
