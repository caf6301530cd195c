"""Runs commands in forks of this process, and gives a verdict on how each command ended.

This process imports the libraries of the commands, such as torch, before it forks. A fork then starts within
milliseconds. A command may use 1 GB of writable memory (RLIMIT_DATA) and 1 GB of resident memory (ru_maxrss of the
command's largest process). The memory that a fork has at its start, such as that of the libraries, is not counted. A
command that exceeds the time limit is killed.
"""

from __future__ import annotations

import os
import re
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import monotonic

from tools.edits.targets import PACKAGES, Edit, Target, real_path

MEMORY_BYTES = 1_000_000_000
_SLICE_S = 0.5
_SMALL_MODULES = (  # these modules load no large library
    *("numpy", "lmdb", "PIL.Image", "simplejpeg", "prep.cli", "prep.check.verify", "prep.check.inspect"),
    *("prep.check.export", "prep.merge.stores", "prep.remote.copy_store", "prep.build.split"),
    *("train.cli", "train.runs.status", "train.runs.ensemble_status"),
)
_MODULES = (
    *("torch", "scipy.io", "sklearn.neighbors", "matplotlib.pyplot", "nvidia.dali", "tensorboard", "safetensors"),
    *("rich.progress", "pyarrow.parquet", "pipeline.cli", "pipeline.loader", "pipeline.diagnostics.preview"),
    *("pipeline.diagnostics.bench", "pipeline.diagnostics.shuffle_quality", "train.trainer.loop"),
    *("train.runs.saved_config", "train.evaluation.predictions", "train.evaluation.trained_run", "train.report.html"),
    *("train.report.compare", "train.convert.export", "train.convert.import_torchvision", "train.experiments.ablate"),
    "train.experiments.ensemble",
)
_OUT_OF_MEMORY = re.compile(
    r"MemoryError|[Mm]emory ran out|[Uu]nable to allocate|[Cc]an(no|')t allocate|not enough memory|bad_alloc"
)
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")
_RESULT = re.compile(r"(^|/)manifest\.json$|(^|/)(out|record|features)[^/]*$|\.(png|svg|html|npz|safetensors|onnx)$")
# Files that a command may write before it ends with an error: locks, hidden files, the files of an unfinished copy,
# merge or build, and run.json, status.json and tensorboard/ of a run.
_MAY_CHANGE = re.compile(
    r"^(copy|merge|parts)/|(^|/)\.|(^|/)part-\d+-of-\d+\.lock$|(^|/)(run|status)\.json$|(^|/)tensorboard(/|$)"
)

# Verdicts on a command: it refused the file with one line of error, or it accepted the file. Neither is a fault.
ONE_LINE, ACCEPTED = "one line", "accepted"
FAULTS = ("traceback", "hang", "memory", "control characters", "several lines", "killed", "changed files")


@dataclass(frozen=True)
class Outcome:
    """How one command ended after one edit."""

    file: str
    field: str
    kind: str
    command: str
    verdict: str  # ONE_LINE, ACCEPTED or the name of a fault
    exit_code: int  # −n if signal n ended the command
    text: str  # the last line on standard error
    seconds: float
    memory_mb: int


def import_modules(large: bool) -> None:
    """Import the modules that commands use, so that a fork need not import them.

    large  True: also import large libraries such as torch and DALI, which takes some seconds
    """
    for name in (*_SMALL_MODULES, *(_MODULES if large else ())):
        import_module(name)
    if large:
        import torch

        torch.set_num_threads(1)


def check_edit(target: Target, edit: Edit, commands: Sequence[str], samples: Path, limit_s: float) -> list[Outcome]:
    """Apply an edit to a copy of the examples, run the commands, and return one Outcome for each command.

    If a command changes a file of the copy, the next command gets a new copy.
    """
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="edit-files-") as folder:
        work, log = Path(folder, "work"), Path(folder, "log")
        before: dict[str, tuple[int, ...]] = {}
        for command in commands:
            if not before or before != _states(work):
                shutil.rmtree(work, ignore_errors=True)
                _copy(samples, target.folders, work)
                edit.apply(work / real_path(samples, target.file))
                before = _states(work)
            ended = _run(command, work, log, limit_s)
            verdict, text = _judge(ended, log)
            if verdict == ONE_LINE:
                changed = _changed(before, _states(work))
                if changed:
                    verdict, text = "changed files", f"{', '.join(changed[:4])}; {text}"
            if (work / "executed").exists():
                verdict = "code executed"
            memory_mb = max(0, ended.memory_bytes) // 1_000_000
            outcomes.append(
                Outcome(
                    *(edit.file, edit.field, edit.kind, command, verdict, ended.exit_code, text),
                    round(ended.seconds, 3),
                    memory_mb,
                )
            )
    return outcomes


