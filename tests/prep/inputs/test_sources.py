"""prep.inputs.sources against small folders written here, whose listing is known beforehand.

Nothing is opened but what a test reads itself, so most photographs are empty files. Links, FIFOs, sockets and odd names
are real ones. What is not taken must be in `refused`, by name and with the reason.
"""

from __future__ import annotations

import os
import socket
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from prep.console import UserError
from prep.images.codec import BadImage
from prep.inputs.folder import FolderReader
from prep.inputs.listing import Input
from prep.inputs.reader import Source
from prep.inputs.sources import find_splits, list_source


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def read(folder: Path, known: tuple[str, ...] = (), split: str = "train", follow_links: bool = False) -> Source:
    return list_source(folder, split, None, None, known, follow_links)


def pairs(source: Source) -> list[tuple[bytes, int]]:
    return [(item.path, item.label) for item in source.inputs]


def test_class_folders_are_sorted_by_bytes(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n2/b.JPEG", "n2/a.JPEG", "n10/z.JPEG", "N3/x.png", "n1/ä.JPEG", "n1/z.JPEG")
    source = read(root, split="train")
    assert source.classes == ("N3", "n1", "n10", "n2")
    assert pairs(source) == [
        (b"N3/x.png", 0),
        (b"n1/z.JPEG", 1),
        ("n1/ä.JPEG".encode(), 1),
        (b"n10/z.JPEG", 2),
        (b"n2/a.JPEG", 3),
        (b"n2/b.JPEG", 3),
    ]
    assert (source.split, source.reader.root) == ("train", root)


def test_a_folder_name_that_begins_another_keeps_its_label(tmp_path: Path) -> None:
    """'n1-x/' sorts before 'n1/' as a path but after it as a name."""
    root = touch(tmp_path / "t", "n1/a.JPEG", "n1-x/a.JPEG")
    source = read(root)
    assert source.classes == ("n1", "n1-x")
    assert dict(pairs(source)) == {b"n1/a.JPEG": 0, b"n1-x/a.JPEG": 1}
    assert [item.path for item in source.inputs] == [b"n1/a.JPEG", b"n1-x/a.JPEG"]  # by class, then by name


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n1/.DS_Store", ".DS_Store", ".thumbs/x.JPEG")
    assert pairs(read(root)) == [(b"n1/a.JPEG", 0)]


def test_a_class_without_photographs_keeps_its_number_and_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n3/c.JPEG")
    (root / "n2").mkdir()
    source = read(root)
    assert source.classes == ("n1", "n2", "n3")
    assert dict(pairs(source)) == {b"n1/a.JPEG": 0, b"n3/c.JPEG": 2}
    assert "n2" in capsys.readouterr().err


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "t" / "n1"
    folder.mkdir(parents=True)
    (folder / "x").touch()
    with open(bytes(folder) + b"/\xff\xfe.JPEG", "wb"):
        pass
    assert pairs(read(folder.parent)) == [(b"n1/x", 0), (b"n1/\xff\xfe.JPEG", 0)]


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        read(tmp_path / "empty")


def test_class_folders_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "t" / "n1").mkdir(parents=True)
    (tmp_path / "t" / "n2").mkdir()
    with pytest.raises(UserError, match="2 class folders and not one file"):
        read(tmp_path / "t")


