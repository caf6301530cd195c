"""prep.inputs.archive: members that are refused and named, damaged archives, and files that are no archives.

If an archive is damaged, every image is listed or refused, or the command ends with a one-line error.
test_tar_members.py tests more kinds of damage.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from prep.console import UserError
from prep.images.codec import BadImage
from prep.inputs.archive import TarReader
from prep.store.manifest import Store
from tests.helpers.tars import (
    BLOCK,
    DAMAGED,
    MEMBER_BYTES,
    THREE,
    A,
    B,
    C,
    Member,
    header,
    list_tar,
    names_of,
    overwritten,
    tar_of,
    train_members,
)
from tests.prep.inputs.test_archive import alexprep

pytestmark = pytest.mark.usefixtures("one_minute_timeout")


ODD: dict[str, tuple[Member, str]] = {
    "../x.JPEG": (("../x.JPEG", A), "leads out"),
    "n1/../../x.JPEG": (("n1/../../x.JPEG", A), "leads out"),
    "/etc/x.JPEG": (("/etc/x.JPEG", A), "leads out"),
    "n1//x.JPEG": (("n1//x.JPEG", A), "leads out"),
    "n1/symbolic": (("n1/symbolic", b"", {"type": tarfile.SYMTYPE, "linkname": "a.JPEG"}), "a link"),
    "n1/out": (("n1/out", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), "a link"),
    "n1/hard": (("n1/hard", b"", {"type": tarfile.LNKTYPE, "linkname": "n1/a.JPEG"}), "a link"),
    "n1/character": (("n1/character", b"", {"type": tarfile.CHRTYPE}), "neither"),
    "n1/block": (("n1/block", b"", {"type": tarfile.BLKTYPE}), "neither"),
    "n1/fifo": (("n1/fifo", b"", {"type": tarfile.FIFOTYPE}), "neither"),
    "n1/unknown": (("n1/unknown", A, {"type": b"Z"}), "neither"),
    "n1/volume": (("n1/volume", b"", {"type": b"V"}), "neither"),
}


@pytest.mark.parametrize("name", list(ODD))
def test_unsafe_and_special_members_are_refused_by_name(name: str, tmp_path: Path) -> None:
    member, reason = ODD[name]
    for position in range(4):  # wherever the refused member is, all other members are listed
        found = list_tar(tar_of([*THREE[:position], member, *THREE[position:]]), tmp_path / "x.tar")
        assert names_of(found) == ["n1/a.JPEG", "n1/b.JPEG", "n2/c.JPEG"]
        assert found.classes == ("n1", "n2")
        assert [refused for refused, _ in found.refused] == [name]
        assert reason in found.refused[0][1]


def test_sparse_members_are_refused_by_name(tmp_path: Path) -> None:
    """A sparse member is stored without its blocks of zeros.

    The program reads members directly from the archive, and cannot read such a member.
    """
    old = header(b"n1/old.JPEG", b"00000000000\0", b"S")
    for fields in ({"GNU.sparse.map": "0,10", "GNU.sparse.size": "700", "GNU.sparse.name": "n1/new.JPEG"},):
        new = tar_of([("n1/new.JPEG", A, {"pax_headers": fields}), *THREE], tarfile.PAX_FORMAT)
        found = list_tar(old + new, tmp_path / "x.tar")
        assert names_of(found) == ["n1/a.JPEG", "n1/b.JPEG", "n2/c.JPEG"]
        assert dict(found.refused) == dict.fromkeys(("n1/old.JPEG", "n1/new.JPEG"), "neither a plain file nor a folder")


def test_of_members_with_the_same_name_the_last_counts(tmp_path: Path) -> None:
    """If several members have the same name, the last one is listed, and the earlier ones are refused.

    If the program tar extracts such an archive, only the last of these members remains.
    """
    members: list[Member] = [*THREE, ("./n1/a.JPEG", b"newer"), ("n1/a.JPEG", b"newest")]
    found = list_tar(tar_of(members), tmp_path / "x.tar")
    assert names_of(found) == ["n1/a.JPEG", "n1/b.JPEG", "n2/c.JPEG"]
    assert TarReader(tmp_path / "x.tar").read(found.listing[0]) == b"newest"
    reason = "another member of the same name follows in the archive"
    assert found.refused == (("n1/a.JPEG", reason), ("n1/a.JPEG", reason))


def test_a_name_of_many_folders_is_refused(tmp_path: Path) -> None:
    found = list_tar(tar_of([*THREE, ("a/" * 20000 + "x.JPEG", A)], tarfile.PAX_FORMAT), tmp_path / "x.tar")
    assert len(found.listing) == 3 and "more than 50 folders" in found.refused[0][1]


@pytest.mark.parametrize("damage", [name for name in DAMAGED if not name.startswith(("text", "another", "pax"))])
def test_a_damaged_inner_tar_is_one_line_that_names_the_archive(damage: str, tmp_path: Path) -> None:
    """The damage is inside one inner tar; the outer tar and its headers are undamaged."""
    inner = DAMAGED[damage][0](tar_of([(name.split("/")[1], content) for name, content, *_ in THREE]))
    content = tar_of([("n0.tar", tar_of([("x.JPEG", A)])), ("n1.tar", inner), ("n2.tar", tar_of([("y.JPEG", A)]))])
    with pytest.raises(UserError, match=r"x\.tar") as caught:
        list_tar(content, tmp_path / "x.tar")
    assert "\n" not in str(caught.value)


def test_every_cut_of_an_archive_is_an_error(tmp_path: Path) -> None:
    """A tar of folders, a tar of tars, and tars with long names are truncated to each multiple of 256 bytes.

    A truncated tar is an error, unless only padding is missing.
    """
    long = [("n1/" + "x" * 150 + name.split("/")[1], content) for name, content, *_ in THREE]
    tars = [("n1.tar", tar_of([("a.JPEG", A), ("b.JPEG", B)])), ("n2.tar", tar_of([("c.JPEG", C)]))]
    for content in (tar_of(THREE), tar_of(tars), tar_of(long), tar_of(long, tarfile.PAX_FORMAT)):
        end = len(content.rstrip(b"\0"))
        end += -end % BLOCK + BLOCK  # one block of zeros is a valid end, as in GNU tar
        expected = names_of(list_tar(content, tmp_path / "x.tar"))
        for length in range(0, len(content), 256):
            try:
                found = list_tar(content[:length], tmp_path / "x.tar")
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert length >= end
                assert names_of(found) == expected


def test_one_changed_byte_never_loses_an_image(tmp_path: Path) -> None:
    """After a change of one byte, there is an error, or each of the three images is listed or refused."""
    rng = np.random.default_rng(3)
    for content in (tar_of(THREE), tar_of([("n1.tar", tar_of(THREE[:2])), ("n2.tar", tar_of(THREE[2:]))])):
        for _ in range(300):
            at, new = int(rng.integers(0, 3 * MEMBER_BYTES)), rng.bytes(1)
            try:
                found = list_tar(overwritten(content, at, new), tmp_path / "x.tar")
            except UserError as error:
                assert "\n" not in str(error)
            else:
                assert len(found.listing) + len(found.refused) == 3


NOT_TARS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "not a tar archive"),
    "empty tar": (tar_of([]), "no image found"),
    "folders alone": (tar_of([("n1", b"", {"type": tarfile.DIRTYPE})]), "no image found"),
    "links alone": (tar_of([("n1/x", b"", {"type": tarfile.SYMTYPE, "linkname": "y"})]), "no image found"),
    "text": (b"hello, world\n", "not a tar archive"),
    "long text": (b"hello, world\n" * 999, "not a tar archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(900), "compressed"),
    "bzip2": (b"BZh91AY" + bytes(900), "compressed"),
    "xz": (b"\xfd7zXZ\0" + bytes(900), "compressed"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(900), "compressed"),
    "a picture": (b"\xff\xd8\xff\xe0" + bytes(range(256)) * 20, "not a tar archive"),
}


@pytest.mark.parametrize("what", list(NOT_TARS))
def test_a_file_without_images_or_not_a_tar_is_one_line(what: str, tmp_path: Path) -> None:
    """The command has exit code 1, prints a one-line error and creates no store."""
    content, part = NOT_TARS[what]
    (tmp_path / "x.tar").write_bytes(content)
    result = alexprep(tmp_path / "x.tar", "--store", tmp_path / "store", "--on-bad", "skip")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    assert not any(line.startswith("Error") for line in lines[:-1])
    assert part in lines[-1]
    assert str(tmp_path / "x.tar") in lines[-1]
    if part == "compressed":
        assert "Decompress" in lines[-1]
    assert not (tmp_path / "store" / "manifest.json").exists()
    if what not in ("empty tar", "folders alone", "links alone"):  # the same content is refused inside another tar
        inner: list[Member] = [("n1.tar", tar_of([("a.JPEG", A)])), ("n2.tar", content)]
        with pytest.raises(UserError, match=part if content else r"x\.tar"):
            list_tar(tar_of(inner), tmp_path / "x.tar")


def test_the_command_counts_and_names_refused_members(photo_folder: Path, tmp_path: Path) -> None:
    """With --on-bad fail, the error names one refused member.

    With --on-bad skip, inputs.jsonl lists all refused members.
    """
    members = train_members(photo_folder)
    odd = [member for name, (member, _) in ODD.items() if "folder" not in name]
    double: Member = (members[0][0], b"no picture at all")
    (tmp_path / "x.tar").write_bytes(tar_of([double, *odd, *members]))
    # In this archive, the class n1 has only links and special files, so the class is empty.
    options = (tmp_path / "x.tar", "--store", tmp_path / "store", "--allow-empty-classes")
    result = alexprep(*options)
    assert result.exit_code == 1
    assert f"{len(odd) + 1} inputs of {30 + len(odd) + 1} are not images" in result.stderr
    result = alexprep(*options, "--on-bad", "skip")
    assert result.exit_code == 0, result.output
    account = Store.open(tmp_path / "store").split("train").account
    assert (account["inputs"], account["kept"]) == (30 + len(odd) + 1, 30)
    assert sum(account["bad"].values()) == len(odd) + 1
    outcomes = (tmp_path / "store" / "train" / "inputs.jsonl").read_text()
    for name in (*[member[0] for member in odd], double[0]):
        assert f'{{"source": "{name}", "fate": "bad"' in outcomes


def test_an_archive_that_is_cut_after_the_listing_is_reported(tmp_path: Path) -> None:
    found = list_tar(tar_of(THREE), tmp_path / "x.tar")
    reader = TarReader(tmp_path / "x.tar")
    assert reader.read(found.listing[2]) == C
    os.truncate(tmp_path / "x.tar", 2 * MEMBER_BYTES + BLOCK + 100)
    assert reader.read(found.listing[1]) == B
    with pytest.raises(UserError, match="shorter"):
        reader.read(found.listing[2])


def test_an_archive_that_was_removed_is_reported(tmp_path: Path) -> None:
    found = list_tar(tar_of(THREE), tmp_path / "x.tar")
    (tmp_path / "x.tar").rename(tmp_path / "y.tar")
    with pytest.raises((UserError, BadImage), match="No such file"):
        TarReader(tmp_path / "x.tar").read(found.listing[0])
