"""For tools.gpu_check: measures the rate of `alextrain run`, and compares a killed run with an uninterrupted run.

The rate of a run comes from its metrics.jsonl, which has a line for each interval of steps. The first interval of a run
is not counted, because the stream starts in this interval. The first interval of an epoch is not counted, because the
stream prefetched batches while a checkpoint was written. Checkpoints and validations are outside of the intervals.
The time of checkpoints and validations is reported as `outside_s`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prep.console import UserError
from prep.store.manifest import Store
from tools.gpu.settings import Check, GpuCheckSettings
from train.runs import checkpoint
from train.runs.run_dir import read_metrics

PROGRAM = (sys.executable, "-m", "train")  # `alextrain`
RUN_EPOCHS, LINES_PER_EPOCH = 3, 5
MOST_STEPS, MOST_STEPS_PER_LINE = 300, 20
RESUME_STEPS = 40
_TRIAL_STEPS = 8  # number of steps of every run in the trial on a CPU (--device cpu --quick)
_TIMEOUT_S = 90.0  # time after which a run is killed
_POLL_S = 0.02
_ROOT = Path(__file__).parents[2]


# ---- starting runs


def run_command(settings: GpuCheckSettings, store: Path, run_dir: Path, batch: int, **options: object) -> list[str]:
    """Return the command line of `alextrain run`.

    options  options to add: log_every=20 adds --log-every 20. The value True stands for an option without a value.
    """
    names = [device.removeprefix("cuda:") for device in dict.fromkeys(settings.devices)]
    command = [*PROGRAM, "run", "--store", str(store.absolute()), "--run-dir", str(run_dir), "--gpus", ",".join(names)]
    command += ["--precision", run_precision(settings), "--batch", str(batch), "--quiet"]
    if settings.is_cpu_trial:
        command += ["--model", "half"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return command


def run_precision(settings: GpuCheckSettings) -> str:
    """Return the precision of the runs: the last of settings.precisions, but fp32 in the trial on a CPU."""
    return settings.precisions[0 if settings.is_cpu_trial else -1]


def start(command: Sequence[str], errors: Path) -> subprocess.Popen[bytes]:
    """Start a run in the root of the checkout. Standard output and standard error go to the file `errors`."""
    with errors.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=_ROOT)


def finish(process: subprocess.Popen[bytes], errors: Path, timeout_s: float = _TIMEOUT_S) -> None:
    """Wait for a run, and kill it after `timeout_s`. Raises UserError if the run fails or is killed."""
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise UserError(f"alextrain run: not finished after {timeout_s:.0f} s") from None
    if code:
        raise UserError(f"alextrain run: exit code {code}. {last_line_of(errors)}")


def last_line_of(errors: Path) -> str:
    """Return the last line of a file of messages, truncated to 300 characters."""
    lines = errors.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "No message."


def stop(*processes: subprocess.Popen[bytes]) -> None:
    """Kill the processes that are still running."""
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


# ---- the rate of a run


@dataclass(frozen=True)
class RunRate:
    """Rate of one run. The fields are JSON keys of the report.

    An interval has the steps between two lines of metrics.jsonl. All intervals are counted, except those that begin
    with an epoch.
    """

    images_per_s: float  # images of the counted intervals divided by the time of the counted intervals
    least: float  # rate of the slowest counted interval
    most: float  # rate of the fastest counted interval
    intervals: int  # number of counted intervals
    waiting_share: float  # share of the time of the counted intervals in which training waited for the stream
    outside_s: float  # time of checkpoints and validations, in seconds: the time outside of all intervals


def rate_of_run(lines: Sequence[Mapping[str, Any]], batch: int, steps_per_epoch: int) -> RunRate:
    """Return the rate of a run from the lines of metrics.jsonl. Raises UserError if no interval can be counted."""
    counted: list[tuple[float, float, float]] = []  # (images, seconds, waiting share)
    all_s, step = 0.0, 0
    train = [line for line in lines if line["kind"] == "train"]
    for line in train:
        images = (line["step"] - step) * batch
        seconds = images / line["images_per_s"]
        if step % steps_per_epoch:
            counted.append((images, seconds, line["waiting_share"]))
        if step:
            all_s += seconds
        step = line["step"]
    if not counted:
        raise UserError(f"alextrain run: {len(train)} lines of metrics, and no interval that can be counted")
    rates = [images / seconds for images, seconds, _ in counted]
    counted_s = sum(seconds for _, seconds, _ in counted)
    return RunRate(
        round(sum(images for images, _, _ in counted) / counted_s, 1),
        round(min(rates), 1),
        round(max(rates), 1),
        len(counted),
        round(sum(seconds * share for _, seconds, share in counted) / counted_s, 4),
        round(max(0.0, train[-1]["unix_time_s"] - train[0]["unix_time_s"] - all_s), 2),
    )


def run_rates(settings: GpuCheckSettings, budget_s: float) -> list[dict[str, Any]]:
    """Run `alextrain run` with each store, and with the last store also at twice the batch size.

    Returns a row for each run. If a run fails, its row has the key "error" instead of rates. After `budget_s` seconds,
    no new run is started.
    """
    started, rows = time.perf_counter(), []
    stores = list(settings.stores_by_format().items())
    trials = [(format, store, settings.batch) for format, store in stores]
    if not settings.quick:
        trials.append((*stores[-1], 2 * settings.batch))
    for format, store, batch in trials:
        row: dict[str, Any] = {"format": format, "batch": batch, "precision": run_precision(settings)}
        try:
            if time.perf_counter() - started > budget_s:
                raise UserError(f"not measured: the time of {budget_s:.0f} s was used up")
            row |= vars(_rate_from(settings, store, batch))
        except UserError as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


def _rate_from(settings: GpuCheckSettings, store: Path, batch: int) -> RunRate:
    steps_per_epoch = Store.open(store).split("train").records // batch
    if not steps_per_epoch:
        raise UserError(f"{store}: fewer records than a batch of {batch}")
    log_every = max(1, min(MOST_STEPS_PER_LINE, steps_per_epoch // LINES_PER_EPOCH))
    log_every = 1 if settings.is_cpu_trial else log_every
    steps = min(_TRIAL_STEPS if settings.is_cpu_trial else MOST_STEPS, RUN_EPOCHS * steps_per_epoch)
    with tempfile.TemporaryDirectory(prefix="alexnet-run-") as work:
        run_dir, errors = Path(work) / "run", Path(work) / "errors.txt"
        options = {"steps": steps, "log_every": log_every, "checkpoint_every": 10**6, "keep": 1}
        process = start(run_command(settings, store, run_dir, batch, **options), errors)
        try:
            finish(process, errors)
        finally:
            stop(process)
        return rate_of_run(read_metrics(run_dir), batch, steps_per_epoch)


# ---- kill and resume


def has_option(option: str) -> bool:
    """Return True if `alextrain run` has the option `option`, such as `--deterministic`."""
    command = [*PROGRAM, "run", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, timeout=_TIMEOUT_S, check=False)
    return option in result.stdout.split()


def resume_checks(settings: GpuCheckSettings) -> Iterator[Check]:
    """Compare two runs with --deterministic. One run is killed and resumed, and the other is not interrupted.

    On a CPU, runs are deterministic without this option. On a GPU, the check is left out if `alextrain run` does not
    have the option.
    """
    option = "--deterministic"
    deterministic = has_option(option)
    mode = f" with {option}" if deterministic else ""
    name = f"run{mode} killed and resumed on {' and '.join(dict.fromkeys(settings.devices))}"
    wanted = "bit-identical to the uninterrupted run"
    if settings.on_gpu and not deterministic:
        yield Check(name, True, f"left out: alextrain run has no option {option}", wanted)
        return
    store = next(iter(settings.stores_by_format().values()))
    batch = min(settings.batch, Store.open(store).split("train").records)
    steps = _TRIAL_STEPS if settings.is_cpu_trial else RESUME_STEPS
    options = {"steps": steps, "log_every": 1, "checkpoint_every": max(1, steps // 4), "keep": 1}
    if deterministic:
        options["deterministic"] = True
    with tempfile.TemporaryDirectory(prefix="alexnet-resume-") as work:
        folder, other = Path(work) / "uninterrupted", Path(work) / "killed"
        command, other_command = (run_command(settings, store, path, batch, **options) for path in (folder, other))
        killed_after = kill_and_resume(command, other_command, folder, other, steps)
        differing, count = compare_runs(folder, other, steps)
    found = f"killed after step {killed_after} of {steps}; "
    if differing:
        found += f"{len(differing)} of {count} parameters and velocities differ: {', '.join(differing[:3])}"
    else:
        found += f"all {count} parameters and velocities are bit-identical"
    yield Check(name, not differing, found, wanted)


def kill_and_resume(
    uninterrupted: Sequence[str], killed: Sequence[str], uninterrupted_dir: Path, killed_dir: Path, steps: int
) -> int:
    """Run both commands at the same time.

    Kill the second run with SIGKILL soon after half of its steps, and start this run again. Returns the last step in
    the second run's metrics.jsonl at the time of the kill. Raises UserError if a run fails, or if the second run ends
    before the kill.
    """
    errors = [folder.with_suffix(".txt") for folder in (uninterrupted_dir, killed_dir)]
    first, second = (start(command, file) for command, file in zip((uninterrupted, killed), errors, strict=True))
    try:
        deadline = time.monotonic() + _TIMEOUT_S
        while not (_last_step(killed_dir) > steps // 2 and checkpoint.checkpoint_paths(killed_dir)):
            if second.poll() is not None:
                raise UserError(f"alextrain run: ended before it was killed. {last_line_of(errors[1])}")
            if time.monotonic() > deadline:
                step = _last_step(killed_dir)
                raise UserError(f"alextrain run: reached only step {step} of {steps} in {_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
        os.kill(second.pid, signal.SIGKILL)
        if second.wait() != -signal.SIGKILL:
            raise UserError("alextrain run: ended before it was killed")
        killed_after = _last_step(killed_dir)
        second = start(killed, errors[1])
        finish(first, errors[0])
        finish(second, errors[1])
    finally:
        stop(first, second)
    return killed_after


def _last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def compare_runs(folder: Path, other: Path, steps: int) -> tuple[list[str], int]:
    """Return the names of the parameters and velocities that differ between the newest checkpoints of two runs.

    Also returns the number of compared tensors. Raises UserError if the newest checkpoint of a run is not that of step
    `steps`.
    """
    states = []
    for run_dir in (folder, other):
        state = checkpoint.load_latest(run_dir)
        if state is None or state.step != steps:
            raise UserError(f"{run_dir}: newest checkpoint of step {state and state.step}, expected {steps}")
        states.append(state)
    differing, count = [], 0
    for kind in ("parameters", "velocity"):
        tensors, others = (getattr(state, kind) for state in states)
        for name in sorted(set(tensors) | set(others)):
            count += 1
            if name not in tensors or name not in others or not torch.equal(tensors[name], others[name]):
                differing.append(name if kind == "parameters" else f"velocity of {name}")
    return differing, count