def test_folders_and_files_side_by_side(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG", "README.txt")
    with pytest.raises(UserError, match=r"2 folders and 1 file side by side.*README\.txt"):
        read(root)


def test_class_folders_other_than_the_stores(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG")
    assert read(root, known=("n1", "n2")).classes == ("n1", "n2")
    with pytest.raises(UserError, match=r"2 classes, the store has 3 \(first that only one of them has: n3\)"):
        read(root, known=("n1", "n2", "n3"))
    with pytest.raises(UserError, match="Splits of one store share their classes"):
        read(root, known=("n2", "n1"))


def test_find_splits(tmp_path: Path) -> None:
    both = touch(tmp_path / "both", "train/n1/a.JPEG", "val/a.JPEG", "devkit/x")
    assert find_splits(both, None) == {"train": both / "train", "val": both / "val"}
    assert list(find_splits(both, None)) == ["train", "val"]
    assert find_splits(both, "val") == {"val": both / "val"}
    one = touch(tmp_path / "one", "train/n1/a.JPEG")
    assert find_splits(one, None) == {"train": one / "train"}
    with pytest.raises(UserError, match="has train but no val"):
        find_splits(one, "val")
    classes = touch(tmp_path / "classes", "n1/a.JPEG")
    assert find_splits(classes, None) == {"train": classes}
    assert find_splits(classes, "val") == {"val": classes}
    with pytest.raises(UserError, match="no such folder"):
        find_splits(tmp_path / "nowhere", None)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="not a folder or an archive"):
        find_splits(tmp_path / "fifo", None)


def test_find_splits_with_archives(tmp_path: Path) -> None:
    names = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
    source = touch(tmp_path / "ilsvrc", *names, "ILSVRC2012_devkit_t12/data/meta.mat", "ILSVRC2012_img_test.tar")
    assert find_splits(source, None) == {"train": source / names[0], "val": source / names[1]}
    assert find_splits(source, "val") == {"val": source / names[1]}
    for archive, split in ((names[0], "train"), (names[1], "val"), ("ILSVRC2012_img_test.tar", "train")):
        assert find_splits(source / archive, None) == {split: source / archive}
        assert find_splits(source / archive, "val") == {"val": source / archive}
    short = touch(tmp_path / "short", "train.tar", "val.tar")
    assert find_splits(short, None) == {"train": short / "train.tar", "val": short / "val.tar"}
    assert find_splits(short / "val.tar", None) == {"val": short / "val.tar"}
    mixed = touch(tmp_path / "mixed", "train/n1/a.JPEG", "val.tar", "train.tar")
    assert find_splits(mixed, None) == {"train": mixed / "train", "val": mixed / "val.tar"}


def links(tmp_path: Path) -> Path:
    """Links inside the root to a file and to a class, out of it to both, to nothing, and to itself."""
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/b.JPEG")
    touch(tmp_path / "elsewhere", "x.JPEG", "n5/y.JPEG", "n5/z.JPEG")
    (root / "n1" / "a.JPEG").write_bytes(b"content of a")
    (tmp_path / "elsewhere" / "x.JPEG").write_bytes(b"content of x")
    os.symlink("a.JPEG", root / "n1" / "in.JPEG")
    os.symlink("../n1/a.JPEG", root / "n2" / "in.JPEG")
    os.symlink(root / "n2" / "b.JPEG", root / "n1" / "absolute.JPEG")
    os.symlink("n2", root / "n3")
    os.symlink(tmp_path / "elsewhere" / "x.JPEG", root / "n1" / "out.JPEG")
    os.symlink("../elsewhere/n5", root / "n5")
    os.symlink("nothing.JPEG", root / "n1" / "dangling.JPEG")
    os.symlink("loop.JPEG", root / "n1" / "loop.JPEG")
    os.symlink("../n1", root / "n1" / "itself")
    os.symlink("..", root / "n2" / "above")
    return root


INSIDE = [
    (b"n1/a.JPEG", 0),
    (b"n1/absolute.JPEG", 0),
    (b"n1/in.JPEG", 0),
    (b"n2/b.JPEG", 1),
    (b"n2/in.JPEG", 1),
    (b"n3/b.JPEG", 2),
    (b"n3/in.JPEG", 2),
]


def test_links_inside_the_root_are_taken_and_others_refused(tmp_path: Path) -> None:
    source = read(links(tmp_path))
    assert source.classes == ("n1", "n2", "n3")
    assert pairs(source) == INSIDE
    refused = dict(source.refused)
    assert len(refused) == len(source.refused)
    assert set(refused) == {
        "n5",
        "n1/out.JPEG",
        "n1/dangling.JPEG",
        "n1/loop.JPEG",
        "n1/itself",
        "n2/above",
        "n3/above",
    }
    for name, target in (("n1/out.JPEG", "elsewhere/x.JPEG"), ("n5", "elsewhere/n5")):
        assert f"a symbolic link out of the source, to {tmp_path}/{target}" in refused[name]
        assert "--follow-links" in refused[name]
    assert "No such file" in refused["n1/dangling.JPEG"]
    assert "symbolic links" in refused["n1/loop.JPEG"]  # too many levels of them
    assert refused["n1/itself"] == "a folder, not a file"
    item = next(item for item in source.inputs if item.path == b"n2/in.JPEG")
    assert source.reader.read(item) == b"content of a"


def test_links_out_of_the_root_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    source = read(links(tmp_path), follow_links=True)
    assert source.classes == ("n1", "n2", "n3", "n5")
    more = [(b"n1/out.JPEG", 0), (b"n5/y.JPEG", 3), (b"n5/z.JPEG", 3)]
    assert sorted(pairs(source)) == sorted(INSIDE + more)
    assert {name for name, _ in source.refused} == {
        "n1/dangling.JPEG",
        "n1/loop.JPEG",
        "n1/itself",
        "n2/above",
        "n3/above",
    }
    item = next(item for item in source.inputs if item.path == b"n1/out.JPEG")
    assert source.reader.read(item) == b"content of x"


def test_a_link_to_a_folder_whose_name_the_roots_begins_leads_out(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG")
    touch(tmp_path / "t2", "b.JPEG")
    os.symlink(tmp_path / "t2" / "b.JPEG", root / "n1" / "b.JPEG")
    source = read(root)
    assert pairs(source) == [(b"n1/a.JPEG", 0)]
    assert [name for name, _ in source.refused] == ["n1/b.JPEG"]


def test_a_root_that_is_a_link_is_taken(tmp_path: Path) -> None:
    root = touch(tmp_path / "real", "n1/a.JPEG")
    os.symlink("a.JPEG", root / "n1" / "b.JPEG")
    os.symlink("real", tmp_path / "named")
    source = read(tmp_path / "named")
    assert pairs(source) == [(b"n1/a.JPEG", 0), (b"n1/b.JPEG", 0)]
    assert source.refused == ()


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n1/inner/b.JPEG")
    os.mkfifo(root / "n1" / "fifo.JPEG")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "n1" / "socket.JPEG"))
        source = read(root)
    assert pairs(source) == [(b"n1/a.JPEG", 0)]
    assert source.classes == ("n1",)
    assert dict(source.refused) == {
        "n1/inner": "a folder, not a file",
        "n1/fifo.JPEG": "a FIFO, not a file",
        "n1/socket.JPEG": "a socket, not a file",
        "fifo": "a FIFO, not a file",
    }


