"""Tar archives for tests, and functions that list their members with alexprep.

Python's tarfile writes most of the archives. `header` makes headers that no library would write.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prep.inputs.archive import list_archive
from prep.inputs.reader import FoundInputs

BLOCK = 512
Member = tuple[str, bytes] | tuple[str, bytes, dict[str, Any]]

A, B, C = b"a" * 700, b"b" * 700, b"c" * 700
THREE: list[Member] = [("n1/a.JPEG", A), ("n1/b.JPEG", B), ("n2/c.JPEG", C)]
MEMBER_BYTES = 3 * BLOCK  # number of bytes in the archive for a member with 700 bytes of content


def tar_of(members: Sequence[Member], format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar archive. A member is (name, content) or (name, content, fields of the header)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content, *fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields[0].items() if fields else ():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """Return a header block of a tar file. `size` gives the 12 bytes of the size field."""
    block = bytearray(BLOCK)
    for at, field in ((0, name), (100, b"0000644\0"), (124, size), (148, b" " * 8), (156, kind), (257, b"ustar  \0")):
        block[at : at + len(field)] = field
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def overwritten(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def with_second_member(content: bytes, block: bytes) -> bytes:
    return content[:MEMBER_BYTES] + block + content[MEMBER_BYTES:]


def negative_size(size: int) -> bytes:
    """Return a size field with a negative number in base 256. GNU tar writes large sizes in base 256."""
    return b"\xff" + (256**11 + size).to_bytes(11, "big")


def pax_with_size(size: str, member: int = 0) -> bytes:
    """Return an archive of the members THREE. A PAX header states the size `size` for member number `member`."""
    members: list[Member] = list(THREE)
    name, content, *_ = members[member]
    members[member] = (name, content, {"pax_headers": {"size": size}})
    return tar_of(members, tarfile.PAX_FORMAT)


# Ways to damage an archive with the members THREE, each with a part of the expected error message.
DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in a header": (lambda tar: tar[: MEMBER_BYTES + 200], "byte"),
    "cut after a header": (lambda tar: tar[: MEMBER_BYTES + BLOCK], "truncated"),
    "cut in the data": (lambda tar: tar[: MEMBER_BYTES + BLOCK + 300], "truncated"),
    "cut in the padding": (lambda tar: tar[: 2 * MEMBER_BYTES - 100], "byte"),
    "cut between members": (lambda tar: tar[: 2 * MEMBER_BYTES], "truncated"),
    "cut after the last member": (lambda tar: tar[: 3 * MEMBER_BYTES], "truncated"),
    "one bit of a header": (lambda tar: overwritten(tar, MEMBER_BYTES + 10, b"\x07"), "damaged"),
    "a checksum": (lambda tar: overwritten(tar, MEMBER_BYTES + 148, b"777777"), "damaged"),
    "a header of zeros": (lambda tar: overwritten(tar, MEMBER_BYTES, bytes(BLOCK)), "damaged"),
    "two blocks of zeros": (lambda tar: overwritten(tar, MEMBER_BYTES, bytes(2 * BLOCK)), "damaged"),
    "a member of zeros": (lambda tar: overwritten(tar, MEMBER_BYTES, bytes(MEMBER_BYTES)), "damaged"),
    "a header of noise": (lambda tar: overwritten(tar, MEMBER_BYTES, bytes(range(256)) * 2), "damaged"),
    # A download program can create a file of the full size before it writes the content. If the program stops early,
    # the rest of the file is zeros.
    "zeros to a far end": (lambda tar: tar[: 2 * MEMBER_BYTES] + bytes(20 << 20), "truncated"),
    "another archive behind": (lambda tar: tar + tar_of([("n3/d.JPEG", A)]), "damaged"),
    "text behind": (lambda tar: tar + b"the end", "damaged"),
    "size beyond the end": (lambda tar: with_second_member(tar, header(b"n1/x.JPEG", b"77777777777\0")), "truncated"),
    "size of 2^88": (lambda tar: with_second_member(tar, header(b"n1/x.JPEG", b"\x80" + b"\x7f" * 11)), "truncated"),
    "size below zero": (lambda tar: with_second_member(tar, header(b"n1/x", negative_size(-BLOCK))), "damaged"),
    "size far below zero": (
        lambda tar: with_second_member(tar, header(b"n1/x", negative_size(-MEMBER_BYTES - BLOCK))),
        "damaged",
    ),
    "size that is not a number": (lambda tar: with_second_member(tar, header(b"n1/x", b"hello world\0")), "damaged"),
    "a name's size below zero": (
        lambda tar: with_second_member(tar, header(b"L", negative_size(-BLOCK), b"L")),
        "damaged",
    ),
    "a name's size beyond the end": (lambda tar: with_second_member(tar, header(b"L", b"77777777777\0", b"L")), "."),
    "pax size below zero": (lambda tar: pax_with_size("-1024"), "damaged"),
    "pax size below zero of the last member": (lambda tar: pax_with_size("-1024", -1), "damaged"),
    "pax size of 20 digits": (lambda tar: pax_with_size("9" * 20), "truncated"),
    "pax size of words": (lambda tar: pax_with_size("many"), "damaged"),
}


def train_members(root: Path) -> list[Member]:
    """Return the training images as (class/name, content), not sorted by name."""
    paths = sorted((root / "train").glob("*/*"), key=lambda path: path.name[::-1])
    return [(f"{path.parent.name}/{path.name}", path.read_bytes()) for path in paths]


def list_tar(content: bytes, path: Path) -> FoundInputs:
    path.write_bytes(content)
    return list_archive(path, False)


def names_of(found: FoundInputs) -> list[str]:
    return [item.path.decode("utf-8", "backslashreplace") for item in found.listing]
