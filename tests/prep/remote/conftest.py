"""Fixtures: an S3 server, a proxy in front of the server, a store of four shards, and a function that copies stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from prep.console import Progress
from prep.remote import folder, object_store
from prep.remote.copy_store import CopyResult, planned_copy, run_copy
from prep.remote.urls import open_folder
from tests.helpers.building import InlineRunner, build, make_pictures
from tests.prep.remote.s3_server import BUCKET, Proxy, S3Server

Copy = Callable[[object, object], CopyResult]


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    started = S3Server()
    yield started
    started.kill()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy that causes no faults. obstore sends its requests to the proxy, and sends a file in parts of 128 KiB."""
    started = Proxy(server)
    for variable, value in (
        ("AWS_ENDPOINT_URL", started.url),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_REGION", "us-east-1"),
        ("HOME", str(tmp_path)),
    ):
        monkeypatch.setenv(variable, value)
    for module in (folder, object_store):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 17)
    monkeypatch.setattr(object_store, "WAITS_S", (0.01,) * 6)
    monkeypatch.setattr(object_store, "INNER_RETRIES", {"max_retries": 0})
    open_folder.cache_clear()
    yield started
    open_folder.cache_clear()
    started.close()


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 192 training images, in three shards of about 200 kB, and 12 validation images, in one shard."""
    work = tmp_path_factory.mktemp("copied")
    photos = make_pictures(work / "photos", 192, (32, 40))
    build(photos, work / "store")
    kept = sorted(photos.glob("*/*"))[::16]
    for path in set(photos.glob("*/*")).difference(kept):
        path.unlink()
    build(photos, work / "store", split="val")
    return work / "store"


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix of the bucket that no other test uses."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)


@pytest.fixture
def url(prefix: str) -> str:
    return f"s3://{BUCKET}/{prefix}"


@pytest.fixture
def copy() -> Copy:
    """copy(source, target) runs a copy in this process."""

    def run(source: object, target: object) -> CopyResult:
        with planned_copy(str(source), str(target)) as plan:
            return run_copy(plan, InlineRunner(), Progress(plan.size_bytes, "MB"))

    return run


def put_store(server: S3Server, prefix: str, store: Path) -> None:
    """Write the files of a store and SHA256SUMS to the bucket, without the code that is tested."""
    files = contents(store)
    sums = "".join(f"{sha256(content).hexdigest()}  {path}\n" for path, content in files.items())
    for path, content in {**files, "SHA256SUMS": sums.encode()}.items():
        server.request("PUT", f"/{BUCKET}/{prefix}/{path}", content)


def contents(root: Path) -> dict[str, bytes]:
    """Return {path: content} of all files of a folder except its lock file."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
