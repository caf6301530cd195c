"""prep.inputs.folder: listings of small folders, and files that change after the listing.

Most images are empty files, because prep.inputs.folder lists files without opening them. The tests create real links,
FIFOs, sockets and odd names. If an entry is not listed, it must be in `refused`, with the reason.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from prep.console import UserError
from prep.images.codec import BadImage
from prep.inputs.folder import FolderReader
from prep.inputs.listing import Input
from tests.helpers.listings import list_images, paths_and_labels, touch


def test_classes_and_images_are_sorted_by_the_bytes_of_their_names(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n2/b.JPEG", "n2/a.JPEG", "n10/z.JPEG", "N3/x.png", "n1/ä.JPEG", "n1/z.JPEG")
    source = list_images(root, split="train")
    assert source.classes == ("N3", "n1", "n10", "n2")
    assert paths_and_labels(source) == [
        (b"N3/x.png", 0),
        (b"n1/z.JPEG", 1),
        ("n1/ä.JPEG".encode(), 1),
        (b"n10/z.JPEG", 2),
        (b"n2/a.JPEG", 3),
        (b"n2/b.JPEG", 3),
    ]
    assert (source.split, source.reader.root) == ("train", root)


def test_images_are_sorted_by_class_before_name(tmp_path: Path) -> None:
    """As a path, `n1-x/` sorts before `n1/`. As the name of a class, `n1-x` sorts after `n1`."""
    root = touch(tmp_path / "t", "n1/a.JPEG", "n1-x/a.JPEG")
    source = list_images(root)
    assert source.classes == ("n1", "n1-x")
    assert dict(paths_and_labels(source)) == {b"n1/a.JPEG": 0, b"n1-x/a.JPEG": 1}
    # The paths are sorted by class, then by name.
    assert [item.path for item in source.inputs] == [b"n1/a.JPEG", b"n1-x/a.JPEG"]


def test_names_that_begin_with_a_dot_are_ignored(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n1/.DS_Store", ".DS_Store", ".thumbs/x.JPEG")
    assert paths_and_labels(list_images(root)) == [(b"n1/a.JPEG", 0)]


def test_names_need_not_be_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / "t" / "n1"
    folder.mkdir(parents=True)
    (folder / "x").touch()
    with open(bytes(folder) + b"/\xff\xfe.JPEG", "wb"):
        pass
    assert paths_and_labels(list_images(folder.parent)) == [(b"n1/x", 0), (b"n1/\xff\xfe.JPEG", 0)]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        list_images(tmp_path / "empty")


def test_class_folders_without_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t" / "n1").mkdir(parents=True)
    (tmp_path / "t" / "n2").mkdir()
    with pytest.raises(UserError, match="2 class folders without any file"):
        list_images(tmp_path / "t")


def folder_with_links(tmp_path: Path) -> Path:
    """Return a folder with links.

    Some links point to files and class folders inside and outside of the root. Other links point to nothing, to
    themselves, or to parent folders.
    """
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/b.JPEG")
    touch(tmp_path / "elsewhere", "x.JPEG", "n5/y.JPEG", "n5/z.JPEG")
    (root / "n1" / "a.JPEG").write_bytes(b"content of a")
    (tmp_path / "elsewhere" / "x.JPEG").write_bytes(b"content of x")
    os.symlink("a.JPEG", root / "n1" / "in.JPEG")
    os.symlink("../n1/a.JPEG", root / "n2" / "in.JPEG")
    os.symlink(root / "n2" / "b.JPEG", root / "n1" / "absolute.JPEG")
    touch(root / "n1", ".hidden/c.JPEG")
    os.symlink("n1/.hidden", root / "n3")
    os.symlink(tmp_path / "elsewhere" / "x.JPEG", root / "n1" / "out.JPEG")
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
    (b"n3/c.JPEG", 2),
]


def test_links_inside_the_root_are_listed_and_others_refused(tmp_path: Path) -> None:
    source = list_images(folder_with_links(tmp_path))
    assert source.classes == ("n1", "n2", "n3")
    assert paths_and_labels(source) == INSIDE
    refused = dict(source.refused)
    assert len(refused) == len(source.refused)
    assert set(refused) == {
        "n1/out.JPEG",
        "n1/dangling.JPEG",
        "n1/loop.JPEG",
        "n1/itself",
        "n2/above",
    }
    assert f"a symbolic link out of the source, to {tmp_path}/elsewhere/x.JPEG" in refused["n1/out.JPEG"]
    assert "--follow-links" in refused["n1/out.JPEG"]
    assert "No such file" in refused["n1/dangling.JPEG"]
    assert "symbolic links" in refused["n1/loop.JPEG"]  # a path with too many levels of links
    assert refused["n1/itself"] == "a folder, not a file"
    item = next(item for item in source.inputs if item.path == b"n2/in.JPEG")
    assert source.reader.read(item) == b"content of a"


def test_follow_links_lists_links_out_of_the_root(tmp_path: Path) -> None:
    root = folder_with_links(tmp_path)
    os.symlink("../elsewhere/n5", root / "n5")
    source = list_images(root, follow_links=True)
    assert source.classes == ("n1", "n2", "n3", "n5")
    more = [(b"n1/out.JPEG", 0), (b"n5/y.JPEG", 3), (b"n5/z.JPEG", 3)]
    assert sorted(paths_and_labels(source)) == sorted(INSIDE + more)
    assert {name for name, _ in source.refused} == {
        "n1/dangling.JPEG",
        "n1/loop.JPEG",
        "n1/itself",
        "n2/above",
    }
    item = next(item for item in source.inputs if item.path == b"n1/out.JPEG")
    assert source.reader.read(item) == b"content of x"


def test_class_folders_that_are_links_are_refused_unless_they_are_followed(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere", "n5/y.JPEG", "n6/z.JPEG", "notes.txt")
    for present in ([], ["n1/a.JPEG"], ["a/n1/a.JPEG", "b/n2/b.JPEG"]):
        root = touch(tmp_path / f"t{len(present)}", *present)
        root.mkdir(exist_ok=True)
        parent = root / "a" if len(present) == 2 else root
        os.symlink(elsewhere / "n5", parent / "n5")
        with pytest.raises(UserError, match=rf"1 class folder is a symbolic .*n5: .*to {elsewhere}/n5.*--follow-links"):
            list_images(root)
        assert "n5" in [name.rpartition("/")[2] for name in list_images(root, follow_links=True).classes]
    os.symlink(elsewhere / "n6", root / "a" / "n6")
    os.symlink(tmp_path / "not mounted", root / "b" / "n7")
    with pytest.raises(UserError, match="2 class folders are symbolic links"):
        list_images(root)
    with pytest.raises(UserError, match=r"b/n7: cannot be read: No such file"):
        list_images(root, follow_links=True)


def test_a_link_to_a_file_beside_class_folders_is_refused_by_name(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG")
    touch(tmp_path / "elsewhere", "notes.txt")
    os.symlink(tmp_path / "elsewhere" / "notes.txt", root / "notes.txt")
    source = list_images(root)
    assert (source.classes, [name for name, _ in source.ignored]) == (("n1",), ["notes.txt"])


def test_a_class_whose_photographs_are_links_is_refused(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG")
    touch(tmp_path / "elsewhere", "x.JPEG")
    (root / "n2").mkdir()
    os.symlink(tmp_path / "elsewhere" / "x.JPEG", root / "n2" / "x.JPEG")
    with pytest.raises(UserError, match=r"no photograph: n2\. n2/x\.JPEG: a symbolic link out .*--follow-links"):
        list_images(root)


def test_a_link_to_a_folder_around_it_is_refused(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "a/m/n1/a.JPEG", "b/m/n2/b.JPEG")
    os.symlink("..", root / "a" / "m" / "up")
    with pytest.raises(UserError, match=r"a/m/up links to a folder that contains the link"):
        list_images(root)


def test_a_link_to_a_folder_whose_name_begins_with_the_roots_leads_out(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG")
    touch(tmp_path / "t2", "b.JPEG")
    os.symlink(tmp_path / "t2" / "b.JPEG", root / "n1" / "b.JPEG")
    source = list_images(root)
    assert paths_and_labels(source) == [(b"n1/a.JPEG", 0)]
    assert [name for name, _ in source.refused] == ["n1/b.JPEG"]


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    root = touch(tmp_path / "real", "n1/a.JPEG")
    os.symlink("a.JPEG", root / "n1" / "b.JPEG")
    os.symlink("real", tmp_path / "named")
    source = list_images(tmp_path / "named")
    assert paths_and_labels(source) == [(b"n1/a.JPEG", 0), (b"n1/b.JPEG", 0)]
    assert source.refused == ()


def test_entries_that_are_not_files_are_refused_by_name(tmp_path: Path) -> None:
    root = touch(tmp_path / "t", "n1/a.JPEG", "n1/inner.JPEG/b.JPEG", "n1/notes/b.txt")
    os.mkfifo(root / "n1" / "fifo.JPEG")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "n1" / "socket.JPEG"))
        source = list_images(root)
    assert paths_and_labels(source) == [(b"n1/a.JPEG", 0)]
    assert source.classes == ("n1",)
    assert dict(source.refused) == {
        "n1/inner.JPEG": "a folder, not a file",
        "n1/fifo.JPEG": "a FIFO, not a file",
        "n1/socket.JPEG": "a socket, not a file",
        "fifo": "a FIFO, not a file",
    }
    assert source.ignored == (("n1/notes", "a folder inside a class folder, without photographs"),)


def test_odd_names_are_kept_byte_for_byte(tmp_path: Path) -> None:
    folder = tmp_path / "t" / "a class"
    folder.mkdir(parents=True)
    names = [b" ", b"a\nb.JPEG", b"a b.JPEG", b"\\x.JPEG", b"\xff\xfe.JPEG", b"x" * 255]
    for name in names:
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(b"content of " + name)
    os.mkfifo(os.fsencode(folder) + b"/fifo\n\xff")
    source = list_images(folder.parent)
    assert paths_and_labels(source) == [(b"a class/" + name, 0) for name in sorted(names)]
    assert [name for name, _ in source.refused] == ["a class/fifo\n\\xff"]
    for item in source.inputs:
        assert source.reader.read(item) == b"content of " + item.path.removeprefix(b"a class/")


def test_names_that_differ_in_case_are_different(tmp_path: Path) -> None:
    source = list_images(touch(tmp_path / "t", "a/x.JPEG", "A/x.JPEG", "A/X.JPEG"))
    assert source.classes == ("A", "a")
    assert paths_and_labels(source) == [(b"A/X.JPEG", 0), (b"A/x.JPEG", 0), (b"a/x.JPEG", 1)]


def test_an_unreadable_class_folder_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test replaces os.scandir by a function that fails, because the user root can read every folder."""
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/a.JPEG", "n3/a.JPEG")
    scandir = os.scandir

    def refusing(folder: bytes | Path) -> object:
        if os.fsencode(folder).endswith(b"n2"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"n2.*Permission denied"):
        list_images(root)


