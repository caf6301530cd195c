"""A disk that fills up, or breaks, at any point of a build: said with figures, nothing torn, finished when mended.

By injected errors at each step, by a limit on the length of files, and, where this may be mounted, on a small tmpfs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prep.console import DiskFull, UserError
from prep.store.lmdb_shard import read
from prep.store.manifest import Store, StoreError
from tests.helpers.building import DEADLINE_S, PPM, Command, Here, build, make_pictures, stepped


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 pictures: two shards."""
    return make_pictures(tmp_path_factory.mktemp("full") / "photos", 66, (32, 34))


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return build(photos, tmp_path_factory.mktemp("whole") / "store")


@pytest.mark.parametrize(("how", "code"), [("full", 3), ("limit", 3), ("broken", 1)])
def test_disk_at_every_step(how: str, code: int, photos: Path, whole: Store, tmp_path: Path) -> None:
    """Where LMDB alone is told of an error it says the same for both kinds: that is taken for a full disk."""
    *ends, last = stepped(photos, tmp_path, how)
    assert last["code"] == last["again"] == 0
    assert len(ends) >= 20
    for end in ends:
        assert end["code"] == code or (how == "broken" and "mdb_" in end["error"]), end
        assert not end["torn"], end
        assert end["again"] == 0, end
        assert Store.open(tmp_path / f"{end['at']:03d}").splits == whole.splits
        if end["code"] == 3:
            assert "same command again" in end["error"], end
            assert re.search(r"disk is full.* [\d.]+ [KMG]?B are free", end["error"]), end
            assert " 0 images" not in end["error"], end
    if how == "full":
        needed = [end["error"] for end in ends if "needed for 33 images" in end["error"]]
        assert len(needed) >= 5
        assert all(re.search(r"About 2\d\d\.\d KB are needed", text) for text in needed)


@pytest.mark.parametrize("jobs", [1, 2])
def test_command_says_it_in_one_line_and_ends_with_3(photos: Path, whole: Store, tmp_path: Path, jobs: int) -> None:
    """With real workers, which meet the limit first; of two, the other is ended in the middle of its shard."""
    store = tmp_path / "store"
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))\n"
    program = limited + "from prep.cli import main\nmain()"
    words = ["build-lmdb", str(photos), "--store", str(store), "--side", "32", "--format", "ppm", "--jobs", str(jobs)]
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert ended.returncode == 3, ended.stderr
    assert (ended.stdout, ended.stderr.count("\n")) == ("", 1)
    assert ended.stderr.startswith("Error: ")
    assert "free" in ended.stderr
    assert jobs == 2 or not list(store.rglob("*.tmp"))
    code, _, stderr = Command(photos, store).end()
    assert code == 0, stderr
    assert not list(store.rglob("*.tmp"))
    assert Store.open(store).splits == whole.splits


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs, grown by `mount -o remount`; skips where that is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:  # the injected errors and RLIMIT_FSIZE above hold the same everywhere; this is the real thing
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_real_disk_of_twenty_sizes(
    small_disk: Path, photos: Path, whole: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size somewhat larger than the last; the build goes on from what fitted until it is whole."""
    monkeypatch.setattr("prep.build.split.check_disk_space", lambda *of: None)
    store, full = small_disk / "store", 0
    for kilobytes in range(16, 600, 16):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(small_disk)], check=True)
        try:
            built = build(photos, store)
        except DiskFull as error:
            full += 1
            assert "free" in str(error)
            with pytest.raises(StoreError):
                Store.open(store)
            continue
        assert built.splits == whole.splits
        assert sum(1 for path in built.shard_paths("train") for _ in read(Path(path))) == 66
        break
    else:
        pytest.fail("never whole")
    assert full >= 20


def test_free_room_is_that_of_the_stores_disk(small_disk: Path, photos: Path) -> None:
    """Refused up front, by the figures of the disk that the store is on."""
    with pytest.raises(DiskFull, match=r"270\.3 KB needed for 66 images.* [0-6]?\d\.\d KB free"):
        build(photos, small_disk / "store")


def test_error_that_is_no_lack_of_room_has_code_1(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as told:
        build(photos, tmp_path / "file" / "store", PPM, runner=Here())
    assert told.value.exit_code == 1
