"""prep.inputs.formats.zip_archive: unsafe names are refused, and damage of the directory or of a member is found."""

from __future__ import annotations

import io
import stat
import warnings
import zipfile
from pathlib import Path

import pytest

from prep.console import UserError
from prep.images.codec import BadImage
from prep.inputs.formats.layouts import find_splits
from prep.inputs.formats.zip_archive import ZipReader, zip_contents, zip_layout
from prep.inputs.reader import Source
from prep.inputs.sources import list_source
from tests.helpers.listings import paths_and_labels

CONTENT = bytes(range(256)) * 300
Members = dict[str | zipfile.ZipInfo, bytes]


def zip_file(path: Path, members: Members, compression: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile prints a warning about two members with the same name
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content, compression)
    return path


def names_of(path: Path) -> list[bytes]:
    contents = zip_contents(path, b"", "train")
    return [contents.images.path(k) for k in range(len(contents.images))]


def test_unsafe_members_are_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("n1/link.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    pipe = zipfile.ZipInfo("n1/pipe.jpg")
    pipe.create_system, pipe.external_attr = 3, (stat.S_IFIFO | 0o666) << 16
    outside = {"../out.jpg": CONTENT, "/etc/out.jpg": CONTENT, "n1/../../out.jpg": CONTENT, "n1//a.jpg": CONTENT}
    path = zip_file(
        tmp_path / "x.zip", {**outside, link: b"/etc/passwd", pipe: b"", "n1/a.jpg": CONTENT, ".git/x": b"x"}
    )
    source = list_source(path, "train")
    assert [item.path for item in source.inputs] == [b"n1/a.jpg"]
    reasons = dict(source.refused)
    assert {name: reasons[name] for name in outside} == dict.fromkeys(outside, "the name leads out of the archive")
    assert reasons["n1/link.jpg"] == "a link, not a file"
    assert reasons["n1/pipe.jpg"] == "neither a plain file nor a folder"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.zip"]


def test_encrypted_members_and_unknown_methods_are_refused(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "x.zip", {"n1/a.jpg": CONTENT, "n1/b.jpg": CONTENT, "n1/c.jpg": CONTENT})
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 8] |= 1  # flags of the first directory entry
    entry = content.index(b"PK\1\2", entry + 1)
    content[entry + 10] = 93  # compression method of the second directory entry: Zstandard
    path.write_bytes(content)
    refused = dict(list_source(path, "train").refused)
    assert refused["n1/a.jpg"] == "encrypted"
    assert refused["n1/b.jpg"] == "compression method 93; expected stored, deflate, bzip2, lzma"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_is_a_bad_input(method: int, tmp_path: Path) -> None:
    path = zip_file(tmp_path / "x.zip", {"n1/a.jpg": CONTENT, "n1/b.jpg": CONTENT[::-1]}, method)
    first, second = list_source(path, "train").inputs
    assert ZipReader(path).read(first) == CONTENT and ZipReader(path).read(second) == CONTENT[::-1]
    content = bytearray(path.read_bytes())
    content[second.location - 60] ^= 0x10  # changes compressed bytes of the first member
    path.write_bytes(content)
    with pytest.raises(BadImage, match=r"CRC-32|damaged in the zip archive|bytes in the zip archive"):
        ZipReader(path).read(first)
    assert ZipReader(path).read(second) == CONTENT[::-1]


