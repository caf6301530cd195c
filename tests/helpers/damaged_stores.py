"""Stores of random images that are damaged on purpose, for the tests of prep.check.verify."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb

from prep.check.verify import verify_split
from prep.check.verify_shard import Fault
from prep.console import Progress
from prep.store.datum import Datum
from prep.store.lmdb_file import LmdbFile
from prep.store.manifest import Store
from prep.workers import WorkerPool

CLASSES = ("n0", "n1", "n2")
PAGE_BYTES = 4096  # page size of LMDB

Records = list[tuple[bytes, bytes]]
MakeStore = Callable[..., Path]


def faults_of(store: Path, workers: WorkerPool, split: str = "train", decode: bool = True) -> list[Fault]:
    return verify_split(Store.open(store), split, workers, Progress(1, "records"), decode)


def the_fault(store: Path, workers: WorkerPool, *parts: str) -> Fault:
    """Verify the split `train`, assert that there is exactly one fault, and return it.

    Also asserts that the text of the fault contains all `parts`.
    """
    faults = faults_of(store, workers)
    assert len(faults) == 1, faults
    for part in parts:
        assert part in faults[0].text()
    return faults[0]


def change_manifest(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply a change to manifest.json, and write the file with a correct checksum."""
    data = json.loads((store / "manifest.json").read_bytes())
    change(data)
    data.pop("checksum", None)
    (store / "manifest.json").write_text(json.dumps({**data, "checksum": canonical_digest(data)}))


def sign_again(store: Path) -> None:
    """Write correct fingerprints of the splits and of the store into manifest.json."""

    def sign(data: dict[str, Any]) -> None:
        for split in data["splits"].values():
            digests = [shard["digest"] for shard in split["shards"]]
            split["fingerprint"] = canonical_digest({"classes": data["classes"], "shards": digests})
        data["fingerprint"] = canonical_digest({name: split["fingerprint"] for name, split in data["splits"].items()})

    change_manifest(store, sign)


def cut_after_tree(shard: Path) -> None:
    """Cut data.mdb after the only page of its tree. Values that do not fit into this page are lost."""
    with LmdbFile(shard, "") as file:
        root = file.pages.tree.root
    assert root == 2, "the tree has more than one page"
    os.truncate(shard / "data.mdb", (root + 1) * PAGE_BYTES)


def canonical_digest(data: object) -> str:
    """Return the SHA-256 (hex) of the canonical JSON of a value, computed without prep.store."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def train_split(manifest: dict[str, Any]) -> dict[str, Any]:
    split: dict[str, Any] = manifest["splits"]["train"]
    return split


def read_records(folder: Path) -> Records:
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as txn:
        return [(bytes(key), bytes(value)) for key, value in txn.cursor()]


def replace_records(folder: Path, records: Records) -> None:
    """Replace the LMDB in `folder` by a new LMDB with the given records."""
    shutil.rmtree(folder)
    with lmdb.open(str(folder), map_size=1 << 26, lock=False) as env, env.begin(write=True) as txn:
        for key, value in records:
            txn.put(key, value)


def with_checksum(body: bytes) -> bytes:
    """Return the record `body` followed by a correct checksum."""
    return body + b"\xd5\x3e" + zlib.crc32(body).to_bytes(4, "little")


def changed_record(value: bytes, **fields: Any) -> bytes:
    """Return the record `value` with the new values `fields`, and with a correct checksum."""
    return replace(Datum.decode(value), **fields).encode()


def overwrite(file: Path, position: int, content: bytes) -> None:
    with open(file, "r+b") as handle:
        handle.seek(position)
        handle.write(content)


def lengthen_first_record(store: Path) -> None:
    """Set the length of the first record to 200 MB, which is beyond the end of the file."""
    file = store / "train" / "00000" / "data.mdb"
    content = file.read_bytes()
    # LMDB stores a record as a node: size of the value (low half, high half), flags, length of the key, key, value.
    node = content.index(b"\x08\x0000000000") + 2 - 8
    overwrite(file, node, (200_000_000).to_bytes(4, "little"))


def store_with_records(store: Path, copy: Path, records: Records, classes: list[str] | None = None) -> Path:
    """Return a copy of `store` whose only training shard holds `records`, and whose classes are `classes`."""
    shutil.copytree(store, copy)
    replace_records(copy / "train" / "00000", records)
    describe_shards(copy, [records], classes)
    return copy


def describe_shards(store: Path, shards: list[Records], classes: list[str] | None = None) -> None:
    """Write a consistent manifest.json for a store whose training shards hold `shards`.

    All records are counted under label 0, because the labels of the records may be wrong. Every shard gets the digest
    that the first shard had before.
    """
    manifest = json.loads((store / "manifest.json").read_bytes())
    split, settings = manifest["splits"]["train"], manifest["settings"]
    manifest["classes"] = manifest["classes"] if classes is None else classes
    first, count = split["shards"][0], sum(map(len, shards))
    sizes = [sum(len(value) for _, value in records) for records in shards]
    split["shards"] = [
        {**first, "path": f"train/{number:05d}", "records": len(records), "bytes": size}
        for number, (records, size) in enumerate(zip(shards, sizes, strict=True))
    ]
    pixels = split["pixels"] if settings["keep_aspect"] else count * settings["side_px"] ** 2
    split |= {"records": count, "bytes": sum(sizes), "pixels": pixels}
    for other in manifest["splits"].values():
        other["label_counts"] = [other["records"], *[0] * (len(manifest["classes"]) - 1)]
    split["account"] |= {"kept": count, "inputs": count + sum(split["account"]["bad"].values())}
    moments = split["moments"]
    split["moments"] = {
        "pixels": pixels,
        "total": [value * pixels // moments["pixels"] for value in moments["total"]],
        "outer": [[value * pixels // moments["pixels"] for value in row] for row in moments["outer"]],
    }
    (store / "manifest.json").write_text(json.dumps(manifest))
    sign_again(store)


def split_records(store: Path, split: str = "train") -> Records:
    """Return (key, value) of all records of a split."""
    return [record for folder in sorted((store / split).glob("[0-9]*")) for record in read_records(folder)]
