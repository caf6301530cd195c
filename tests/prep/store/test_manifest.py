"""prep.store.manifest: fingerprints, and errors about damaged stores, with the found and the expected value.

The tests compute fingerprints independently, with hashlib and json.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from prep.store.manifest import ColorStats, Settings, Shard, Split, Store, StoreError

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "store"))


def change_manifest(store: Path, change: Change) -> None:
    """Change the content of manifest.json, and make its checksum and the fingerprint of the store correct again."""
    data = json.loads((store / "manifest.json").read_bytes())
    change(data)
    with suppress(AttributeError, KeyError, TypeError):  # after some changes, the fingerprint cannot be computed
        data["fingerprint"] = canonical_digest({name: split["fingerprint"] for name, split in data["splits"].items()})
    data.pop("checksum", None)
    (store / "manifest.json").write_text(json.dumps({**data, "checksum": canonical_digest(data)}))


def assert_refused(store: Path, *parts: str) -> None:
    """Assert that Store.open raises StoreError with a one-line message that contains all `parts`."""
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_saved_store_opens_unchanged(copied: Path) -> None:
    before = (copied / "manifest.json").read_bytes()
    opened = Store.open(copied)
    assert Store.open(str(copied)) == opened
    assert opened.settings == Settings(256, False, "jpeg", 90, "area", 0)
    assert list(opened.splits) == ["train", "val"]
    assert all(isinstance(s, Shard) for split in opened.splits.values() for s in split.shards)
    opened.save()
    assert (copied / "manifest.json").read_bytes() == before
    assert Store.open(copied) == opened


def test_another_schema_version_is_refused_with_both_numbers(copied: Path) -> None:
    change_manifest(copied, lambda data: data.update(schema=2))
    assert_refused(copied, "version 2", "version 1")
    change_manifest(copied, lambda data: data.pop("schema"))
    assert_refused(copied, "version null", "version 1")


def test_another_schema_is_refused_before_its_fields_are_read(copied: Path) -> None:
    (copied / "manifest.json").write_text(json.dumps({"kind": "alexnet-store", "schema": 7}))
    assert_refused(copied, "version 7", "version 1")


def test_the_manifest_of_another_program_is_refused(copied: Path) -> None:
    change_manifest(copied, lambda data: data.update(kind="other"))
    assert_refused(copied, "manifest.json", "not the manifest of an alexnet store")
    for text in ("[1, 2]", "3", '"text"', "null"):
        (copied / "manifest.json").write_text(text)
        assert_refused(copied, "not the manifest of an alexnet store")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such store", "alexprep build-lmdb")
    assert_refused(tmp_path, "no manifest.json", "not a store")
    (tmp_path / "train").mkdir()
    assert_refused(tmp_path, "no manifest.json", "a build was not finished")
    (tmp_path / "file").write_text("x")
    assert_refused(tmp_path / "file", "no manifest.json")


@pytest.mark.parametrize("content", [b"", b"{", b'{"kind": "alexnet-store", "sche', b"\xff\xfe\x00", b"not json"])
def test_a_manifest_that_is_not_json_is_refused(copied: Path, content: bytes) -> None:
    (copied / "manifest.json").write_bytes(content)
    assert_refused(copied, "manifest.json", "cannot be read", "Build the store again")


def test_a_truncated_manifest_is_refused(copied: Path) -> None:
    whole = (copied / "manifest.json").read_bytes()
    for length in range(0, len(whole), 97):
        (copied / "manifest.json").write_bytes(whole[:length])
        assert_refused(copied, "cannot be read")


@pytest.mark.parametrize("name", ["settings", "tools", "classes", "splits"])
def test_a_manifest_without_one_of_its_parts_is_refused(copied: Path, name: str) -> None:
    change_manifest(copied, lambda data: data.pop(name))
    assert_refused(copied, "manifest.json", name, "damaged")


@pytest.mark.parametrize(
    ("cls", "find"),
    [
        (Settings, lambda data: data["settings"]),
        (Split, lambda data: data["splits"]["val"]),
        (Shard, lambda data: data["splits"]["train"]["shards"][0]),
    ],
)
def test_a_missing_or_unknown_field_is_refused(
    copied: Path, cls: type, find: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    whole = (copied / "manifest.json").read_bytes()
    for field in fields(cls):
        if field.name in ("background", "reduce_above", "extra"):  # manifests of older versions lack these fields
            continue
        (copied / "manifest.json").write_bytes(whole)
        change_manifest(copied, lambda data, name=field.name: find(data).pop(name))
        assert_refused(copied, "manifest.json", field.name, "damaged")
    (copied / "manifest.json").write_bytes(whole)
    change_manifest(copied, lambda data: find(data).update(colour_space="sRGB"))
    assert_refused(copied, "colour_space", "expected", "damaged")


def test_settings_that_older_manifests_lack_are_what_older_versions_did(copied: Path) -> None:
    assert Store.open(copied).settings.background == "white"
    change_manifest(copied, lambda data: data["settings"].pop("background"))
    older = Store.open(copied)
    assert (older.settings.background, older.settings.reduce_above) == ("dropped", 0)
    older.save()
    assert "background" not in json.loads((copied / "manifest.json").read_bytes())["settings"]


@pytest.mark.parametrize("value", [None, 3, "text", [], [1], {"a": 1}, {"a": {}}, [["a"]]])
def test_a_part_of_another_type_raises_only_store_error(copied: Path, value: object) -> None:
    """Store.open either accepts the value or raises StoreError, and never raises another exception."""
    whole = (copied / "manifest.json").read_bytes()
    changes: list[Change] = [
        lambda data: data.update(settings=value),
        lambda data: data.update(tools=value),
        lambda data: data.update(classes=value),
        lambda data: data.update(splits=value),
        lambda data: data["splits"].update(train=value),
        lambda data: data["splits"]["train"].update(shards=value),
    ]
    for change in changes:
        (copied / "manifest.json").write_bytes(whole)
        change_manifest(copied, change)
        try:
            Store.open(copied)
        except StoreError as error:
            assert "manifest.json" in str(error)


@pytest.mark.parametrize("value", [None, "text", [1], {"a": 1}, [["a"]]])
def test_classes_that_are_not_a_list_of_strings_are_refused(copied: Path, value: object) -> None:
    change_manifest(copied, lambda data: data.update(classes=value))
    with pytest.raises(StoreError, match="classes"):
        Store.open(copied)


def test_a_missing_shard_is_named(copied: Path) -> None:
    opened = Store.open(copied)
    assert opened.shard_paths("train") == [str(copied / "train" / "00000")]
    (copied / "train" / "00000" / "data.mdb").unlink()
    with pytest.raises(StoreError, match=r"train/00000/data\.mdb is missing"):
        opened.shard_paths("train")
    shutil.rmtree(copied / "train" / "00000")
    with pytest.raises(StoreError, match=r"train/00000/data\.mdb is missing"):
        opened.shard_paths("train")


def test_a_missing_split_is_named(copied: Path) -> None:
    change_manifest(copied, lambda data: data["splits"].pop("val"))
    opened = Store.open(copied)
    for method in (opened.split, opened.shard_paths, opened.color_stats):
        with pytest.raises(StoreError, match=r"no split val \(it has: train\)"):
            method("val")
    change_manifest(copied, lambda data: data.update(splits={}))
    with pytest.raises(StoreError, match="it has: none"):
        Store.open(copied).split("train")


def test_a_missing_or_damaged_colour_file_is_refused(copied: Path) -> None:
    opened = Store.open(copied)
    path = copied / "train" / "colour.json"
    whole = json.loads(path.read_bytes())
    stats = opened.color_stats("train")
    assert json.loads(json.dumps(asdict(stats))) == whole
    for field in fields(ColorStats):
        path.write_text(json.dumps({name: value for name, value in whole.items() if name != field.name}))
        with pytest.raises(StoreError, match=f"colour.json.*{field.name}"):
            opened.color_stats("train")
    for text in ("", "{", "[]"):
        path.write_text(text)
        with pytest.raises(StoreError, match=r"colour\.json"):
            opened.color_stats("train")
    path.unlink()
    with pytest.raises(StoreError, match=f"alexprep pca-stats --store {copied} --split train"):
        opened.color_stats("train")


def npy_bytes(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (npy_bytes(np.zeros((64, 64, 3), np.float32)), ["(64, 64, 3)", "(256, 256, 3)"]),
        (npy_bytes(np.zeros((256, 256, 3), np.float64)), ["float64", "float32"]),
        (npy_bytes(np.zeros((256, 256), np.float32)), ["(256, 256)", "(256, 256, 3)"]),
        (npy_bytes(np.zeros((256, 256, 3), np.float32))[:5000], ["4,872 bytes of data", "786,432"]),
        (npy_bytes(np.zeros((256, 256, 3), np.float32))[:50], ["cannot be read"]),
        (b"", ["cannot be read"]),
        (b"no array", ["cannot be read"]),
        (npy_bytes(np.array({"a": 1}, dtype=object)), ["object", "float32"]),
    ],
)
def test_a_damaged_mean_image_is_refused(copied: Path, content: bytes, parts: list[str]) -> None:
    opened = Store.open(copied)
    assert opened.mean_image("train").shape == (256, 256, 3)
    path = copied / "train" / "mean_image.npy"
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        opened.mean_image("train")
    for part in ["mean_image.npy", *parts]:
        assert part in str(caught.value)
    path.unlink()
    with pytest.raises(StoreError, match=r"mean_image\.npy"):
        opened.mean_image("train")


def canonical_digest(data: object) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def test_the_fingerprint_is_a_digest_of_all_records_and_class_names(store: Path) -> None:
    """The test computes the fingerprint from the LMDB files.

    First it computes the SHA-256 of the records of each shard, then the SHA-256 of these digests and the class names.
    """
    written = json.loads((store / "manifest.json").read_bytes())
    splits = {}
    for name in ("train", "val"):
        digests = []
        for folder in sorted((store / name).glob("[0-9]*")):
            digest = hashlib.sha256()
            with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as txn:
                for key, value in txn.cursor():
                    digest.update(key + len(value).to_bytes(8, "little") + value)
            digests.append(digest.hexdigest())
        assert [s["digest"] for s in written["splits"][name]["shards"]] == digests
        splits[name] = canonical_digest({"classes": written["classes"], "shards": digests})
        assert written["splits"][name]["fingerprint"] == splits[name]
    assert written["fingerprint"] == Store.open(store).fingerprint == canonical_digest(splits)
