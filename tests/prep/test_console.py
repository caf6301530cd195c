"""prep.console: progress as lines of text, as lines of JSON and as a bar; counts, sizes and durations as text."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from prep.console import (
    DiskFull,
    Group,
    Progress,
    UserError,
    bytes_text,
    count_noun,
    duration_text,
    escaped,
    progress,
    progress_display,
    shell_quoted,
)
from tests.helpers.project import ROOT


@pytest.mark.parametrize("as_json", [True, False])
def test_progress_without_a_terminal_is_lines_of_text_or_of_json_with_the_option_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """100 of 300 images take 10 s on a clock that the test sets. The rate is then 10 images/s, and 20 s are left."""
    clock = [1000.0]
    monkeypatch.setattr(progress_display.time, "monotonic", lambda: clock[0])
    context = click.Context(click.Command("build"))
    context.params["as_json"] = as_json
    with context, progress("train: é", 400, "pictures") as job_progress:
        job_progress.skip(100)
        job_progress.advance(1)
        job_progress.update(101, 1, 99)
        clock[0] += 4.9
        job_progress.advance()
        assert capsys.readouterr() == ("", "")
        clock[0] += 5.1
        job_progress.update(200, 3, 5_000)
        clock[0] += 1
        job_progress.advance()
        clock[0] += 4
        job_progress.update(250)
    output = capsys.readouterr()
    assert output.out == ""
    first, second = output.err.splitlines()
    if not as_json:
        assert first == "train: é: 200 of 400 pictures, 10.0 pictures/s, 20 s left, 5.0 KB, 3 bad"
        assert second == "train: é: 250 of 400 pictures, 10.0 pictures/s, 15 s left"
        return
    assert json.loads(first) == {
        "progress": "train: é",
        "done": 200,
        "total": 400,
        "unit": "pictures",
        "pictures_per_s": 10.0,
        "eta_s": 20,
        "bad": 3,
        "bytes": 5_000,
    }
    assert json.loads(second)["pictures_per_s"] == 10.0 and json.loads(second)["eta_s"] == 15
    assert "bytes" not in json.loads(second)


def test_progress_is_a_bar_on_a_terminal() -> None:
    """On a terminal, the rate, the size and the number of bad inputs follow the bar. Standard output is empty.

    The terminal of the test is a pseudo-terminal.
    """
    script = (
        "from prep.console import progress\n"
        "with progress('train: rescaling', 400, 'pictures') as job_progress:\n"
        "    job_progress.update(200, 3, 5_000_000)\n"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=-1, stderr=theirs, env={**os.environ, "COLUMNS": "150"}
    ) as ran:
        os.close(theirs)
        output = b""
        with suppress(OSError):  # at the end of file, a pseudo-terminal raises EIO
            while chunk := os.read(ours, 4096):
                output += chunk
        assert ran.stdout is not None and ran.stdout.read() == b""
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    for part in ("train: rescaling", "200/400", "pictures/s", "5.0 MB, 3 bad"):
        assert part in text, text


def test_progress_keeps_the_last_counts() -> None:
    job_progress = Progress(10, "pictures")
    job_progress.update(4, 1, 99)
    assert (job_progress.done, job_progress.bad, job_progress.size_bytes) == (4, 1, 99)
    job_progress.update(5, 2, 100)
    assert (job_progress.done, job_progress.bad, job_progress.size_bytes, job_progress.skipped) == (5, 2, 100, 0)
    job_progress.skip(3)
    assert (job_progress.done, job_progress.skipped) == (8, 3)


def test_the_rate_excludes_the_work_of_an_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_display.time, "monotonic", lambda: clock[0])
    job_progress = Progress(1000, "pictures")
    job_progress.skip(900)
    job_progress.advance(50)
    clock[0] = 5.0
    assert job_progress.done == 950
    assert job_progress.rate() == pytest.approx(10)
    assert job_progress.eta_s() == pytest.approx(5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
    ],
)
def test_durations_as_text(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (27_400, "27.4 KB"),
        (31_240_000_000, "31.2 GB"),
        (5_600_000_000_000, "5.6 TB"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (999_949, "999.9 KB"),
        (999_960, "1.0 MB"),
        (999_960_000, "1.0 GB"),
        (999_960_000_000, "1.0 TB"),
    ],
)
def test_byte_counts_as_text(n: int, text: str) -> None:
    assert bytes_text(n) == text


def test_counts_with_nouns() -> None:
    assert count_noun(1, "picture") == "1 picture"
    assert count_noun(1797, "picture") == "1,797 pictures"
    assert count_noun(3, "class", "classes") == "3 classes"
    assert count_noun(0, "file") == "0 files"


def test_characters_that_control_a_terminal_are_escaped() -> None:
    r"""The characters are C0, C1, DEL, line separators, bidi controls and surrogates. `\x1b` is printed for ESC."""
    controls = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, 0x200E, 0x200F, 0x061C]
    controls += [*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
    for code in controls:
        shown = escaped(f"a{chr(code)}b")
        assert shown.startswith("a\\") and shown.endswith("b") and shown.isprintable(), hex(code)
        assert escaped(shown) == shown
    assert escaped("\x1b[2J\n\x9b\u202e\udcff") == r"\x1b[2J\n\x9b\u202e\udcff"
    assert escaped("ein Größe× 写真 \\n ½ 😀") == "ein Größe× 写真 \\n ½ 😀"


def test_every_error_is_one_line_also_outside_of_a_command() -> None:
    assert str(UserError("a\nb\x1b[31m: no such file.")) == r"a\nb\x1b[31m: no such file."
    assert str(DiskFull("a\u202eb")) == r"a\u202eb"


@pytest.mark.parametrize("name", ["a b", "it's", "x\x1b'\\7\nw\x7f\u202eé", "raw\udcff1", "plain"])
def test_a_quoted_path_is_read_by_a_shell_as_the_same_path(name: str) -> None:
    quoted = shell_quoted(Path(name))
    assert quoted.isprintable()
    output = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True).stdout
    assert output == os.fsencode(name)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libx.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nMore"),
    ],
)
def test_an_error_of_memory_is_one_line_with_the_limit_of_the_address_space(error: Exception) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)

    @click.command("fail")
    def fail() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 43, limits[1]))
        raise error

    try:
        result = CliRunner().invoke(Group(commands=[fail]), ["fail"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: Memory ran out")
    assert "limited to 8.8 TB (ulimit -v)" in result.stderr and "alexprep needs 2 GB" in result.stderr
    assert "More" not in result.stderr


def test_without_a_temporary_folder_the_error_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("fail")
    def fail() -> None:
        with tempfile.TemporaryDirectory():
            pass

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nothing"])
    result = CliRunner().invoke(Group(commands=[fail]), ["fail"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "Set the variable TMPDIR to a folder in which you can write." in result.stderr


def test_closed_standard_streams_get_no_file_of_the_command(tmp_path: Path) -> None:
    """Libraries write messages to the descriptors 1 and 2. The command's own files must not get descriptors 0 to 2."""
    script = (
        "import click, os\n"
        "from prep.console import Group, print_line\n"
        "@click.command()\n"
        "def write():\n"
        "    with open('opened', 'wb') as file:\n"
        "        print_line('to standard output')\n"
        "        os.write(2, b'a message of a C library')\n"
        "        file.write(b'%d' % file.fileno())\n"
        "Group(commands=[write])()\n"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} write <&- >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    assert int((tmp_path / "opened").read_bytes()) > 2


