"""prep.inputs.tar_members: damaged and truncated archives, files of other types, headers with a false, huge size.

The tests must pass with each Python version, because tarfile behaves differently in different versions.
"""

from __future__ import annotations

import gc
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from prep.console import Progress, UserError
from prep.inputs.tar_members import MAX_HEADER_BYTES, BoundedFile, iterate_members, name_bytes
from tests.helpers.tars import BLOCK, DAMAGED, MEMBER_BYTES, THREE, A, B, C, Member, header, overwritten, tar_of


def names_in(path: Path, start: int = 0, end: int | None = None) -> list[str]:
    end = path.stat().st_size if end is None else end
    with BoundedFile(path) as file:
        return [member.name for member in iterate_members(file, path, start, end, Progress(end, "bytes"))]


def written(content: bytes, folder: Path) -> Path:
    (folder / "x.tar").write_bytes(content)
    return folder / "x.tar"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_of_every_format_have_their_offsets(format: int, tmp_path: Path) -> None:
    content = tar_of(THREE, format)
    path = written(content, tmp_path)
    progress = Progress(len(content), "bytes")
    with BoundedFile(path) as file:
        members = list(iterate_members(file, path, 0, len(content), progress))
    assert [name_bytes(member).decode() for member in members] == [name for name, *_ in THREE]
    for member, expected in zip(members, (A, B, C), strict=True):
        assert content[member.offset_data : member.offset_data + member.size] == expected
    assert progress.done == members[-1].offset_data


def test_an_archive_inside_another_is_read_by_its_bytes(tmp_path: Path) -> None:
    """The test reads each inner archive before it continues with the next member of the outer archive."""
    inner = tar_of(THREE)
    path = written(tar_of([("1.tar", inner), ("2.tar", inner)]), tmp_path)
    size, names = path.stat().st_size, []
    with BoundedFile(path) as file:
        for member in iterate_members(file, path, 0, size, Progress(size, "bytes")):
            names.append(member.name)
            start = member.offset_data
            inside = iterate_members(file, path, start, start + member.size, Progress(size, "bytes"))
            names += [each.name for each in inside]
    three = [name for name, *_ in THREE]
    assert names == ["1.tar", *three, "2.tar", *three]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_archive_is_one_line_that_names_it(damage: str, tmp_path: Path) -> None:
    make, part = DAMAGED[damage]
    path = written(make(tar_of(THREE)), tmp_path)
    with pytest.raises(UserError) as caught:
        names_in(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.count(str(path)) == 1
    assert part in text


def test_every_cut_of_an_archive_is_an_error(tmp_path: Path) -> None:
    """A tar of folders, a tar of tars, and tars with long names are truncated to each multiple of 256 bytes.

    A truncated tar is an error, unless only padding is missing.
    """
    long = [("n1/" + "x" * 150 + name.split("/")[1], content) for name, content, *_ in THREE]
    tars = [("n1.tar", tar_of([("a.JPEG", A), ("b.JPEG", B)])), ("n2.tar", tar_of([("c.JPEG", C)]))]
    for content in (tar_of(THREE), tar_of(tars), tar_of(long), tar_of(long, tarfile.PAX_FORMAT)):
        end = len(content.rstrip(b"\0"))
        end += -end % BLOCK + BLOCK  # one block of zeros is a valid end, as in GNU tar
        expected = names_in(written(content, tmp_path))
        for length in range(0, len(content), 256):
            path = written(content[:length], tmp_path)
            try:
                names = names_in(path)
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert length >= end
                assert names == expected


def test_one_changed_byte_never_loses_a_member(tmp_path: Path) -> None:
    """After a change of one byte, there is an error, or the number of members stays the same."""
    rng = random.Random(3)
    content = tar_of(THREE)
    for _ in range(300):
        path = written(overwritten(content, rng.randrange(3 * MEMBER_BYTES), rng.randbytes(1)), tmp_path)
        try:
            names = names_in(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert len(names) == 3


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_claims_a_gigabyte_is_not_read(kind: bytes, tmp_path: Path) -> None:
    """tarfile tries to read a header of 1 GB, but BoundedFile refuses to read a header of more than 1 MiB.

    The file of the test is sparse: it is 2 GiB long, but needs almost no disk space.
    """
    path = written(tar_of(THREE[:1])[:MEMBER_BYTES] + header(b"x", b"%011o\0" % (1 << 30), kind), tmp_path)
    with open(path, "r+b") as file:
        file.truncate(2 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a header of more than 1,048,576 bytes"):
            names_in(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_HEADER_BYTES
    finally:
        tracemalloc.stop()


def test_a_long_name_below_the_bound_is_read(tmp_path: Path) -> None:
    name = "n1/" + "x" * (MAX_HEADER_BYTES - BLOCK)
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert names_in(written(tar_of([(name, A)], format), tmp_path)) == [name]


def test_members_are_not_kept(tmp_path: Path) -> None:
    """Of 2,000 TarInfo objects, fewer than 10 are in memory at the end. All objects of ImageNet would take 1 GB."""
    members: list[Member] = [(f"n1/{number}.JPEG", b"") for number in range(2000)]
    path = written(tar_of(members), tmp_path)
    size = path.stat().st_size
    gc.collect()
    with BoundedFile(path) as file:
        for member in iterate_members(file, path, 0, size, Progress(size, "bytes")):
            if member.name == "n1/1999.JPEG":
                break
        # isinstance() would read __class__, for which torch.distributed.reduce_op prints a warning.
        alive = sum(type(each) is tarfile.TarInfo for each in gc.get_objects())
    assert 1 <= alive < 10


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not a tar archive"),
        (b"hello, world\n", "not a tar archive"),
        (b"hello, world\n" * 999, "not a tar archive"),
        (b"\xff\xd8\xff\xe0" + bytes(range(256)) * 20, "not a tar archive"),
        (b"\x1f\x8b\x08" + bytes(900), "is compressed"),
        (b"BZh91AY" + bytes(900), "is compressed"),
        (b"\xfd7zXZ\0" + bytes(900), "is compressed"),
        (b"\x28\xb5\x2f\xfd" + bytes(900), "is compressed"),
    ],
)
def test_a_file_that_is_not_a_tar_is_refused(content: bytes, part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        names_in(written(content, tmp_path))
