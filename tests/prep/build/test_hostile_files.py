"""An alexprep process reads damaged, misleading and oversized files (tests/helpers/hostile_files.py).

Each file must have its expected outcome: kept, converted or bad. The command must end by itself with exit code 0,
within limits of time and memory. The counts of the command must be consistent, and the command must not start any other
program.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prep.store.manifest import Store
from tests.helpers.hostile_files import JPEG, KEPT, Expected, corpus, not_images

MAX_S = 60.0  # a build of all files takes a few seconds; decoding one decompression bomb would take minutes
MAX_BYTES = 2_000_000_000  # memory limit of each process; an image of 100 million pixels takes about 1 GB


@pytest.fixture(scope="module")
def expectations() -> dict[str, Expected]:
    """{path: expected outcome}; the fixture `photos` fills it."""
    return {}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, expectations: dict[str, Expected]) -> Iterator[Path]:
    """Two class folders, a and b.

    Each class folder holds half of the files, and also links, sockets and other entries that are not readable files.
    """
    root = tmp_path_factory.mktemp("hostile") / "photos"
    for folder in ("a", "b"):
        (root / folder).mkdir(parents=True)
    for number, (name, (content, expected)) in enumerate(corpus().items()):
        path = f"{'ab'[number % 2]}/{name}"
        (root / path).write_bytes(content)
        expectations[path] = expected
    with open(root / "a" / "sparse.JPEG", "wb") as file:
        file.truncate(10_000_000_000)
    expectations["a/sparse.JPEG"] = Expected(bad="^10,000,000,000 bytes: more than 256,000,000$")
    (root / "a" / "unreadable.JPEG").write_bytes(JPEG)
    (root / "a" / "unreadable.JPEG").chmod(0)
    expectations["a/unreadable.JPEG"] = Expected(bad="^cannot be read: Permission denied$")
    (root / "a" / "folder.JPEG").mkdir()
    expectations["a/folder.JPEG"] = Expected(bad="^a folder, not a file$")
    os.mkfifo(root / "a" / "fifo.JPEG")
    expectations["a/fifo.JPEG"] = Expected(bad="^a FIFO, not a file$")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "b" / "s.JPEG"))
    expectations["b/s.JPEG"] = Expected(bad="^a socket, not a file$")
    os.symlink("nowhere", root / "b" / "dangling.JPEG")
    expectations["b/dangling.JPEG"] = Expected(bad="^cannot be read: No such file")
    os.symlink("/etc/passwd", root / "b" / "out.JPEG")
    expectations["b/out.JPEG"] = Expected(bad="^a symbolic link out of the source, to /etc/passwd")
    os.symlink("../a/progressive", root / "b" / "link.JPEG")
    target_exists = (root / "a" / "progressive").exists()
    expectations["b/link.JPEG"] = KEPT if target_exists else expectations["b/dangling.JPEG"]
    yield root
    (root / "a" / "unreadable.JPEG").chmod(0o600)


def _drop_root_rights() -> None:
    """Drop two rights of root in the child process, before the command starts.

    With these rights, root could read files that have no read permission.
    """
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# The test process may use much memory, and the peak memory of a forked process is at least the memory of its parent. A
# small process therefore starts the command, and writes the peak memory of the command's largest process to a file. The
# unit is KiB.
MEASURED = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[2:]); "
    "open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)); sys.exit(code)"
)


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int  # peak memory in bytes of the largest process of the command


@pytest.fixture
def alexprep(tmp_path: Path) -> Callable[..., Ended]:
    """A function that runs `alexprep` as a process.

    Small scripts replace the programs that Pillow might start. If such a script is started, it creates the file
    `started`.
    """
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("gs", "convert", "magick", "djpeg", "inkscape", "pdftoppm"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (programs / name).chmod(0o755)

    def run(*words: object) -> Ended:
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "peak")]
        command += [sys.executable, "-c", "from prep.cli import main; main()", "build-lmdb", *map(str, words)]
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        started = time.monotonic()
        with open(tmp_path / "out", "wb+") as out, open(tmp_path / "err", "wb+") as err:
            pid = os.fork()
            if pid == 0:
                try:
                    os.setsid()
                    _drop_root_rights()
                    os.dup2(out.fileno(), 1)
                    os.dup2(err.fileno(), 2)
                    os.execve(command[0], command, environment)
                finally:
                    os._exit(127)
            code = _wait(pid, started)
        assert not (tmp_path / "started").exists(), "the command started another program"
        text = [(tmp_path / name).read_text() for name in ("out", "err")]
        return Ended(code, text[0], text[1], time.monotonic() - started, 1024 * int((tmp_path / "peak").read_text()))

    return run


def _wait(pid: int, started: float) -> int:
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > MAX_S:
            os.killpg(pid, 9)
            os.waitpid(pid, 0)
            pytest.fail(f"the command has not ended after {MAX_S} s")
        time.sleep(0.02)


def logged_outcomes(store: Path) -> dict[str, dict[str, Any]]:
    """Return {name: outcome} from inputs.jsonl. Inputs that were stored without a conversion are not in this file."""
    lines = (store / "train" / "inputs.jsonl").read_text().splitlines()
    outcomes = {outcome["source"]: outcome for outcome in map(json.loads, lines)}
    assert len(outcomes) == len(lines)
    return outcomes


@pytest.mark.parametrize("whole", [False, True])
def test_every_hostile_file_has_its_expected_outcome(
    whole: bool,
    photos: Path,
    expectations: dict[str, Expected],
    alexprep: Callable[..., Ended],
    records_of: Callable[[Path, str], list[tuple[bytes, Any]]],
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    options = ["--side", "32", "--jobs", "2", "--on-bad", "skip", "--json", *["--keep-aspect"] * whole]
    ended = alexprep(photos, "--store", store, *options)
    assert ended.code == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.peak_bytes < MAX_BYTES
    on_disk = {f"{folder.name}/{name}" for folder in photos.iterdir() for name in os.listdir(folder)}
    assert on_disk == set(expectations)

    outcomes, wrong = logged_outcomes(store), []
    for name, expected in expectations.items():
        bad = expected.bad or (expected.bad_if_whole if whole else "")
        outcome = outcomes.get(name, {"fate": "kept"})
        if bad:
            right = outcome["fate"] == "bad" and re.search(bad, outcome["why"]) is not None
            right = right and "\n" not in outcome["why"]
        else:
            entry = {"fate": "converted", "how": list(expected.converted)} if expected.converted else {"fate": "kept"}
            entry |= {"exif_orientation": expected.orientation} if expected.orientation != 1 else {}
            if expected.is_warned:
                entry |= {"fate": "kept, with warnings", "warnings": outcome.get("warnings") or "a warning"}
            right = {key: value for key, value in outcome.items() if key != "source"} == entry
        if not right:
            wrong.append(f"{name}: {outcome}, expected {expected}")
    assert not wrong, "\n".join(wrong)

    left_out = {name for name, outcome in outcomes.items() if outcome["fate"] == "bad"}
    answer = json.loads(ended.stdout)
    assert (answer["records"], answer["skipped"]) == (len(expectations) - len(left_out), len(left_out))
    account = Store.open(store).split("train").account
    assert (account["inputs"], account["kept"]) == (len(expectations), len(expectations) - len(left_out))
    assert sum(account["bad"].values()) == len(left_out)
    records = [message for _, message in records_of(store, "train")]
    assert {message.source.decode() for message in records} == set(expectations) - left_out
    assert len(records) == len(expectations) - len(left_out)
    for message in records:
        with Image.open(io.BytesIO(message.data)) as image:
            image.load()
            assert image.format == "JPEG"
            assert image.size == (message.width, message.height)
            assert min(image.size) == 32
            assert whole or image.size == (32, 32)


def test_a_strict_build_names_all_obviously_bad_files_before_it_starts(
    photos: Path, expectations: dict[str, Expected], alexprep: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = alexprep(photos, "--store", tmp_path / "store", "--side", "32", "--jobs", "1", "--on-bad", "fail")
    assert ended.code == 1
    lines = ended.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    named = re.search(r"\(first: (.+?): ", lines[0])
    assert named is not None
    assert expectations[named[1]].bad
    log = (tmp_path / "store" / "train" / ".build" / "bad.jsonl").read_text()
    found = [json.loads(line) for line in log.splitlines()]
    assert all(expectations[outcome["source"]].bad for outcome in found)
    obvious = {name for name, _, _ in not_images()} - {"zip.JPEG"}  # a zip file begins with P, as a PPM file does
    obvious |= {"unreadable.JPEG", "folder.JPEG", "fifo.JPEG", "s.JPEG", "dangling.JPEG", "out.JPEG", "sparse.JPEG"}
    assert {outcome["source"].split("/")[1] for outcome in found} >= obvious
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["cut at 90%", "2000 scans of a large picture", "20000x20000.png", "exif of noise"])
def test_a_file_that_only_decoding_shows_to_be_bad_ends_a_strict_build(
    name: str, alexprep: Callable[..., Ended], tmp_path: Path
) -> None:
    """If the expected outcome of a file is not `bad`, the build must not end with an error."""
    content, expected = corpus()[name]
    for folder in ("a", "b"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        (tmp_path / "photos" / folder / "good.JPEG").write_bytes(JPEG)
    (tmp_path / "photos" / "b" / "odd.JPEG").write_bytes(content)
    ended = alexprep(tmp_path / "photos", "--store", tmp_path / "store", "--side", "32", "--jobs", "1")
    if not expected.bad:
        assert ended.code == 0, ended.stderr
        return
    assert ended.code == 1
    assert len(ended.stderr.splitlines()) == 1
    reason = re.fullmatch(r"Error: b/odd\.JPEG: (.+?)\. Correct this input, or .*", ended.stderr.strip())
    assert reason is not None, ended.stderr
    assert re.search(expected.bad, reason[1])
