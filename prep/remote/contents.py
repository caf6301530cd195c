"""Lists the files of a store for `alexprep copy`, and checks each file against the manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from prep.check.verify import same_color_stats
from prep.images.color_stats import Moments, compute_color_stats
from prep.remote.folder import Folder
from prep.remote.journal import SOURCE
from prep.schema import file_sha256, read_regular
from prep.store import lmdb_shard
from prep.store.manifest import (
    MAX_COLOR_STATS_BYTES,
    ColorStats,
    Shard,
    Store,
    StoreError,
    extra_files,
    parse_color_stats,
    split_files,
)

MANIFEST = "manifest.json"
_MAX_NPY_HEADER_BYTES = 65_536
# Digests of all files, in the format of the program sha256sum. Only a store in object storage has this file.
CHECKSUMS = "SHA256SUMS"


class Damaged(Exception):
    """A file differs from the manifest. The message states the difference."""


@dataclass(frozen=True)
class StoreFile:
    """A file of a store, and its expected content. Exactly one of shard, color_stats and sha256 is set."""

    path: str  # path relative to the store
    shard: Shard | None = None  # for a data.mdb: the shard as the manifest describes it
    color_stats: ColorStats | None = None  # for a colour.json: statistics computed from the manifest's moments
    sha256: str = ""  # for any other file: SHA-256 (hex) from the manifest
    max_bytes: int | None = None  # largest size of an intact file; None if the manifest does not bound the size


def read_manifest(folder: Folder) -> tuple[Store, bytes]:
    """Return the store in `folder`, and the bytes of its manifest.

    Raises StoreError if the manifest is missing or damaged.
    """
    try:
        content = folder.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_remote:
            Store.open(folder.name)  # raises a StoreError that says what the folder contains
        unfinished = folder.states([SOURCE])
        hint = "a copy was not finished: run the same alexprep copy again" if unfinished else "not a store"
        raise StoreError(f"{folder.name}: the folder has no {MANIFEST} ({hint}).") from None
    store = Store.parse(Path(folder.name), content, folder.name)
    return store, content


def store_files(store: Store) -> list[StoreFile]:
    """Return all files of a store except its manifest. The shards come first."""
    files = [StoreFile(f"{shard.path}/data.mdb", shard) for split in store.splits.values() for shard in split.shards]
    for split_name, split in store.splits.items():
        digests = {file: split.account["files"][file] for file in split_files(split.extra)}
        max_bytes = {"mean_image.npy": _MAX_NPY_HEADER_BYTES + 4 * 3 * store.settings.side_px**2}
        for name, field in split.extra.items():
            sizes = (field.bytes, 8 * (split.records + 1))
            names = extra_files(name, field.type)
            max_bytes |= {file: _MAX_NPY_HEADER_BYTES + size for file, size in zip(names, sizes, strict=False)}
        stats = compute_color_stats(split.records, Moments.from_json(split.moments))
        files.append(StoreFile(f"{split_name}/colour.json", color_stats=stats, max_bytes=MAX_COLOR_STATS_BYTES))
        files += [
            StoreFile(f"{split_name}/{file}", sha256=digest, max_bytes=max_bytes.get(file))
            for file, digest in digests.items()
        ]
    return files


def check_content(file: StoreFile, path: Path) -> str:
    """Compare the local file `path` with `file`, its entry from the manifest. Returns the SHA-256 (hex) of the file.

    The path of a shard must end in data.mdb. Raises Damaged if the file differs from the manifest.
    """
    whole = file_sha256(path)
    if file.shard is not None:
        _check_shard(file.shard, path.parent)
    elif file.color_stats is not None:
        _check_color_stats(file.color_stats, path)
    elif whole != file.sha256:
        raise Damaged(f"{file.path}: SHA-256 {whole}, the manifest says {file.sha256}")
    return whole


def _check_shard(shard: Shard, folder: Path) -> None:
    digest, records, size_bytes = sha256(), 0, 0
    try:
        for key, value in lmdb_shard.read(folder):
            digest.update(key + len(value).to_bytes(8, "little"))
            digest.update(value)
            records, size_bytes = records + 1, size_bytes + len(value)
    except StoreError as error:
        raise Damaged(f"{shard.path}: {error}") from None
    for what, actual, expected in (
        ("records", records, shard.records),
        ("bytes", size_bytes, shard.bytes),
        ("digest", digest.hexdigest(), shard.digest),
    ):
        if actual != expected:
            raise Damaged(f"{shard.path}: {what} {actual}, the manifest says {expected}")


def _check_color_stats(expected: ColorStats, path: Path) -> None:
    try:
        same = same_color_stats(parse_color_stats(read_regular(path, MAX_COLOR_STATS_BYTES, ""), path.name), expected)
    except (StoreError, TypeError, ValueError) as error:
        raise Damaged(f"{path.name} cannot be read ({error})") from None
    if not same:
        raise Damaged(f"{path.name} differs from the statistics computed from the moments in the manifest")


def format_checksums(digests: dict[str, str]) -> bytes:
    """Return the content of a SHA256SUMS file, with one line for each path. `digests` is {path: SHA-256 (hex)}."""
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items())).encode()


def parse_checksums(content: bytes) -> dict[str, str]:
    """Parse a SHA256SUMS file into {path: SHA-256 (hex)}. Lines of another form are ignored."""
    lines = content.decode("utf-8", "replace").splitlines()
    matches = (re.fullmatch(r"([0-9a-f]{64})  (.+)", line) for line in lines)
    return {match[2]: match[1] for match in matches if match}
