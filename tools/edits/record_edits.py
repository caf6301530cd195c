"""Edits of a shard: changed records with correct checksums, and changed LMDB pages.

After most edits of records, manifest.json gets the new digest and sizes of the shard, and a correct checksum. Only the
contents of the records are then wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
from PIL import Image

from tools.edits.byte_edits import Apply

Records = list[tuple[bytes, bytes]]
Fields = dict[str, Any]
_TAGS = {"channels": 1, "height": 2, "width": 3, "data": 4, "label": 5, "encoded": 7, "source": 1001}
_MAP_BYTES = 64 << 20


def varint(number: int) -> bytes:
    """Return a number of 0 or more as a varint of protobuf."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        byte = content[at]
        number, shift, at = number | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return number, at


def parse(value: bytes) -> Fields:
    """Return {name of a field: value} for an intact record."""
    names = {number: name for name, number in _TAGS.items()}
    fields: Fields = {}
    at, end = 0, len(value) - 6
    while at < end:
        tag, at = _read_varint(value, at)
        number, at = _read_varint(value, at)
        if tag & 7 == 2:
            fields[names[tag >> 3]] = value[at : at + number]
            at += number
        else:
            fields[names[tag >> 3]] = number
    return fields


def serialized(fields: Fields, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return the bytes of a record with these fields and a correct checksum.

    before, after  bytes that are inserted before the first field and after the last field
    """
    body = bytearray(before)
    for name, number in _TAGS.items():
        content = fields.get(name)
        if isinstance(content, bytes):
            body += varint(number << 3 | 2) + varint(len(content)) + content
        elif content is not None:
            body += varint(number << 3) + varint(content)
    return signed(bytes(body + after))


def signed(body: bytes) -> bytes:
    """Return `body`, the bytes of a record without a checksum, followed by the checksum field."""
    return body + b"\xd5\x3e" + struct.pack("<I", zlib.crc32(body))


def record_edits() -> Iterator[tuple[str, Apply]]:
    """Yield pairs (kind, edit) for a data.mdb in a store. Each edit changes the first record of the shard."""
    numbers = {"0": 0, "2^31": 1 << 31, "2^32": 1 << 32, "2^63": 1 << 63, "2^64 - 1": (1 << 64) - 1}
    for name in ("channels", "height", "width", "label", "encoded"):
        for text, number in numbers.items():
            yield f"{name} {text}", _edit_fields({name: number})
        yield f"{name} missing", _edit_fields({name: None})
        yield f"{name} plus 1", _edit_number(name, 1)
    yield "label 3 of 3 classes", _edit_fields({"label": 3})
    for name, content in (("data", b""), ("data", b"text"), ("source", b"\x1b[31m\x9b31m"), ("source", b"\xff\0\n")):
        yield f"{name} {content!r}", _edit_fields({name: content})
    yield "source of 1 MB", _edit_fields({"source": b"x" * 1_000_000})
    yield "data missing", _edit_fields({"data": None})
    yield "source missing", _edit_fields({"source": None})
    for kind, payload in payloads().items():
        yield f"payload {kind}", _edit_fields({"data": payload})
    yield "payload truncated", _edit_value(lambda fields: serialized({**fields, "data": fields["data"][:200]}))
    yield "payload with other bytes", _edit_value(_with_random_payload)
    yield "two labels", _edit_value(lambda fields: serialized(fields, after=varint(5 << 3) + varint(2)))
    yield "two payloads", _edit_value(lambda fields: serialized(fields, before=b"\x22\x04text"))
    yield "unknown field", _edit_value(lambda fields: serialized(fields, after=varint(900 << 3) + varint(1)))
    yield "varint of 11 bytes", _edit_value(lambda fields: serialized(fields, before=b"\x28" + b"\x80" * 10 + b"\x01"))
    for text, size in (("past the end", 10**6), ("2^31", 1 << 31), ("2^63", 1 << 63), ("2^64 - 1", (1 << 64) - 1)):
        yield f"length {text}", _edit_value(lambda fields, size=size: signed(b"\x22" + varint(size) + b"xx"))  # type: ignore[misc]
    yield (
        "length past the end in the last field",
        _edit_value(lambda fields: serialized(fields, after=varint(900 << 3 | 2) + varint(100))),
    )
    yield "group field", _edit_value(lambda fields: serialized(fields, after=varint(900 << 3 | 3)))
    yield "value empty", _edit_value(lambda fields: b"")
    yield "value of 5 bytes", _edit_value(lambda fields: b"12345")
    yield "value of zeros", _edit_value(lambda fields: bytes(5000))
    yield "checksum wrong", _edit_value(lambda fields: serialized(fields)[:-1] + b"\0")
    yield "checksum missing", _edit_value(lambda fields: serialized(fields)[:-6])


def shard_edits() -> Iterator[tuple[str, Apply]]:
    """Yield pairs (kind, edit) for a data.mdb in a store. The edits change keys, order and number of the records."""
    yield (
        "first two values swapped",
        _edit_records(lambda records: [(records[0][0], records[1][1]), (records[1][0], records[0][1]), *records[2:]]),
    )
    yield "key of text", _edit_records(lambda records: [*records[:-1], (b"text", records[-1][1])])
    yield "key of escape codes", _edit_records(lambda records: [*records[:-1], (b"\x1b[31m", records[-1][1])])
    yield "key too large", _edit_records(lambda records: [*records[:-1], (b"99999999", records[-1][1])])
    yield "record removed", _edit_records(lambda records: records[1:])
    yield "record added", _edit_records(lambda records: [*records, (b"99999999", records[-1][1])])
    yield "no records", _edit_records(lambda records: [])
    yield "records of another store", _copy_other
    yield "records removed, manifest unchanged", _edit_records(lambda records: records[::2], sign=False)
    yield "value empty, manifest unchanged", _edit_records(lambda r: [(r[0][0], b""), *r[1:]], sign=False)


def page_edits() -> Iterator[tuple[str, Apply]]:
    """Yield pairs (kind, edit) for the pages of a data.mdb. The first two pages are header pages."""
    # Byte offsets in a header page (mdb.c of LMDB 0.9): magic 16, version 20, map size 32, last page 136, transaction
    # 144. Two database descriptions of 48 bytes begin at 40 and at 88. Byte offsets in a description: pad 0 (in the
    # first description: page size), flags 4, depth 6, branch pages 8, leaf pages 16, overflow pages 24, entries 32,
    # root 40.
    for name, offset, size in (
        *(("flags of page", 10, 2), ("magic", 16, 4), ("version", 20, 4), ("map size", 32, 8), ("page size", 40, 4)),
        *(("flags", 92, 2), ("depth", 94, 2), ("branch pages", 96, 8), ("leaf pages", 104, 8)),
        *(("overflow pages", 112, 8), ("entries", 120, 8), ("root", 128, 8), ("last page", 136, 8)),
        ("transaction", 144, 8),
    ):
        for text, number in (("0", 0), ("1", 1), ("largest", (1 << 8 * size) - 1), ("half", 1 << 8 * size - 2)):
            yield f"{name} {text}", lambda path, args=(offset, size, number): _set_header(path, *args)  # type: ignore[misc]
    for seed in range(40):
        yield f"random bytes in pages {seed}", lambda path, seed=seed: _damage_pages(path, seed)  # type: ignore[misc]


def payloads() -> dict[str, bytes]:
    """Return image files that are wrong as the payload of a record, if the store has JPEG images of 256 px."""

    def image(format: str, size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
        file = io.BytesIO()
        Image.new(mode, size, 128).save(file, format, **options)
        return file.getvalue()

    jpeg = image("JPEG", (256, 256))
    header = jpeg.index(b"\xff\xc0") + 5  # offset of the height; the height and the width have two bytes each
    bomb = jpeg[:header] + b"\xff\xdc\xff\xdc" + jpeg[header + 4 :]
    return {
        "PNG": image("PNG", (256, 256)),
        "PPM": image("PPM", (256, 256)),
        "GIF": image("GIF", (256, 256), "P"),
        "JPEG of 8 px": image("JPEG", (8, 8)),
        "JPEG of 2,000 px": image("JPEG", (2_000, 2_000)),
        "JPEG of 255 px": image("JPEG", (255, 256)),
        "grey JPEG": image("JPEG", (256, 256), "L"),
        "CMYK JPEG": image("JPEG", (256, 256), "CMYK"),
        "JPEG that claims 65,500 px": bomb,
        "JPEG of 12,000 px": image("JPEG", (12_000, 12_000), "L", quality=1),
        "JPEG without pixels": jpeg[: jpeg.index(b"\xff\xda")],
        "JPEG of 0 px": jpeg[:header] + bytes(4) + jpeg[header + 4 :],
    }


def _with_random_payload(fields: Fields) -> bytes:
    data = bytearray(fields["data"])
    for offset in random.Random(3).sample(range(300, len(data)), 40):
        data[offset] ^= 255
    return serialized({**fields, "data": bytes(data)})


def _edit_fields(changes: Fields) -> Apply:
    return _edit_value(lambda fields: serialized({**fields, **changes}))


def _edit_number(name: str, difference: int) -> Apply:
    return _edit_value(lambda fields: serialized({**fields, name: fields[name] + difference}))


def _edit_value(change: Callable[[Fields], bytes]) -> Apply:
    def edit(records: Records) -> Records:
        (key, value), *others = records
        return [(key, change(parse(value))), *others]

    return _edit_records(edit)


def _edit_records(change: Callable[[Records], Records], sign: bool = True) -> Apply:
    def apply(path: Path) -> None:
        with lmdb.open(str(path.parent), readonly=True, lock=False) as env, env.begin() as txn:
            records = [(bytes(key), bytes(value)) for key, value in txn.cursor()]
        changed = change(records)
        path.unlink()
        with lmdb.open(str(path.parent), map_size=_MAP_BYTES, lock=False) as env, env.begin(write=True) as txn:
            for key, value in changed:
                txn.put(key, value)
        path.with_name("lock.mdb").unlink(missing_ok=True)
        if sign:
            sign_manifest(path, sorted(changed))

    return apply


def sign_manifest(path: Path, records: Records) -> None:
    """Write a shard's digest, size and number of records into manifest.json, with correct fingerprints and checksum."""
    split_name, shard_name = path.parts[-3:-1]
    manifest = path.parents[2] / "manifest.json"
    data = json.loads(manifest.read_bytes())
    split = data["splits"][split_name]
    shard = next(shard for shard in split["shards"] if shard["path"] == f"{split_name}/{shard_name}")
    digest = hashlib.sha256()
    for key, value in records:
        digest.update(key + len(value).to_bytes(8, "little") + value)
    for name, number in (("records", len(records)), ("bytes", sum(len(value) for _, value in records))):
        split[name] += number - shard[name]
        shard[name] = number
    shard["digest"] = digest.hexdigest()
    _write_signed(manifest, data)


def sign_column(path: Path) -> None:
    """Write the digest of a file in the folder `extra` of a split into manifest.json, with correct fingerprints."""
    manifest = path.parents[2] / "manifest.json"
    data = json.loads(manifest.read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    data["splits"][path.parts[-3]]["account"]["files"][f"extra/{path.name}"] = digest
    _write_signed(manifest, data)


def _write_signed(manifest: Path, data: dict[str, Any]) -> None:
    """Write a manifest with the fingerprints and the checksum of its content (docs/store-format.md)."""
    for split in data["splits"].values():
        content = {"classes": data["classes"], "shards": [shard["digest"] for shard in split["shards"]]}
        if split.get("extra"):
            content["extra"] = {
                name: {
                    "type": field["type"],
                    "width": field["width"],
                    "files": [
                        split["account"]["files"][f"extra/{name}{end}"]
                        for end in ((".npy", ".offsets.npy") if field["type"] == "text" else (".npy",))
                    ],
                }
                for name, field in split["extra"].items()
            }
        split["fingerprint"] = digest_of(content)
    data["fingerprint"] = digest_of({name: each["fingerprint"] for name, each in data["splits"].items()})
    data.pop("checksum")
    manifest.write_text(json.dumps({**data, "checksum": digest_of(data)}))


def digest_of(data: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON (docs/store-format.md)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _copy_other(path: Path) -> None:
    other = path.parents[3] / "other" / Path(*path.parts[-3:])
    shutil.copyfile(other, path)
    with lmdb.open(str(path.parent), readonly=True, lock=False) as env, env.begin() as txn:
        records = [(bytes(key), bytes(value)) for key, value in txn.cursor()]
    sign_manifest(path, records)


def _set_header(path: Path, offset: int, size: int, number: int) -> None:
    content = bytearray(path.read_bytes())
    page_bytes = struct.unpack_from("<I", content, 40)[0]
    for page in (0, page_bytes):
        content[page + offset : page + offset + size] = number.to_bytes(size, "little")
    path.write_bytes(content)


def _damage_pages(path: Path, seed: int) -> None:
    """Change 20 random bytes: each is one of the first 64 bytes of a page after the two header pages."""
    rng, content = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(20):
        page = rng.randrange(2, len(content) // 4096)
        content[page * 4096 + rng.randrange(64)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    path.write_bytes(content)