def test_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "t" / "a class"
    folder.mkdir(parents=True)
    names = [b" ", b"a\nb.JPEG", b"a b.JPEG", b"\\x.JPEG", b"\xff\xfe.JPEG", b"x" * 255]
    for name in names:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(b"content of " + name)
    os.mkfifo(os.fsencode(folder) + b"/fifo\n\xff")
    source = read(folder.parent)
    assert pairs(source) == [(b"a class/" + name, 0) for name in sorted(names)]
    assert [name for name, _ in source.refused] == ["a class/fifo\n\\xff"]
    for item in source.inputs:
        assert source.reader.read(item) == b"content of " + item.path.removeprefix(b"a class/")


def test_names_that_differ_in_case_are_two(tmp_path: Path) -> None:
    source = read(touch(tmp_path / "t", "a/x.JPEG", "A/x.JPEG", "A/X.JPEG"))
    assert source.classes == ("A", "a")
    assert pairs(source) == [(b"A/X.JPEG", 0), (b"A/x.JPEG", 0), (b"a/x.JPEG", 1)]


def test_a_class_folder_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the operating system: root may read everything."""
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG", "n3/a.JPEG")
    scandir = os.scandir

    def refusing(folder: bytes) -> object:
        if folder.endswith(b"n2"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"n2.*Permission denied"):
        read(root)


def listed(root: Path) -> tuple[FolderReader, Input]:
    (root / "n1").mkdir(parents=True)
    (root / "n1" / "a.JPEG").write_bytes(b"content of a")
    source = read(root)
    assert isinstance(source.reader, FolderReader)
    return source.reader, source.inputs[0]


def test_a_file_is_read_as_it_was_listed(tmp_path: Path) -> None:
    place, item = listed(tmp_path / "t")
    status = (tmp_path / "t" / "n1" / "a.JPEG").stat()
    assert (item.size, item.mtime_ns) == (12, status.st_mtime_ns)
    assert place.read(item) == b"content of a"
    assert [place.head(item, size) for size in (0, 4, 100)] == [b"", b"cont", b"content of a"]


def test_a_file_that_changed_after_it_was_listed_is_said(tmp_path: Path) -> None:
    place, item = listed(tmp_path / "t")
    path = tmp_path / "t" / "n1" / "a.JPEG"
    path.write_bytes(b"content of b, which is longer")
    with pytest.raises(UserError, match=r"n1/a\.JPEG was changed after it was listed: 12 bytes then, 29 now"):
        place.read(item)
    path.write_bytes(b"content of b")
    os.utime(path, ns=(0, item.mtime_ns + 1))
    with pytest.raises(UserError, match="was changed"):
        place.read(item)
    os.utime(path, ns=(0, item.mtime_ns))
    assert place.read(item) == b"content of b"  # as far as can be known it is the one that was listed


def test_a_file_that_has_gone_is_bad(tmp_path: Path) -> None:
    place, item = listed(tmp_path / "t")
    (tmp_path / "t" / "n1" / "a.JPEG").unlink()
    for reading in (place.read, lambda it: place.head(it, 4)):
        with pytest.raises(BadImage, match="cannot be read: No such file"):
            reading(item)


@pytest.mark.usefixtures("bell")
def test_what_took_a_files_place_is_not_waited_for(tmp_path: Path) -> None:
    place, item = listed(tmp_path / "t")
    path = tmp_path / "t" / "n1" / "a.JPEG"
    for make, kind in ((os.mkfifo, "FIFO"), (os.mkdir, "folder")):
        path.unlink()
        make(path)
        with pytest.raises((UserError, BadImage), match=r"was changed|Is a directory"):
            place.read(item)
        with pytest.raises(BadImage, match=f"a {kind}, not a file|Is a directory"):
            place.head(item, 4)
        status = path.stat()
        same = replace(item, size=status.st_size, mtime_ns=status.st_mtime_ns)  # as a file system without times has it
        with pytest.raises(BadImage, match=f"a {kind}, not a file|Is a directory"):
            place.read(same)
        if kind == "FIFO":
            continue
        path.rmdir()
        path.touch()


def test_labels_are_not_needed_for_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG")
    (tmp_path / "labels.txt").write_text("a.JPEG 7\n")
    source = list_source(root, "train", tmp_path / "labels.txt", None, ())
    assert pairs(source) == [(b"n1/a.JPEG", 0), (b"n2/a.JPEG", 1)]
    assert "--labels is not needed" in capsys.readouterr().err


def test_a_tar_of_class_folders_lists_as_the_folder(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n2/b.JPEG", "n10/z.JPEG", "n1/a.JPEG", "n1/.hidden", "n1-x/a.JPEG")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(root, ".")
    folder, archive = read(root), read(tmp_path / "t.tar")
    assert archive.classes == folder.classes == ("n1", "n1-x", "n10", "n2")
    assert pairs(archive) == pairs(folder)
    with pytest.raises(UserError, match="4 classes, the store has 1"):
        read(tmp_path / "t.tar", known=("n1",))
