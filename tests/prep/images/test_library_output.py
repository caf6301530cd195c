"""prep.images.library_output and time_limit: lines that C libraries print, and the limit of the CPU time."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from prep.images import codec
from prep.images.codec import BadImage, decode_image
from prep.images.library_output import caught_stderr
from prep.images.limits import cpu_time_limit
from tests.prep.images.small_images import PHOTO, file_of
from tests.prep.images.test_rgb import tiff


def test_lines_on_file_descriptor_2_are_caught(capfd: pytest.CaptureFixture[str]) -> None:
    with caught_stderr() as lines:
        os.write(2, b"first\n\n  second  \nTIFFReadDirectory: Warning, Unknown field with tag 34022.\n")
        assert lines == []
    os.write(2, b"after\n")
    assert lines == ["first", "second"]
    assert capfd.readouterr().err == "after\n"


def test_many_and_long_lines_are_cut() -> None:
    with caught_stderr() as lines:
        os.write(2, b"\n".join([b"x" * 999] * 7))
    assert [len(line) for line in lines[:3]] == [160] * 3 and lines[3] == "4 more lines"


def test_lines_are_caught_if_the_block_raises() -> None:
    before = os.fstat(2)
    with pytest.raises(KeyError), caught_stderr() as lines:
        os.write(2, b"said\n")
        raise KeyError
    assert lines == ["said"]
    assert os.path.sameopenfile(2, 2) and os.fstat(2).st_ino == before.st_ino


def damaged_fax() -> bytes:
    bits = np.random.default_rng(0).integers(0, 2, (64, 64)).astype(bool)
    content = bytearray(file_of(Image.fromarray(bits), "TIFF", compression="group4"))
    content[20:60] = b"\x55" * 40
    return bytes(content)


def test_what_libtiff_says_is_a_warning_of_its_file(capfd: pytest.CaptureFixture[str]) -> None:
    image = decode_image(damaged_fax())
    assert image.warnings and all("Fax4Decode" in line for line in image.warnings[:1])
    assert capfd.readouterr().err == ""


def test_what_libtiff_says_is_in_the_reason_of_a_bad_file(capfd: pytest.CaptureFixture[str]) -> None:
    levels = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    content = bytearray(file_of(Image.fromarray(levels), "TIFF", compression="tiff_lzw"))
    content[200:260] = b"\xff" * 60
    with pytest.raises(BadImage, match=r"^cannot be decoded: .*(LZW|code)"):
        decode_image(bytes(content))
    assert capfd.readouterr().err == ""


def test_what_pillow_logs_while_it_opens_a_file_is_caught() -> None:
    """Pillow logs an error about a TIFF with 160 samples per pixel. Without a log handler, Python prints this error."""
    content = tiff(2, 8, 1, b"ab").replace(struct.pack("<HHII", 277, 3, 1, 1), struct.pack("<HHII", 277, 3, 1, 160))
    script = (
        "import sys\n"
        "from prep.images.codec import BadImage, decode_image\n"
        "try:\n"
        "    decode_image(sys.stdin.buffer.read())\n"
        "except BadImage as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], input=content, capture_output=True, check=True)
    assert b"More samples per pixel than can be decoded: 160" in ended.stdout
    assert ended.stderr == b""


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_too_much_cpu_time_raises_the_error() -> None:
    began = time.process_time()
    with pytest.raises(KeyError, match="slow"), cpu_time_limit(0.05, KeyError("slow")):
        spin(5)
    assert time.process_time() - began < 1
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    spin(0.1)  # the timer is off at this point
    with cpu_time_limit(0.05, KeyError("slow")):
        time.sleep(0.1)  # sleeping takes no CPU time
    with cpu_time_limit(0, KeyError("slow")):
        spin(0.02)


def test_a_thread_other_than_the_main_thread_has_no_limit() -> None:
    ended = []

    def work() -> None:
        with cpu_time_limit(0.01, KeyError("slow")):
            spin(0.05)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended


def test_no_handler_of_exceptions_swallows_the_limit() -> None:
    with pytest.raises(KeyError, match="slow"), cpu_time_limit(0.03, KeyError("slow")), suppress(Exception):
        spin(5)
    with pytest.raises(KeyError, match="slow"), cpu_time_limit(0.03, KeyError("slow")):
        with suppress(BaseException):
            spin(5)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_a_process_forked_while_a_thread_decodes_can_decode(capfd: pytest.CaptureFixture[str]) -> None:
    content = file_of(PHOTO, "PNG")
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with codec._pillow_lock, caught_stderr():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # this signal ends a child that would wait forever
        decode_image(content)
        os.write(2, b"from the child")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join()
    assert status == 0
    assert "from the child" in capfd.readouterr().err
