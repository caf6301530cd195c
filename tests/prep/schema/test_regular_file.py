"""Tests of opening files: only regular files of a bounded size are opened, and opening never waits."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from prep.console import UserError
from prep.schema import open_regular, read_regular

ADVICE = "Build the store again."


class OwnError(UserError):
    """An error type that the caller of the reader chooses."""


def test_a_regular_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "file", len(content), ADVICE) == content
    assert read_regular(tmp_path / "link", len(content), ADVICE) == content
    with open_regular(tmp_path / "link") as file:
        assert file.read(3) == b"\0\1\2" and os.get_inheritable(file.fileno()) is False


def test_a_missing_file_and_a_closed_folder_are_system_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 10, ADVICE)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        read_regular(tmp_path / "file" / "inner", 10, ADVICE)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["named pipe", "socket", "folder", "character device"])
def test_other_kinds_are_refused_and_do_not_hang(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(OwnError) as caught:
        read_regular(path, 10, ADVICE, OwnError)
    assert kind in str(caught.value) and str(path) in str(caught.value) and str(caught.value).endswith(ADVICE)
    with pytest.raises(OwnError):
        open_regular(path, ADVICE, OwnError)


def test_a_file_that_becomes_a_pipe_after_the_first_look_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "x")
    (tmp_path / "regular").write_bytes(b"")
    real = os.stat(tmp_path / "regular")
    monkeypatch.setattr(os, "stat", lambda path: real)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OwnError, match="named pipe"):
        open_regular(tmp_path / "x", ADVICE, OwnError)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_over_the_bound_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 42)  # 4 TiB, more than any memory
    with pytest.raises(UserError, match=r"has 4,398,046,511,104 bytes, expected at most 1,000\. Build"):
        read_regular(path, 1000, ADVICE)


def test_a_file_whose_stated_size_is_zero_is_bounded_too() -> None:
    assert read_regular("/proc/self/stat", 4096, ADVICE).startswith(str(os.getpid()).encode())
    with pytest.raises(UserError, match="more than 5 bytes"):
        read_regular("/proc/self/stat", 5, ADVICE)


def test_control_characters_of_a_name_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\nb"
    path.mkdir()
    with pytest.raises(UserError) as caught:
        read_regular(path, 10, ADVICE)
    assert str(caught.value).isprintable()