def test_a_wrong_size_is_noticed_and_limits_the_memory(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "x.zip", {"n1/a.jpg": bytes(10_000_000)}, zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    entry = content.index(b"PK\1\2")
    path.write_bytes(content[: entry + 24] + (1000).to_bytes(4, "little") + content[entry + 28 :])
    (item,) = list_source(path, "train").inputs
    with pytest.raises(BadImage, match="1,001 bytes in the zip archive, but its directory says 1,000"):
        ZipReader(path).read(item)


def test_a_damaged_archive_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = zip_file(tmp_path / "x.zip", {f"n1/{k}.jpg": CONTENT for k in range(5)})
    content = path.read_bytes()
    directory = content.index(b"PK\1\2")
    broken = [content[:size] for size in (0, 3, 30, directory, directory + 60, len(content) - 1)]
    broken += [content[:directory] + b"xx" + content[directory + 2 :], content[directory:], content[:-22] + bytes(22)]
    # Also change single bytes of the directory and of the end record.
    for size in range(directory, len(content), 7):
        broken.append(content[:size] + b"\xff" + content[size + 1 :])
    errors = 0
    for wrong in broken:
        path.write_bytes(wrong)
        try:
            source = list_source(path, "train")
        except UserError as error:
            assert "\n" not in str(error)
            errors += 1
        else:
            for item in source.inputs:
                try:
                    ZipReader(path).read(item)
                except BadImage:
                    errors += 1
    assert errors > 20
    path.write_bytes(broken[3])
    with pytest.raises(UserError, match=r"x\.zip is not a zip archive, or is damaged or truncated"):
        list_source(path, "train")


def test_archives_of_other_programs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two archives have names with é or a backslash.

    A third archive has a leading script, zip64 fields and a comment.
    """
    windows = zipfile.ZipInfo("n1/a.jpg")
    windows.create_system = 0
    path = zip_file(tmp_path / "plain.zip", {windows: CONTENT, "n1/é.jpg": CONTENT})
    plain = path.read_bytes()
    assert names_of(path) == [b"n1/a.jpg", "n1/é.jpg".encode()]
    path.write_bytes(plain.replace(b"n1/a.jpg", b"n1\\a.jpg"))
    assert names_of(path)[0] == b"n1/a.jpg"
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    out = io.BytesIO(b"#!/bin/sh\n" * 100)
    out.seek(0, 2)
    with zipfile.ZipFile(out, "a") as archive:
        archive.comment = b"made by a test"
        for name in ("n1/a.jpg", "n1/b.jpg", "n2/c.jpg"):
            archive.writestr(name, CONTENT)
    assert b"PK\6\6" in out.getvalue()
    path.write_bytes(out.getvalue())
    source: Source = list_source(path, "train")
    assert [ZipReader(path).read(item) == CONTENT for item in source.inputs] == [True] * 3
    assert source.classes == ("n1", "n2")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("limit", [None, 5])
def test_members_with_sizes_and_offsets_of_zip64_are_read(
    compression: int, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """force_zip64 puts zip64 fields into the headers of members.

    A small `limit` also puts zip64 fields into the directory.
    """
    if limit is not None:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    contents = {f"n{k % 2}/{k}.jpg": CONTENT + bytes([k]) * (50 * k) for k in range(4)}
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(content)
    directory = path.read_bytes().partition(b"PK\1\2")[2]
    assert (b"\xff\xff\xff\xff" in directory) == (limit is not None)
    source = list_source(path, "train")
    assert source.classes == ("n0", "n1") and not source.refused
    assert {item.path.decode(): ZipReader(path).read(item) for item in source.inputs} == contents


def test_splits_in_an_archive(tmp_path: Path) -> None:
    files = dict.fromkeys(("data/train/n1/a.jpg", "data/val/n1/b.jpg", "data/test/c.jpg", "data/readme.txt"), b"x")
    path = zip_file(tmp_path / "x.zip", {**files})
    assert zip_layout(path).splits == {"train": b"data/train/", "val": b"data/val/"}
    found = find_splits(path, None)
    assert [list_source(found[name], name).inputs[0].path for name in found] == [b"n1/a.jpg", b"n1/b.jpg"]
    assert (list_source(found["val"], "val").reader.root, found["val"].layout) == (path, "zip")
    assert list(find_splits(path, "val")) == ["val"]
    classes = dict.fromkeys(("airplane/a.jpg", "train/a.jpg"), b"x")
    assert zip_layout(zip_file(tmp_path / "y.zip", {**classes})).splits == {}


def test_the_zip_of_kaggle_is_read_with_its_labels(tmp_path: Path) -> None:
    base = "ILSVRC/Data/CLS-LOC"
    names = (f"{base}/train/n1/a.JPEG", f"{base}/train/n2/b.JPEG", f"{base}/val/1.JPEG", f"{base}/val/2.JPEG")
    files: Members = dict.fromkeys(
        (*names, f"{base}/test/3.JPEG", "ILSVRC/Annotations/CLS-LOC/train/n1/a.xml"), CONTENT
    )
    files["LOC_val_solution.csv"] = b"ImageId,PredictionString\n2,n1 1 2 3 4\n1,n2 1 2 3 4 n2 1 2 3 4\n"
    path = zip_file(tmp_path / "x.zip", files, zipfile.ZIP_DEFLATED)
    found = find_splits(path, None)
    assert find_splits(path, None, "kaggle") == found
    train = list_source(found["train"], "train")
    val = list_source(found["val"], "val", store_classes=train.classes)
    assert paths_and_labels(train) == [(b"n1/a.JPEG", 0), (b"n2/b.JPEG", 1)]
    assert paths_and_labels(val) == [(b"1.JPEG", 1), (b"2.JPEG", 0)]
    assert val.labels_from == tmp_path / "x.zip"
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[content.index(b"LOC_val_solution.csv") + 30] ^= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.zip: LOC_val_solution\.csv: .* Download the archive again"):
        list_source(found["val"], "val", store_classes=train.classes)


def test_a_class_of_refused_members_is_not_lost(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("n2/a.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    path = zip_file(tmp_path / "x.zip", {"n1/a.jpg": CONTENT, link: b"../n1/a.jpg", "n3/a.jpg": CONTENT})
    with pytest.raises(UserError, match=r"1 class has no photograph: n2\. n2/a\.jpg: a link, not a file"):
        list_source(path, "train")


def test_folders_of_the_same_split_and_of_a_test_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members: Members = {f"{split}/n1/a.jpg": CONTENT for split in ("train", "val", "test")}
    assert list(find_splits(zip_file(tmp_path / "x.zip", members), None)) == ["train", "val"]
    assert "the folder test/ is left out" in capsys.readouterr().err
    double = zip_file(tmp_path / "y.zip", {**members, "validation/n1/b.jpg": CONTENT})
    with pytest.raises(UserError, match="val/ and validation/ are both the split val"):
        find_splits(double, None)


def test_a_class_of_tiny_imagenet_without_images_is_refused(tmp_path: Path) -> None:
    members: Members = {f"t/train/n{k}/n{k}_boxes.txt": b"" for k in (1, 2, 3)}
    members |= {f"t/train/n{k}/images/{k}.JPEG": CONTENT for k in (1, 3)}
    with pytest.raises(UserError, match="1 class has no photograph: n2"):
        list_source(find_splits(zip_file(tmp_path / "x.zip", members), None)["train"], "train")
