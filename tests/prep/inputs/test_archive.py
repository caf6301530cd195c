"""prep.inputs.archive: tar archives of many layouts give the same store as folders with the same images.

test_bad_archives.py tests archives with damage, and members that are refused.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from scipy.io import savemat

from prep.cli import main
from prep.console import UserError
from prep.inputs.archive import TarReader, list_archive
from prep.inputs.classes import NO_CLASS, STRAY_FILE
from prep.inputs.reader import ListOptions
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from tests.helpers.listings import paths_and_labels, touch
from tests.helpers.tars import THREE, A, B, C, Member, list_tar, names_of, tar_of, train_members

pytestmark = pytest.mark.usefixtures("one_minute_timeout")


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, ["build-lmdb", *map(str, words), "--side", "32", "--jobs", "1"])


def fingerprint(source: Path, store: Path, *options: object) -> str:
    result = alexprep(source, "--store", store, *options)
    assert result.exit_code == 0, result.output
    return Store.open(store).fingerprint


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Return {path: (size, modification time)} of everything below `root`."""
    return {
        str(path.relative_to(root)): (status.st_size, status.st_mtime_ns)
        for path in root.rglob("*")
        if (status := path.lstat())
    }


@pytest.fixture(scope="module")
def by_folder(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the store that is built from `photo_folder`."""
    return fingerprint(photo_folder, tmp_path_factory.mktemp("by_folder") / "store")


def val_members(root: Path) -> list[Member]:
    return [(path.name, path.read_bytes()) for path in sorted((root / "val").iterdir(), reverse=True)]


def tar_of_tars(root: Path) -> bytes:
    """Return a tar of tars, like ILSVRC2012_img_train.tar."""
    inner: dict[str, list[Member]] = {}
    for member in train_members(root):
        folder, name = member[0].split("/")
        inner.setdefault(folder, []).append((name, member[1]))
    return tar_of([(f"{folder}.tar", tar_of(members)) for folder, members in inner.items()])


def make_ilsvrc_download(photo_folder: Path, root: Path) -> Path:
    """Write two archives and a devkit, as downloaded from image-net.org.

    The numbers of the classes are not in the order of the class names.
    """
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of_tars(photo_folder))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val_members(photo_folder)))
    numbers = {1: 3, 2: 1, 3: 2}  # {position of a class in sorted order, from 1: its ILSVRC2012_ID}
    names = sorted(path.name for path in (photo_folder / "train").iterdir())
    rows = [(number, names[position - 1], "words", 0) for position, number in numbers.items()]
    rows.append((4, "n00000044", "an inner node", 2))
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    savemat(data / "meta.mat", {"synsets": np.array(sorted(rows), dtype=kind).reshape(-1, 1)})
    classes = (photo_folder / "val.txt").read_text().split()[1::2]
    truth = [numbers[names.index(name) + 1] for name in classes]
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in truth))
    return root


def test_the_archives_of_ilsvrc_are_read_as_they_are(
    photo_folder: Path, by_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both splits are built from one SOURCE, and no file is written outside the store."""
    source = make_ilsvrc_download(photo_folder, tmp_path / "ilsvrc")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    before = tree(tmp_path)
    assert fingerprint(source, tmp_path / "store" / "s") == by_folder
    after = {name: status for name, status in tree(tmp_path).items() if not name.startswith("store")}
    assert after == {name: status for name, status in before.items() if name != "store"}
    built = Store.open(tmp_path / "store" / "s")
    assert [built.split(name).records for name in ("train", "val")] == [30, 12]


def prefixed(prefix: str) -> Callable[[Path], bytes]:
    def make(root: Path) -> bytes:
        folders = sorted({member[0].split("/")[0] for member in train_members(root)})
        entries: list[Member] = [(prefix + name, b"", {"type": tarfile.DIRTYPE}) for name in ("", *folders)]
        return tar_of([*entries, *[(prefix + member[0], member[1]) for member in train_members(root)]])

    return make


LAYOUTS: dict[str, Callable[[Path], bytes]] = {
    "class folders": lambda root: tar_of(train_members(root)),
    "ustar": lambda root: tar_of(train_members(root), tarfile.USTAR_FORMAT),
    "pax": lambda root: tar_of(
        [(name, content, {"pax_headers": {"comment": "x" * 900}}) for name, content, *_ in train_members(root)],
        tarfile.PAX_FORMAT,
    ),
    "./ before each name": prefixed("./"),
    "in a parent folder": prefixed("ILSVRC2012/train/"),
    "tar of tars": tar_of_tars,
    "tar of tars in a folder": lambda root: tar_of([("train/" + name, content) for name, content in inner_tars(root)]),
    "with hidden files of macOS": lambda root: tar_of(
        [
            ("._n00000011", b"no picture"),
            ("n00000011/.DS_Store", b"x"),
            (".Spotlight/x.JPEG", b"x"),
            *train_members(root),
        ]
    ),
}


def inner_tars(root: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(tar_of_tars(root))) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_an_archive_of_any_layout_lists_as_the_folder_does(layout: str, photo_folder: Path, tmp_path: Path) -> None:
    """Names, labels, sizes and order are the same as in a folder, and the bytes of each image are at its offset."""
    (tmp_path / "x.tar").write_bytes(LAYOUTS[layout](photo_folder))
    found = list_archive(tmp_path / "x.tar", False)
    files = sorted((path.parent.name, path.name, path) for path in (photo_folder / "train").glob("*/*"))
    assert found.classes == tuple(sorted({folder for folder, _, _ in files}))
    assert (found.is_flat, found.refused) == (False, ())
    assert [item.path.decode() for item in found.listing] == [f"{folder}/{name}" for folder, name, _ in files]
    assert [found.classes[item.label] for item in found.listing] == [folder for folder, _, _ in files]
    reader = TarReader(tmp_path / "x.tar")
    for item, (_, _, path) in zip(found.listing, files, strict=True):
        content = path.read_bytes()
        assert item.size == len(content)
        assert reader.read(item) == content
        assert reader.head(item, 8) == content[:8]


@pytest.mark.parametrize("layout", ["pax", "in a parent folder"])
def test_class_folders_in_a_tar_give_the_same_store(
    layout: str, photo_folder: Path, by_folder: str, tmp_path: Path
) -> None:
    (tmp_path / "train.tar").write_bytes(LAYOUTS[layout](photo_folder))
    (tmp_path / "val.tar").write_bytes(tar_of([("./" + member[0], member[1]) for member in val_members(photo_folder)]))
    (tmp_path / "val.txt").write_text((photo_folder / "val.txt").read_text())
    fingerprint(tmp_path / "train.tar", tmp_path / "store")
    assert fingerprint(tmp_path / "val.tar", tmp_path / "store") == by_folder


def test_labels_make_the_single_folder_of_a_tar_flat(photo_folder: Path, by_folder: str, tmp_path: Path) -> None:
    members = [("val/" + member[0], member[1]) for member in val_members(photo_folder)]
    (tmp_path / "v.tar").write_bytes(tar_of([("val", b"", {"type": tarfile.DIRTYPE}), *members]))
    fingerprint(photo_folder / "train", tmp_path / "store")
    truth = photo_folder / "val.txt"
    assert fingerprint(tmp_path / "v.tar", tmp_path / "store", "--split", "val", "--labels", truth) == by_folder


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_are_kept_byte_for_byte(format: int, tmp_path: Path) -> None:
    names = ["n1/" + "a" * 240 + ".JPEG", "n1/" + "é" * 120, "n1/a b\nc", "n1/\udcff\udcfe.JPEG", "n1/\\x.JPEG"]
    (tmp_path / "x.tar").write_bytes(tar_of([(name, name.encode("utf-8", "replace")) for name in names], format))
    found = list_archive(tmp_path / "x.tar", False)
    expected = {name.encode("utf-8", "surrogateescape"): name.encode("utf-8", "replace") for name in names}
    assert [item.path for item in found.listing] == sorted(expected)
    for item in found.listing:
        assert TarReader(tmp_path / "x.tar").read(item) == expected[item.path]


def test_inner_tars_with_the_same_name_are_one_class(tmp_path: Path) -> None:
    inner = [tar_of([("a.JPEG", A), ("b.JPEG", B)]), tar_of([("b.JPEG", C), ("c.JPEG", C)])]
    found = list_tar(tar_of([("n1.tar", inner[0]), ("n1.tar", inner[1])]), tmp_path / "x.tar")
    assert names_of(found) == ["n1/a.JPEG", "n1/b.JPEG", "n1/c.JPEG"]
    assert TarReader(tmp_path / "x.tar").read(found.listing[1]) == C
    assert [name for name, _ in found.refused] == ["n1/b.JPEG"]


def test_a_class_without_an_image_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    """A class without an image is an empty tar in a tar of tars, or a folder entry in a tar of folders."""
    empty = tar_of([("n1.tar", tar_of([("a.JPEG", A)])), ("n2.tar", tar_of([])), ("n3.tar", tar_of([("c.JPEG", C)]))])
    entry: Member = ("n2", b"", {"type": tarfile.DIRTYPE})
    for content in (empty, tar_of([("n1/a.JPEG", A), entry, ("n3/c.JPEG", C)])):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.tar: 1 class has no photograph: n2\..*--allow-empty-classes"):
            list_source(tmp_path / "x.tar", "train")
        source = list_source(tmp_path / "x.tar", "train", ListOptions(allow_empty_classes=True))
        assert source.classes == ("n1", "n2", "n3")
        assert [item.label for item in source.inputs] == [0, 2]


def test_class_folders_in_two_parent_folders_are_refused(tmp_path: Path) -> None:
    """train/n1 and val/n1 belong to two splits. cats/train and dogs/train are two classes with the same name."""
    for names in (("train/n1/a.JPEG", "val/n1/b.JPEG"), ("cats/train/a.JPEG", "dogs/train/b.JPEG")):
        with pytest.raises(UserError, match=r"x\.tar"):
            list_tar(tar_of([(name, A) for name in names]), tmp_path / "x.tar")


def test_files_next_to_class_folders_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = list_tar(tar_of([*THREE, ("README", A), ("beside.JPEG", A)]), tmp_path / "x.tar")
    assert names_of(found) == ["n1/a.JPEG", "n1/b.JPEG", "n2/c.JPEG"] and found.refused == ()
    assert sorted(found.ignored) == [("README", STRAY_FILE), ("beside.JPEG", STRAY_FILE)]
    assert "left out 1 photograph beside the class folders (first: beside.JPEG)" in capsys.readouterr().err
    many = [(f"{k}.JPEG", A) for k in range(11)]
    with pytest.raises(UserError, match=r"2 folders and 11 photographs side by side \(first: 0\.JPEG\).*--labels"):
        list_tar(tar_of([*THREE, *many]), tmp_path / "x.tar")
    assert list_archive(tmp_path / "x.tar", flat=True).is_flat


@pytest.mark.parametrize("name", ["lost+found", "@eaDir", "__MACOSX", "__pycache__", ".ipynb_checkpoints", ".git"])
def test_folders_that_are_no_classes_are_left_out_and_named(name: str, tmp_path: Path) -> None:
    entry: Member = (name, b"", {"type": tarfile.DIRTYPE})
    files: list[Member] = [(f"{name}/x.JPEG", A), (f"{name}/n1/._a.JPEG", A), (f"n1/{name}/x.JPEG", A)]
    for members in ([*THREE, entry], [entry, *files, *THREE], [("d/" + m[0], *m[1:]) for m in (*THREE, *files)]):
        found = list_tar(tar_of(members), tmp_path / "x.tar")
        assert names_of(found) == ["n1/a.JPEG", "n1/b.JPEG", "n2/c.JPEG"]
        assert (found.classes, found.refused) == (("n1", "n2"), ())
        prefix = "d/" if members[0][0].startswith("d/") else ""
        expected = [prefix + name] if len(members) == 4 else [prefix + name, f"{prefix}n1/{name}"]
        assert sorted(found.ignored) == sorted((folder, NO_CLASS) for folder in expected)


def test_numbers_and_nested_folders_are_classes_as_on_the_disk(tmp_path: Path) -> None:
    """The listing of a tar of a folder equals the listing of the folder."""
    for k, names in enumerate(
        (["2/a.jpg", "10/b.jpg", "1/c.jpg"], ["a/air/1.jpg", "a/apt/in/2.jpg", "b/x/3.jpg", "a/README.md"])
    ):
        root = touch(tmp_path / str(k), *names)
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(root, "around")
        folder, archive = list_source(root, "train"), list_source(tmp_path / "x.tar", "train")
        assert archive.classes == folder.classes == (("1", "2", "10"), ("a/air", "a/apt/in", "b/x"))[k]
        assert paths_and_labels(archive) == paths_and_labels(folder)


def test_a_link_beside_the_class_folders_is_refused(tmp_path: Path) -> None:
    link = {"type": tarfile.SYMTYPE, "linkname": "elsewhere/n5"}
    for prefix in ("", "train/"):
        members = [(prefix + name, content) for name, content, *_ in THREE]
        with pytest.raises(UserError, match=rf"{prefix}n5 is a link beside the class folders.*--dereference"):
            list_tar(tar_of([*members, (prefix + "n5", b"", link)]), tmp_path / "x.tar")
        found = list_tar(tar_of([*members, (prefix + "notes.txt", b"", link)]), tmp_path / "x.tar")
        assert (found.refused, found.ignored) == ((), ((prefix + "notes.txt", STRAY_FILE),))
    inner = tar_of([("a.JPEG", A)])
    with pytest.raises(UserError, match=r"n2\.tar is a link"):
        list_tar(tar_of([("n1.tar", inner), ("n3.tar", inner), ("n2.tar", b"", link)]), tmp_path / "x.tar")


def test_what_lies_beside_class_tars_is_left_out_and_named(tmp_path: Path) -> None:
    root = touch(tmp_path / "tars", "README.md", ".hidden", "lost+found/x.jpg")
    for name in ("n1", "n2"):
        (root / f"{name}.tar").write_bytes(tar_of([("a.JPEG", A)]))
    source = list_source(root, "train")
    assert (source.classes, paths_and_labels(source)) == (("n1", "n2"), [(b"n1/a.JPEG", 0), (b"n2/a.JPEG", 1)])
    assert dict(source.ignored) == {"README.md": STRAY_FILE, "lost+found": NO_CLASS}
    os.symlink("nowhere.tar", root / "n3.tar")
    with pytest.raises(UserError, match=r"n3\.tar: a link to a \.tar file that does not exist"):
        list_source(root, "train")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("tars", "classes"),
    [
        ({"n1": ["a", "b"], "n2": ["c"]}, ("n1", "n2")),
        ({"n1": ["n1/a"], "n2": ["./n2/c", "n2/@eaDir/c", "n2/Thumbs.db"]}, ("n1", "n2")),
        ({"n1": ["images/a"], "n2": ["images/c"]}, ("n1", "n2")),
        ({"part1": ["n1/a", "n2/b"], "part2": ["n1/c"]}, None),
        ({"part1": ["n1/a"], "part2": ["n2/b"]}, None),
    ],
)
def test_tars_of_class_folders_are_no_class_tars(
    tars: dict[str, list[str]], classes: tuple[str, ...] | None, nested: bool, tmp_path: Path
) -> None:
    """Tars with class folders are refused, because the names of the tars would become the classes.

    A folder is no class folder if it has the name of its tar, or if all tars have the same single folder.
    """
    folder = tmp_path / "tars"
    folder.mkdir()
    content = {f"{name}.tar": tar_of([(member, A) for member in members]) for name, members in tars.items()}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (tmp_path / "all.tar").write_bytes(tar_of(list(content.items())))
    where = tmp_path / "all.tar" if nested else folder
    if classes is None:
        with pytest.raises(UserError, match=r"part.\.tar has its images in folders \(n./.\), so it is unclear"):
            list_source(where, "train")
        return
    source = list_source(where, "train")
    assert source.classes == classes
    assert {item.path.count(b"/") for item in source.inputs} == {1}
    assert not source.refused and len(source.inputs) + len(source.ignored) == sum(map(len, tars.values()))


def test_a_class_that_has_only_links_is_a_class_without_a_photograph(tmp_path: Path) -> None:
    link: Member = ("n0/x.JPEG", b"", {"type": tarfile.SYMTYPE, "linkname": "../n1/a.JPEG"})
    (tmp_path / "x.tar").write_bytes(tar_of([*THREE, link]))
    with pytest.raises(UserError, match=r"1 class has no photograph: n0\. n0/x\.JPEG: a link"):
        list_source(tmp_path / "x.tar", "train")
