"""prep.images.photograph: photographs that are prepared in a separate process, which some files crash or keep busy.

The worker process imports this module.
"""

from __future__ import annotations

import os
import signal
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
    """Replaces a decoder: one file crashes it, and another keeps it in C code for ever."""
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
