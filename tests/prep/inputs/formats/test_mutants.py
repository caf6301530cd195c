"""Random damage to archives and lists.

A mutant is a copy of a file in which up to 20 places are changed. A change replaces, removes or inserts bytes or bits,
or overwrites 8 bytes with an extreme number. A mutant is listed, or gives a one-line error. A member of a mutated zip
archive has its original content, or cannot be read. The long test makes 1,000 mutants of each layout.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from prep.console import UserError
from prep.images.codec import BadImage
from prep.inputs.formats.layouts import find_splits
from prep.inputs.reader import ListOptions
from prep.inputs.sources import list_source
from tests.prep.inputs.formats.sample_data import LAYOUTS, make_pictures

EXTREME = (b"\xff" * 8, bytes(8), b"\x7f\xff\xff\xff" * 2)
SUFFIXES = (".zip", ".tar", ".parquet", ".csv", ".txt")


def mutant(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        near_end = rng.random() < 0.5  # zip and Parquet files have their directories near the end
        at = max(0, len(changed) - 1 - rng.randrange(800)) if near_end else rng.randrange(max(1, len(changed)))
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << rng.randrange(8)]) if at < len(changed) else b""
            case 2:
                del changed[at : at + rng.randrange(50)]
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(20))
            case 4:
                changed[at : at + 8] = rng.choice(EXTREME)
    return bytes(changed)


def read_all(source: Path, layout: str | None, contents: set[bytes]) -> bool:
    """List and read all inputs. Returns True if the inputs could be listed.

    For zip archives, asserts that the contents are unchanged, because a zip archive has a checksum of each member.
    """
    try:
        for split, where in find_splits(source, None, layout).items():
            listed = list_source(where, split, ListOptions(allow_empty_classes=True))
            for item in listed.inputs:
                try:
                    listed.reader.head(item, 8)
                    content = listed.reader.read(item)
                except BadImage:
                    continue
                assert where.layout != "zip" or content in contents
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


def try_mutants(name: str, count: int, folder: Path) -> None:
    pictures = {name: content[:300] for name, content in make_pictures().items()}
    source = LAYOUTS[name](pictures, folder / "source")
    files = sorted(path for path in [source, *source.rglob("*")] if path.is_file() and path.suffix in SUFFIXES)
    originals = {path: path.read_bytes() for path in files}
    rng = random.Random(zlib.crc32(name.encode()))
    layout = name.partition(",")[0]
    listed = 0
    for _ in range(count):
        path = rng.choice(files)
        path.write_bytes(mutant(originals[path], rng))
        listed += read_all(source, rng.choice((layout, None)), set(pictures.values()))
        path.write_bytes(originals[path])
    assert 0 < listed < count  # some mutants can be listed, and others cannot


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "folders"])
def test_a_few_mutants_of_each_layout(name: str, tmp_path: Path) -> None:
    try_mutants(name, 40, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "folders"])
def test_many_mutants_of_each_layout(name: str, tmp_path: Path) -> None:
    try_mutants(name, 1000, tmp_path)
