"""If a disk fills up or breaks during a build, the error is clear, no file is incomplete, and the build can be resumed.

The tests inject errors at each disk operation, limit the size of files, and mount a small tmpfs if permitted.
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
from tests.helpers.building import (
    DEADLINE_S,
    PPM,
    BuildCommand,
    InlineRunner,
    build,
    make_pictures,
    run_interrupted_builds,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 images, which fill two shards."""
    return make_pictures(tmp_path_factory.mktemp("full") / "photos", 66, (32, 34))


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return build(photos, tmp_path_factory.mktemp("whole") / "store")


@pytest.mark.parametrize(("mode", "code"), [("full", 3), ("limit", 3), ("broken", 1)])
def test_a_disk_that_fails_at_any_operation_leaves_a_build_that_can_be_finished(
    mode: str, code: int, photos: Path, whole: Store, tmp_path: Path
) -> None:
    """LMDB raises the same error for a full and for a broken disk, so alexprep reports both as a full disk."""
    *ends, last = run_interrupted_builds(photos, tmp_path, mode)
    assert last["code"] == last["again"] == 0
    assert len(ends) >= 20
    for end in ends:
        assert end["code"] == code or (mode == "broken" and "mdb_" in end["error"]), end
        assert not end["torn"], end
        assert end["again"] == 0, end
        assert Store.open(tmp_path / f"{end['at']:03d}").splits == whole.splits
        if end["code"] == 3:
            assert "same command again" in end["error"], end
            assert re.search(r"disk is full.* [\d.]+ [KMG]?B are free", end["error"]), end
            assert " 0 images" not in end["error"], end
    if mode == "full":
        needed = [end["error"] for end in ends if "needed for 33 images" in end["error"]]
        assert len(needed) >= 5
        assert all(re.search(r"About 2\d\d\.\d KB are needed", text) for text in needed)


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_command_reports_a_full_disk_in_one_line_with_exit_code_3(
    photos: Path, whole: Store, tmp_path: Path, jobs: int
) -> None:
    """A limit on file sizes simulates the full disk.

    With two jobs, one worker reaches the limit first and fails. alexprep then kills the other worker during its shard.
    """
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
    code, _, stderr = BuildCommand(photos, store).end()
    assert code == 0, stderr
    assert not list(store.rglob("*.tmp"))
    assert Store.open(store).splits == whole.splits


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 64 KB, which a test may enlarge. The test is skipped if mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:  # the tests above simulate a full disk, and need no mount
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_build_on_a_growing_disk_resumes_until_it_is_complete(
    small_disk: Path, photos: Path, whole: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk grows by 16 KB before each build. At least twenty builds fail before a build succeeds."""
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
        pytest.fail("the build was never complete")
    assert full >= 20


def test_free_space_is_that_of_the_disk_of_the_store(small_disk: Path, photos: Path) -> None:
    """A build that does not fit is refused before it starts. The error states the free space of the store's disk."""
    with pytest.raises(DiskFull, match=r"270\.3 KB needed for 66 images.* [0-6]?\d\.\d KB free"):
        build(photos, small_disk / "store")


def test_a_disk_error_other_than_a_full_disk_has_exit_code_1(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as raised:
        build(photos, tmp_path / "file" / "store", PPM, runner=InlineRunner())
    assert raised.value.exit_code == 1
