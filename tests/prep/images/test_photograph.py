"""prep.images.photograph: photographs are prepared in a separate process, which some files crash or block.

The separate process imports this test module.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prep.images import photograph
from prep.images.codec import BadImage
from prep.images.photograph import prepare_photograph, prepare_photographs
from prep.store.manifest import Settings
from prep.workers import TaskProgress
from tests.prep.images.small_images import PHOTO, file_of

SETTINGS = Settings(32, False, "ppm", 90, "area", 0)


def prepare_or_die(task: Any, task_progress: TaskProgress) -> Any:
    """A replacement for a decoder.

    One file crashes the process, and another file keeps the process in C code forever.
    """
    task_progress.begin(0, 0.2)
    if task.path.name == "crash.jpg":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task.path.name == "slow.jpg":
        sum(range(10**12))
    task_progress.count()
    return prepare_photograph(*task)


def test_a_crash_and_an_endless_decoder_leave_the_other_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photograph, "_prepare", prepare_or_die)
    monkeypatch.setattr("prep.workers._CPU_GRACE_S", 0.2)
    monkeypatch.setattr("prep.workers._CHECK_CPU_S", 0.1)
    names = ["a.jpg", "crash.jpg", "slow.jpg", "b.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(file_of(PHOTO, "JPEG"))
    began = time.monotonic()
    results = dict(prepare_photographs([tmp_path / name for name in names], SETTINGS))
    assert time.monotonic() - began < 60
    assert [path.name for path in results] == names
    expected = prepare_photograph(tmp_path / "a.jpg", SETTINGS)
    for name in ("a.jpg", "b.jpg"):
        result = results[tmp_path / name]
        assert not isinstance(result, BadImage) and np.array_equal(result.square, expected.square)
    assert str(results[tmp_path / "crash.jpg"]) == "the decoding process was killed (SIGSEGV)"
    assert "CPU time" in str(results[tmp_path / "slow.jpg"])


def test_errors_are_reasons_without_the_name(tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(file_of(PHOTO, "JPEG"))
    with pytest.raises(BadImage, match=r"^83×60: more than 4,000 pixels; --max-pixels sets this limit$"):
        prepare_photograph(tmp_path / "large.jpg", SETTINGS, max_pixels=4000)
    with pytest.raises(BadImage, match=r"^cannot be read: No such file or directory$"):
        prepare_photograph(tmp_path / "none.jpg", SETTINGS)


def test_the_background_of_the_store_is_used(tmp_path: Path) -> None:
    transparent = PHOTO.copy()
    transparent.putalpha(0)
    (tmp_path / "a.png").write_bytes(file_of(transparent, "PNG"))
    for background, level in (("white", 255), ("black", 0), ("grey", 128)):
        settings = Settings(32, False, "ppm", 90, "area", 0, background)
        assert (prepare_photograph(tmp_path / "a.png", settings).square == level).all()


def test_what_is_no_file_and_odd_names_and_errors_leave_the_other_photographs(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(file_of(PHOTO, "JPEG"))
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    odd = ["fifo.jpg", "zero.jpg", ".", "n\0ul.jpg", "x" * 300, "a.jpg/b"]
    results = dict(prepare_photographs([tmp_path / name for name in [*odd, "a.jpg"]], SETTINGS))
    reasons = [str(results[tmp_path / name]) for name in odd]
    assert reasons[:3] == ["not a regular file", "not a regular file", "a folder, not a file"]
    assert "null byte" in reasons[3] and "too long" in reasons[4] and "Not a directory" in reasons[5]
    assert not isinstance(results[tmp_path / "a.jpg"], BadImage)


def test_a_program_without_a_main_guard_can_prepare_photographs(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(file_of(PHOTO, "JPEG"))
    (tmp_path / "program.py").write_text(
        "from pathlib import Path\n"
        "from prep.images.photograph import Photograph, prepare_photographs\n"
        "from prep.store.manifest import Settings\n"
        "settings = Settings(32, False, 'ppm', 90, 'area', 0)\n"
        f"((_, photograph),) = prepare_photographs([Path({str(tmp_path / 'a.jpg')!r})], settings)\n"
        "assert isinstance(photograph, Photograph), photograph\n"
    )
    ended = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