@dataclass(frozen=True)
class _Ended:
    exit_code: int
    seconds: float
    memory_bytes: int
    is_hanging: bool


def _copy(samples: Path, names: Sequence[str], work: Path) -> None:
    """Copy the files and folders `names` from `samples` into the new folder `work`. Missing files are left out."""
    work.mkdir()
    for name in names:
        if name == "photos":  # no command writes into photos, so a link is enough
            (work / name).symlink_to(samples / name)
        elif not (samples / name).exists():
            continue
        elif (samples / name).is_dir():
            shutil.copytree(samples / name, work / name)
        else:
            shutil.copy2(samples / name, work / name)


def _states(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return {relative path: (mode, size, modification time, inode)} of a folder's files, except those named .lock.

    For a subfolder, the value has only the mode.
    """
    states = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            status = os.lstat(path)
            is_folder = name in folders and not os.path.islink(path)
            size = () if is_folder else (status.st_size, status.st_mtime_ns, status.st_ino)
            if name != ".lock":
                states[os.path.relpath(path, folder)] = (status.st_mode, *size)
    return states


def _changed(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> list[str]:
    """Return the files that a command changed, removed or made although it ended with an error.

    Files that match _MAY_CHANGE are left out. A new file counts only if its name is that of a finished result, such as
    a manifest. New shards without a manifest are therefore allowed.
    """
    old = {name for name in before if before[name] != after.get(name)}
    new = {name for name in after if name not in before and _RESULT.search(name)}
    return sorted(name for name in old | new if not _MAY_CHANGE.search(name))


def _run(command: str, work: Path, log: Path, limit_s: float) -> _Ended:
    """Run a command in a fork. The output of the command goes to the files `log`.out and `log`.err."""
    began = monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(command, work, log, writing)
    os.close(writing)
    handle = os.pidfd_open(pid)
    ready: list[int] = []
    # The wait is divided into slices of half a second. If the machine suspends all processes for a time, this time
    # counts as only one slice.
    for _ in range(int(limit_s / _SLICE_S)):
        ready, _, _ = select.select([handle], [], [], _SLICE_S)
        if ready:
            break
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    os.close(handle)
    start_bytes = int(os.read(reading, 32) or b"0")
    os.close(reading)
    try:
        os.killpg(pid, signal.SIGKILL)  # ends worker processes that are still running
    except (ProcessLookupError, PermissionError):
        pass
    memory_bytes = usage.ru_maxrss * 1024 - start_bytes
    return _Ended(os.waitstatus_to_exitcode(status), monotonic() - began, memory_bytes, not ready)


def _child(command: str, work: Path, log: Path, writing: int) -> None:
    """Run a command in this process, which is a new fork, and end the process."""
    code = 1
    try:
        os.setsid()
        os.chdir(work)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for descriptor, path in ((0, os.devnull), (1, f"{log}.out"), (2, f"{log}.err")):
            opened = os.open(path, os.O_RDONLY if descriptor == 0 else flags, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.stdin, sys.stdout, sys.stderr = (open(n, "w" if n else "r", closefd=False) for n in range(3))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = _memory("VmData") + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        os.write(writing, str(_memory("VmRSS")).encode())
        program, *words = shlex.split(command)
        sys.argv = [program, *words]
        import_module(f"{PACKAGES[program]}.cli").main(words, prog_name=program)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _memory(name: str) -> int:
    """Return the value of the line `name` in /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _judge(ended: _Ended, log: Path) -> tuple[str, str]:
    """Return the verdict on a command, and the last line that it printed on standard error."""
    output, errors = (Path(f"{log}.{name}").read_bytes() for name in ("out", "err"))
    text = (output + errors).decode("utf-8", "surrogateescape")
    lines = errors.decode("utf-8", "backslashreplace").strip().splitlines()
    last = lines[-1][:400] if lines else ""
    if ended.memory_bytes > MEMORY_BYTES or _OUT_OF_MEMORY.search(text):
        return "memory", last
    if ended.is_hanging:
        return "hang", last
    if "Traceback (most recent call last)" in text:
        return "traceback", last
    if any(c in _BIDI or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") for c in text):
        return "control characters", ascii(last)
    if ended.exit_code < 0:
        return "killed", f"signal {-ended.exit_code}; {last}"
    if ended.exit_code == 0:
        return ACCEPTED, last
    is_one_line = sum(line.startswith("Error: ") for line in lines) == 1 and last.startswith("Error: ")
    noise = [line for line in lines if re.match(r"\S+\.py:\d+: ", line)]
    return (ONE_LINE, last) if is_one_line and not noise else ("several lines", " | ".join(lines[-3:])[:400])