def test_a_character_that_the_terminal_lacks_is_escaped(tmp_path: Path) -> None:
    script = "from prep.console import Group, print_line\nimport click\n"
    script += "@click.command()\ndef show(): print_line('2 × 写')\nGroup(commands=[show])()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "iso8859-1"}
    command = [sys.executable, "-c", script, "show"]
    output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    assert output == b"2 \xd7 \\u5199\n"


def test_tracebacks_and_warnings_are_printed_with_escaped_control_characters() -> None:
    script = "from prep.console import Group\nimport click, warnings\n@click.command()\ndef fail():\n"
    script += "    warnings.warn('w\\x1b[31m')\n    raise RuntimeError('a\\x1b[31m')\nGroup(commands=[fail])()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", script, "fail"], env=environment, capture_output=True, check=False)
    assert process.returncode == 1 and b"\x1b" not in process.stderr
    assert rb"RuntimeError: a\x1b[31m" in process.stderr and rb"UserWarning: w\x1b[31m" in process.stderr


def test_a_full_disk_at_standard_output_has_the_exit_code_3() -> None:
    script = "from prep.console import Group, print_line\nimport click\n@click.command()\ndef show(): print_line('a')\n"
    script += "Group(commands=[show])()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script, "show"]
        process = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, check=False)
    assert process.returncode == 3
    assert process.stderr == b"Error: standard output cannot be written: No space left on device.\n"


@pytest.mark.parametrize("args", [["show", "--store", ""], ["show", "--store="], ["show", ""], ["show", "a\x00b"]])
def test_an_empty_argument_and_the_character_nul_are_wrong_usage(args: list[str]) -> None:
    """Python's Path takes an empty text for the current folder, so empty arguments must be refused."""

    @click.command("show")
    @click.argument("path", type=click.Path(), required=False)
    @click.option("--store", type=click.Path(exists=False, dir_okay=True, path_type=Path))
    def show(path: Path | None, store: Path | None) -> None:
        raise AssertionError

    result = CliRunner().invoke(Group(commands=[show]), args)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert ("the value is empty" if "a\x00b" not in args else "character NUL") in result.stderr