def folder_of_one(root: Path) -> tuple[FolderReader, Input]:
    (root / "n1").mkdir(parents=True)
    (root / "n1" / "a.JPEG").write_bytes(b"content of a")
    source = list_images(root)
    assert isinstance(source.reader, FolderReader)
    return source.reader, source.inputs[0]


def test_a_listed_file_is_read(tmp_path: Path) -> None:
    reader, item = folder_of_one(tmp_path / "t")
    status = (tmp_path / "t" / "n1" / "a.JPEG").stat()
    assert (item.size, item.mtime_ns) == (12, status.st_mtime_ns)
    assert reader.read(item) == b"content of a"
    assert [reader.head(item, size) for size in (0, 4, 100)] == [b"", b"cont", b"content of a"]


def test_a_file_that_changed_after_the_listing_is_an_error(tmp_path: Path) -> None:
    reader, item = folder_of_one(tmp_path / "t")
    path = tmp_path / "t" / "n1" / "a.JPEG"
    path.write_bytes(b"content of b, which is longer")
    with pytest.raises(UserError, match=r"n1/a\.JPEG was changed after it was listed: 12 bytes then, 29 now"):
        reader.read(item)
    path.write_bytes(b"content of b")
    os.utime(path, ns=(0, item.mtime_ns + 1))
    with pytest.raises(UserError, match="was changed"):
        reader.read(item)
    os.utime(path, ns=(0, item.mtime_ns))
    assert reader.read(item) == b"content of b"  # size and modification time are as listed, so there is no error


