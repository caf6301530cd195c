"""prep.files: atomic writes and folder locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from prep import files
from prep.console import UserError
from prep.files import LockHeld, hold_lock, lock_is_held, save_array, without_locks, write_atomic


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"old")
    assert path.read_bytes() == b"old"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, b"new")
    assert os.listdir(tmp_path) == ["file.json"]
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert os.listdir(tmp_path) == ["file.json"]
    assert path.read_bytes() == b"new"


def test_a_saved_array_is_loaded_again(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_array(tmp_path / "a.npy", array)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)
    assert os.listdir(tmp_path) == ["a.npy"]


def test_a_held_lock_is_seen_and_refused_by_activity(tmp_path: Path) -> None:
    assert not lock_is_held(tmp_path)
    with hold_lock(tmp_path, "build"):
        assert lock_is_held(tmp_path)
        with pytest.raises(UserError, match="another build is at work in this folder"), hold_lock(tmp_path, "build"):
            pass
    assert not lock_is_held(tmp_path)
    with hold_lock(tmp_path, "build"):
        pass


def test_reading_the_state_of_a_lock_neither_takes_it_nor_creates_its_file(tmp_path: Path) -> None:
    assert not lock_is_held(tmp_path) and not (tmp_path / ".lock").exists()
    with hold_lock(tmp_path, "training"):
        assert lock_is_held(tmp_path) and lock_is_held(tmp_path)
    assert not lock_is_held(tmp_path)
    with open(tmp_path / ".lock") as other_reader:  # this simulates another process that calls lock_is_held
        fcntl.flock(other_reader, fcntl.LOCK_SH)
        assert not lock_is_held(tmp_path)
    with hold_lock(tmp_path, "training"):
        pass


def test_a_lock_whose_state_is_being_read_is_taken_after_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold_lock(tmp_path, "training"):
        pass
    with open(tmp_path / ".lock") as other_reader:
        fcntl.flock(other_reader, fcntl.LOCK_SH)
        monkeypatch.setattr("prep.files.time.sleep", lambda seconds: fcntl.flock(other_reader, fcntl.LOCK_UN))
        with hold_lock(tmp_path, "training"):
            assert lock_is_held(tmp_path)


def test_shared_locks_exclude_only_a_lock_that_is_not_shared(tmp_path: Path) -> None:
    with hold_lock(tmp_path, "build", shared=True):
        with hold_lock(tmp_path, "build", shared=True), hold_lock(tmp_path, "build", name="other.lock"):
            pass
        with pytest.raises(LockHeld, match="another build is at work"), hold_lock(tmp_path, "build"):
            pass
    with (
        hold_lock(tmp_path, "build"),
        pytest.raises(LockHeld, match="another build is at work"),
        hold_lock(tmp_path, "build", shared=True),
    ):
        pass
    with hold_lock(tmp_path, "build"):
        pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_reported_once_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    """The file system Lustre raises these errors if it is mounted without the option flock."""

    def flock(handle: object, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("prep.files.fcntl.flock", flock)
    for _ in range(2):
        with hold_lock(tmp_path, "build") as is_held:
            assert not is_held
    assert lock_is_held(tmp_path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: this file system has no locks ({os.strerror(code)})" in line
    assert "--no-lock" in line and "flock" in line


def test_without_locks_nothing_is_locked_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold_lock(tmp_path / "..", "build", name="outer.lock"), without_locks():
        for _ in range(2):
            with hold_lock(tmp_path, "build") as first, hold_lock(tmp_path, "build") as second:
                assert not first and not second
    assert os.listdir(tmp_path) == [] and capsys.readouterr().err == ""
    with hold_lock(tmp_path, "build") as is_held:
        assert is_held
