"""Control characters in the names and texts of files are escaped before they are printed on a terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import platform
import pty
import shutil
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import pipeline.cli
import prep.cli
import train.cli
from tests.helpers.project import ROOT
from tests.helpers.small_training import SMALL_ALEXNET
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.runs.run import Run
from train.trainer.loop import fit

# HOSTILE has a window title, a C1 cursor movement, DEL, a bidi control, line separators, and ends of lines.
HOSTILE = "\x1b]0;x\x07\x9b2J\x7f\u202e\u2028\x85\n\r"
SHOWN = r"\x1b]0;x\x07\x9b2J\x7f\u202e\u2028\x85\n\r"
CLASSES = [f"{letter}{HOSTILE}" for letter in "abc"]

# Functions and streams that print without escaping control characters. Commands must print with prep.console instead.
PRINTERS = {"print", "click.echo", "click.secho", "click.echo_via_pager", "click.confirm", "click.prompt", "rich.print"}
STREAMS = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__", "rich.console.Console"}
# Modules that draw on a terminal, or that ask whether a stream is a terminal.
EXCEPTIONS = {
    "prep/console/output.py": {"click.echo", "sys.stdout"},
    "prep/console/progress_display.py": {"sys.stderr", "rich.console.Console"},
    "train/monitor/live_view.py": {"rich.console.Console"},
    "train/monitor/view.py": {"sys.stderr"},
}


def dotted_name(node: ast.expr) -> str:
    """Return a dotted name such as sys.stdout as text, and "" for any other expression."""
    if isinstance(node, ast.Attribute) and (parent := dotted_name(node.value)):
        return f"{parent}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def printing_names(source: str) -> set[str]:
    """Return the names of functions and streams in a Python source that can print."""
    names, used = {}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.Name | ast.Attribute):
            used.add(dotted_name(node))
    full = {".".join([names.get(first, first), *rest]) for first, *rest in (name.split(".") for name in used)}
    return full & (PRINTERS | STREAMS)


def test_only_prep_console_prints() -> None:
    for package in ("prep", "pipeline", "train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            others = printing_names(path.read_text()) - EXCEPTIONS.get(name, set())
            assert not others, f"{name} uses {others}: print with print_line, print_json or say of prep.console"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("print(1)", "print"),
        ("import click\ndef f():\n    click.echo(1)", "click.echo"),
        ("from click import echo as say\nsay(1)", "click.echo"),
        ("import sys as s\ns.stderr.write('a')", "sys.stderr"),
        ("def f():\n    from rich.console import Console\n    Console(stderr=True)", "rich.console.Console"),
    ],
)
def test_each_way_to_print_is_found(source: str, name: str) -> None:
    assert printing_names(source) == {name}


def jpeg(seed: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


PICTURES = {f"{name}/{k}{HOSTILE}.jpg": jpeg(k) for name in CLASSES for k in range(4)}
BROKEN = f"{CLASSES[0]}/broken{HOSTILE}.jpg"
BYTES_NAME = os.fsdecode(b"bytes\xff\x1b.jpg")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that contains a list of paths, a store, a run, and photographs in a folder, a tar and a zip.

    All names contain control characters.
    """
    root = tmp_path_factory.mktemp("hostile")
    for split in ("train", "val"):
        for name, content in {**PICTURES, f"{CLASSES[1]}/{BYTES_NAME}": jpeg(9), BROKEN: b"no image"}.items():
            path = root / f"photos{HOSTILE}" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    with tarfile.open(root / f"tar{HOSTILE}.tar", "w") as archive:
        for name, content in {**PICTURES, BROKEN: b"no image"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(root / f"zip{HOSTILE}.zip", "w") as zipped:
        for name, content in {**PICTURES, BROKEN: b"no image"}.items():
            zipped.writestr(name, content)
    (root / f"list{HOSTILE}.csv").write_text(f'path,label\n"none{HOSTILE}.jpg",x\n', newline="")
    store = root / f"store{HOSTILE}"
    build = ["build-lmdb", str(root / f"photos{HOSTILE}"), "--store", str(store), "--jobs", "1", "--on-bad", "skip"]
    printed = run(prep.cli.main, build)
    assert printed.exit_code == 0 and f"broken{SHOWN}.jpg" in printed.output
    config = RunConfig(
        store, SHORT, 4, model=SMALL_ALEXNET, run_dir=root / f"run{HOSTILE}", epochs=1, log_every=1, threads=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: f"host{HOSTILE}")
        fit(Run.open(config))
    return root


def run(main: click.Group, args: list[str]) -> Result:
    """Run a command as on a terminal, where click keeps escape codes. Assert that the command prints no escape code."""
    result = CliRunner().invoke(main, args, color=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert_harmless(result.stdout)
    assert_harmless(result.stderr)
    return result


def assert_harmless(output: str) -> None:
    """Assert that `output` contains only printable characters and ends of lines."""
    assert output.replace("\n", "").isprintable(), ascii(output)


COMMANDS = [
    ("alexprep", "build-lmdb PHOTOS --store STORE --jobs 1 --on-bad skip", 0, f"0 a{SHOWN}, 1 b{SHOWN}"),
    ("alexprep", "build-lmdb PHOTOS --store new --jobs 1 --dry-run", 1, f"broken{SHOWN}.jpg: not an image"),
    ("alexprep", "build-lmdb TAR --store new --jobs 1", 1, f"broken{SHOWN}.jpg: not an image"),
    ("alexprep", "build-lmdb ZIP --store new --jobs 1", 1, f"broken{SHOWN}.jpg: not an image"),
    ("alexprep", "build-lmdb LIST --store new --jobs 1", 1, f"none{SHOWN}.jpg"),
    ("alexprep", "verify --store STORE --quick --jobs 1", 0, f"store{SHOWN}: 26 records"),
    ("alexprep", "inspect --store STORE", 0, f"0 a{SHOWN}"),
    ("alexprep", "inspect --store STORE --key 0", 0, f"{SHOWN}.jpg"),
    ("alexprep", "inspect --store STORE --key HOSTILE", 1, SHOWN),
    ("alexprep", "export-files OUT --store STORE --jobs 1", 0, f"out{SHOWN}"),
    ("alexprep", "merge STORE STORE --store new", 2, f"store{SHOWN}"),
    ("alexprep", "copy STORE COPY", 0, f"copy{SHOWN}"),
    ("alexprep", "verify --store HOSTILE", 1, r"--store $'\x1b]0;x\x07\xc2\x9b2J"),
    ("alexprep", "HOSTILE", 2, SHOWN),
    ("alexprep", "verify --jobs HOSTILE", 2, SHOWN),
    ("alexstream", "inspect --store STORE --batch 99", 2, f"store{SHOWN}"),
    ("alexstream", "preview OUT --store STORE", 2, f"out{SHOWN}"),
    ("alexstream", "status --name HOSTILE", 2, SHOWN),
    ("alextrain", "status RUN", 0, f"run{SHOWN}"),
    ("alextrain", "compare RUN RUN2 --out a.png", 0, f"run{SHOWN}"),
    ("alextrain", "evaluate RUN --store STORE --gpus cpu --views 1", 0, "top-1"),
    ("alextrain", "predict RUN PICTURE --gpus cpu", 0, f"a{SHOWN}"),
    ("alextrain", "run --store STORE --run-dir RUN --gpus cpu --dry-run", 0, f"run{SHOWN}"),
    ("alextrain", "run --store STORE --set HOSTILE=1", 2, r"--set \x1b]0;x\x07\x9b2J\x7f\u202e=1"),
    ("alextrain", "recipe HOSTILE", 2, SHOWN),
]


@pytest.mark.parametrize(
    ("group", "command", "code", "shown"), COMMANDS, ids=[f"{group} {command}" for group, command, *_ in COMMANDS]
)
def test_no_name_of_a_file_controls_the_terminal(
    group: str, command: str, code: int, shown: str, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {"PHOTOS": "photos", "STORE": "store", "RUN": "run"}
    paths = {word: hostile / f"{name}{HOSTILE}" for word, name in folders.items()}
    paths |= {word: hostile / f"{word.lower()}{HOSTILE}.{ending}" for word, ending in (("TAR", "tar"), ("ZIP", "zip"))}
    paths |= {"LIST": hostile / f"list{HOSTILE}.csv", "PICTURE": paths["PHOTOS"] / "train" / next(iter(PICTURES))}
    paths |= {"OUT": tmp_path / f"out{HOSTILE}", "COPY": tmp_path / f"copy{HOSTILE}", "RUN2": tmp_path / "run2"}
    if "RUN2" in command:
        shutil.copytree(paths["RUN"], paths["RUN2"])
    args = [str(paths.get(word, word.replace("HOSTILE", HOSTILE))) for word in command.split()]
    groups = {"alexprep": prep.cli.main, "alexstream": pipeline.cli.main, "alextrain": train.cli.main}
    result = run(groups[group], args)
    assert result.exit_code == code and shown in result.output, result.output


def test_json_gives_a_program_the_exact_names(hostile: Path) -> None:
    store = hostile / f"store{HOSTILE}"
    about = json.loads(run(prep.cli.main, ["inspect", "--store", str(store), "--json"]).stdout)
    assert about["classes"] == CLASSES
    record = json.loads(run(prep.cli.main, ["inspect", "--store", str(store), "--key", "0", "--json"]).stdout)
    assert record["source"] in (*PICTURES, os.fsencode(f"{CLASSES[1]}/{BYTES_NAME}").decode(errors="backslashreplace"))
    state = json.loads(run(train.cli.main, ["status", str(hostile / f"run{HOSTILE}"), "--json"]).stdout)
    assert state["host"] == f"host{HOSTILE}" and state["run_dir"].endswith(f"run{HOSTILE}")


def test_workers_and_progress_bars_print_no_hostile_name_to_a_terminal(hostile: Path, tmp_path: Path) -> None:
    """With TERM=dumb, the progress bar itself prints no escape codes, so the output must not contain any."""
    command = [sys.executable, "-m", "prep", "build-lmdb", str(hostile / f"photos{HOSTILE}"), "--on-bad", "skip"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*command, "--jobs", "1", "--store", str(tmp_path / f"new{HOSTILE}")],
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
    ) as ran:
        os.close(theirs)
        output = b""
        with suppress(OSError):  # at the end of file, a pseudo-terminal raises EIO
            while chunk := os.read(ours, 4096):
                output += chunk
    os.close(ours)
    text = output.decode().replace("\r", "")
    assert ran.returncode == 0 and SHOWN in text, text
    assert_harmless(text)