def test_a_removed_file_is_a_bad_image(tmp_path: Path) -> None:
    reader, item = folder_of_one(tmp_path / "t")
    (tmp_path / "t" / "n1" / "a.JPEG").unlink()
    for read in (reader.read, lambda item: reader.head(item, 4)):
        with pytest.raises(BadImage, match="cannot be read: No such file"):
            read(item)


@pytest.mark.usefixtures("one_minute_timeout")
def test_a_fifo_that_replaced_a_file_does_not_block(tmp_path: Path) -> None:
    reader, item = folder_of_one(tmp_path / "t")
    path = tmp_path / "t" / "n1" / "a.JPEG"
    for make, kind in ((os.mkfifo, "FIFO"), (os.mkdir, "folder")):
        path.unlink()
        make(path)
        with pytest.raises((UserError, BadImage), match=r"was changed|Is a directory"):
            reader.read(item)
        with pytest.raises(BadImage, match=f"a {kind}, not a file|Is a directory"):
            reader.head(item, 4)
        status = path.stat()
        # `same` has the size and time of the new FIFO or folder, so only the kind of file shows the change.
        same = replace(item, size=status.st_size, mtime_ns=status.st_mtime_ns)
        with pytest.raises(BadImage, match=f"a {kind}, not a file|Is a directory"):
            reader.read(same)
        if kind == "FIFO":
            continue
        path.rmdir()
        path.touch()


def test_two_class_folders_that_are_the_same_folder_are_refused(tmp_path: Path) -> None:
    """A link `tench -> n01440764` gives a class a second, readable name. Each photograph would then get two labels."""
    root = touch(tmp_path / "t", "n1/a.JPEG", "n2/b.JPEG")
    os.symlink("n1", root / "tench")
    for follow_links in (False, True):
        with pytest.raises(UserError, match=r"class folders n1 and tench are the same folder.*two labels"):
            list_images(root, follow_links=follow_links)


def test_names_of_windows_and_nas_drives_are_no_classes_and_no_photographs(tmp_path: Path) -> None:
    junk = ("RECYCLER/x.JPEG", "$RECYCLE.BIN/x.JPEG", "~snapshot/x.JPEG", "n1/a.JPEG:Zone.Identifier", "Desktop DB")
    source = list_images(touch(tmp_path / "t", "n1/a.JPEG", "recycler/b.JPEG", *junk))
    assert source.classes == ("n1", "recycler")
    assert len(source.inputs) == 2 and len(source.ignored) == 5
