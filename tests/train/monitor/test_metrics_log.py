"""What a run tells: norms against NumPy on its checkpoints, TensorBoard's files read back by TensorBoard, the views.

One small run is trained, its standard error a terminal; the rest gives a MetricsLog lines of its own.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import resource
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.cli
from prep.console import DiskFull, Progress, Terminated
from tests.train.trainer.test_loop import SMALL, config
from train.config.architecture import ALEXNET, ARCHITECTURES, LAYERS
from train.config.recipes import SHORT
from train.evaluation.evaluate import EvalResult
from train.model.alexnet import AlexNet
from train.monitor.console_view import ConsoleView, QuietView, RunLength
from train.monitor.interval_metrics import layer_norms, peak_memory
from train.monitor.live_view import LiveView, sparkline
from train.monitor.metrics_log import MetricsLog
from train.monitor.view import choose_view
from train.runs import checkpoint
from train.runs.run import Run
from train.runs.run_dir import read_metrics, tensorboard_scalars, seconds_left
from train.trainer.loop import fit
from train.trainer.watchdog import parameter_norms

STATUS = "from train.cli import main; main()"
PLAN = RunLength(steps_per_epoch=10, steps=100, batch_size=8)


class Told(NamedTuple):
    """A run of 9 steps, what its terminal showed, and what `alextrain status --json` said after step 5."""

    run_dir: Path
    shown: str
    status: dict


@pytest.fixture(scope="module")
def told(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    run_dir = tmp_path_factory.mktemp("told") / "run"
    said: list[str] = []
    log_line = MetricsLog.train

    def ask_after_five(self: MetricsLog, line: dict) -> None:
        log_line(self, line)
        if line["step"] == 5:
            words = [sys.executable, "-c", STATUS, "status", str(run_dir), "--json"]
            said.append(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    parent, child = pty.openpty()
    shown: list[bytes] = []

    def watch() -> None:
        try:
            while part := os.read(parent, 65536):
                shown.append(part)
        except OSError:  # EIO: the other end is closed
            pass

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(child, "w") as terminal:
        patch.setattr(MetricsLog, "train", ask_after_five)
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "110")
        fit(Run.open(config(store, run_dir)))
    watcher.join()
    os.close(parent)
    return Told(run_dir, b"".join(shown).decode(), json.loads(said[0]))


def line(step: int, **numbers: object) -> dict:
    """A line as the loop gives it to a MetricsLog."""
    read = {"loss": 3.0 / step, "top1_error": 0.5, "top5_error": 0.25, "images_per_s": 16.0, "waiting_share": 0.1}
    norms = {"gradient_norm": {"conv1": 0.5 * step}, "weight_norm": {"conv1": 2.0}}
    more = {"stream_waiting_share": 0.2, **norms, "memory_mb": 1234.5, "lr": 0.01}
    return {"kind": "train", "epoch": step / 10, "step": step, **read, **more, **numbers}


def points(run_dir: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of all that TensorBoard finds."""
    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(tag, p.step, p.value) for tag in found.Tags()["scalars"] for p in found.Scalars(tag)]


def wanted(run_dir: Path) -> list[tuple[str, int, float]]:
    """The same from metrics.jsonl, in float32 as event files have it."""
    lines = read_metrics(run_dir)
    return [(tag, told["step"], float(np.float32(n))) for told in lines for tag, n in tensorboard_scalars(told).items()]


def test_norms_of_weights_are_those_of_the_checkpoint(told: Told) -> None:
    lines = {told["step"]: told for told in read_metrics(told.run_dir) if told["kind"] == "train"}
    for path in checkpoint.checkpoint_paths(told.run_dir):
        state = torch.load(path, weights_only=True)
        for layer in LAYERS:
            weights = state["parameters"][f"{layer}.weight"].double().numpy()
            assert lines[state["step"]]["weight_norm"][layer] == pytest.approx(np.sqrt((weights**2).sum()), rel=1e-5)


def test_norms_of_gradients_are_what_moved_the_weights(told: Told) -> None:
    """v' = momentum · v − decay · lr · w − lr · g between the checkpoints of steps 8 and 9, solved for g in float64."""
    before, after = (torch.load(path, weights_only=True) for path in checkpoint.checkpoint_paths(told.run_dir))
    last = [told for told in read_metrics(told.run_dir) if told["kind"] == "train"][-1]
    assert (before["step"], after["step"], last["step"]) == (8, 9, 9)
    for layer in LAYERS:
        v, w, moved = (
            state[part][f"{layer}.weight"].double().numpy()
            for state, part in ((before, "velocity"), (before, "parameters"), (after, "velocity"))
        )
        gradient = (SHORT.momentum * v - SHORT.weight_decay * last["lr"] * w - moved) / last["lr"]
        assert last["gradient_norm"][layer] == pytest.approx(np.sqrt((gradient**2).sum()), rel=1e-3), layer


def test_a_frozen_layer_has_no_gradient() -> None:
    model = AlexNet(3, SHORT, ("cpu", "cpu"), SMALL)
    for column in model.columns:
        column.conv2.weight.grad = torch.ones_like(column.conv2.weight)
    norms = layer_norms(parameter_norms(model))
    assert norms["gradient_norm"] == {"conv2": pytest.approx((2 * model.columns[0].conv2.weight.numel()) ** 0.5)}
    assert set(norms["weight_norm"]) == set(LAYERS)


def test_norms_of_large_layers_are_right() -> None:
    model = AlexNet(3, SHORT, ("cpu", "cpu"), replace(SMALL, widths=replace(SMALL.widths, conv5=256, fc6=1024)))
    with torch.no_grad():
        exact = sum(float((column.fc6.weight.fill_(0.3).double() ** 2).sum()) for column in model.columns) ** 0.5
    assert layer_norms(parameter_norms(model))["weight_norm"]["fc6"] == pytest.approx(exact, rel=3e-5)


def test_memory_is_what_the_process_had_at_most(told: Told) -> None:
    used = [told["memory_mb"] for told in read_metrics(told.run_dir) if told["kind"] == "train"]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3
    assert 50 < used[0] <= 1.02 * used[-1] <= 1.05 * most  # the kernel counts by and by


def test_memory_of_each_gpu_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 1e9 * (1 + device.index))
    one, two = torch.device("cuda:0"), torch.device("cuda:1")
    assert peak_memory((one, one))["gpu_memory_mb"] == [1000.0]
    assert peak_memory((two, one))["gpu_memory_mb"] == [2000.0, 1000.0]
    assert set(peak_memory((torch.device("cpu"),))) == {"memory_mb"}


def test_tensorboard_finds_every_number_of_the_run_once(told: Told) -> None:
    assert sorted(points(told.run_dir)) == sorted(wanted(told.run_dir))
    tags = {tag for tag, *_ in points(told.run_dir)}
    assert {"train/loss", "train/lr", "val/top1_error", "gradient_norm/fc8", "weight_norm/conv1"} <= tags


def test_a_run_that_goes_on_has_no_point_and_no_line_twice(tmp_path: Path) -> None:
    """Killed after lines that no checkpoint has, then before a validation; the first line is older than the events."""
    result = EvalResult(0.5, 0.25, 2.0, 12)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**line(1), "unix_time_s": 5.0}) + "\n")
    first = MetricsLog(tmp_path, PLAN, 1, False, QuietView())
    for step in (2, 3, 4):
        first.train(line(step))
    first.validation(1, 4, result)
    first.train(line(5))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    for validation_due in (False, True):
        with MetricsLog(tmp_path, PLAN, 4, validation_due, QuietView()) as log:
            if validation_due:
                log.validation(1, 4, result)
            log.train(line(5, loss=7.0))
        assert [told["kind"] for told in read_metrics(tmp_path)] == ["train"] * 4 + ["val", "train"]
    assert [(told["kind"], told["step"]) for told in read_metrics(tmp_path)] == [
        *[("train", step) for step in (1, 2, 3, 4)],
        ("val", 4),
        ("train", 5),
    ]
    found = points(tmp_path)
    assert sorted(found) == sorted(wanted(tmp_path)) and max(Counter(p[:2] for p in found).values()) == 1
    assert ("train/loss", 5, 7.0) in found


def test_without_tensorboard_a_run_goes_on_and_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with MetricsLog(tmp_path, PLAN, 0, False, ConsoleView()) as log:
        log.train(line(1))
    said = capsys.readouterr().err.splitlines()
    assert "pip install 'alexnet[tensorboard]'" in said[0] and said[1].startswith("epoch   0.10") and len(said) == 2
    assert not (tmp_path / "tensorboard").exists() and len(read_metrics(tmp_path)) == 1


def test_lines_wait_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file may grow by more than 100 bytes: a line is cut, taken back, and written with a later one."""
    with MetricsLog(tmp_path, PLAN, 0, False, QuietView()) as log:
        log.train(line(1))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
        try:
            log.train(line(2))
            log.train(line(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        said = [text for text in capsys.readouterr().err.splitlines() if "metrics.jsonl" in text]
        assert len(said) == 1 and "make room" in said[0]
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        log.train(line(4))
    assert [told["step"] for told in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert sorted(points(tmp_path)) == sorted(wanted(tmp_path))


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (None, "finished", ""),
        (KeyboardInterrupt(), "stopped", "by Ctrl-C"),
        (Terminated(), "stopped", "by SIGTERM"),
        (ValueError("no\nroom"), "failed", "no\nroom"),
    ],
)
def test_a_log_says_how_its_run_ended(tmp_path: Path, error: BaseException | None, state: str, said: str) -> None:
    try:
        with MetricsLog(tmp_path, PLAN, 0, False, QuietView()) as log:
            assert json.loads((tmp_path / "status.json").read_bytes())["state"] == "training"
            log.train(line(7))
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    status = json.loads((tmp_path / "status.json").read_bytes())
    assert (status["state"], status["said"], status["step"], status["process"]) == (state, said, 7, os.getpid())


def test_a_disk_that_is_full_at_the_beginning_is_said_and_costs_no_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in (1, 2)))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(DiskFull, match=r"cannot be written \(File too large\)\. Make room"):
            MetricsLog(tmp_path, PLAN, 2, False, QuietView())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_terminal_that_was_closed_ends_no_run(tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    live = LiveView(Console(file=Closed()))
    live.begin = live.end = lambda *of: live._console.print("…")  # type: ignore[method-assign]
    with pytest.raises(OSError, match="Input"):
        live.end()
    result = EvalResult(0.5, 0.25, 2.0, 12)
    live.begin = lambda *of: None  # type: ignore[method-assign]
    with MetricsLog(tmp_path, PLAN, 0, False, live) as log:
        log.validation(1, 10, result)
    assert json.loads((tmp_path / "status.json").read_bytes())["state"] == "finished"


def test_a_validation_that_ends_while_it_is_drawn_breaks_no_picture() -> None:
    class Ends(LiveView):
        looks = 0

        @property
        def _report(self) -> tuple[str, Progress] | None:
            self.looks += 1
            return ("validation", Progress(500, "images")) if self.looks == 1 else None

        @_report.setter
        def _report(self, value: object) -> None:
            pass

    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Ends(console))
    assert "validation: 0 of 500 images" in console.export_text()


def test_a_terminal_shows_a_run_and_is_left_tidy(told: Told) -> None:
    assert "step" in told.shown and "of 9" in told.shown and "images/s" in told.shown
    assert told.shown.count("centre view") == 3
    hidden, first_validation = told.shown.rindex("\x1b[?25l"), told.shown.index("centre view")
    assert hidden < told.shown.index("\x1b[?25h") < first_validation  # there is a cursor, should the run be killed
    assert "epoch   0.33" not in told.shown  # no plain lines beside it


def test_another_process_is_told_where_the_run_stands(told: Told) -> None:
    status = told.status
    assert (status["state"], status["alive"], status["finished"]) == ("training", True, False)
    assert (status["step"], status["steps"], status["train"]["step"], status["val"]["epoch"]) == (5, 9, 5, 1)
    assert status["epoch"] == pytest.approx(5 / 3) and status["checkpoint"]["step"] == 4
    assert status["process"] == os.getpid() and status["seconds_since"] < 60


def test_the_live_view_has_curves_rates_and_the_time_left() -> None:
    console = Console(force_terminal=True, record=True, width=100, file=io.StringIO())
    live = LiveView(console)
    live.begin(PLAN, [line(step) for step in range(1, 9)], 8)
    live.follow(lambda: 2)
    live.train(line(10, loss=0.25, gpu_memory_mb=[2500.0, 700.0]))
    live.validation({"kind": "val", "epoch": 1, "step": 10, "images": 12, **vars(EvalResult(0.5, 0.25, 2.0, 12))})
    live.validation({"kind": "val", "epoch": 2, "step": 10, "images": 12, **vars(EvalResult(0.625, 0.25, 2.0, 12))})
    live.end()
    console.export_text()
    console.print(live)
    text = console.export_text()
    assert "12 of 100" in text and "1.20" in text and "0.250" in text
    assert "44 s left" in text  # 88 steps of 8 images at 16 images a second
    assert "lr 0.01   16.0 images/s   waits for stream 10.0%" in text
    assert "memory 1.2 GB, GPU 2.5 GB, GPU 700.0 MB" in text
    assert "validation at epoch 2: top-1 62.5%, top-5 25.0%; best top-1 50.0% at epoch 1" in text
    assert sparkline([3.0 / step for step in range(1, 9)] + [0.25]) in text
    with live.progress("validation", 500, "images") as report:
        report.advance(40)
        console.print(live)
    assert "validation: 40 of 500 images" in console.export_text()


def test_a_small_curve_shows_means_from_least_to_greatest() -> None:
    assert sparkline([10, 20, 30, 40, 50, 60, 70, 80]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▁▁" and sparkline([]) == ""
    assert sparkline([0, 4, 8, 8, 1, 1], 3) == "▂█▁"


def test_time_left_is_that_of_the_last_intervals() -> None:
    assert seconds_left([], 0, 10, 8) is None
    lines = [line(1, images_per_s=1.0), *(line(2, images_per_s=rate) for rate in [10.0, 40.0] * 10)]
    assert seconds_left(lines, 90, 100, 8) == pytest.approx(10 * 8 * (0.1 + 0.025) / 2)
    assert seconds_left(lines, 100, 100, 8) == 0


def test_quiet_leaves_the_last_line_and_the_answer(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "alexnet", replace(ALEXNET, widths=SMALL.widths))
    words = ["run", "--store", str(store), "--run-dir", str(tmp_path / "run"), "--gpus", "cpu", "--batch", "10"]
    done = CliRunner().invoke(train.cli.main, [*words, "--epochs", "1", "--recipe", "short", "--quiet", "--json"])
    assert done.exit_code == 0, done.output
    (last,) = done.stderr.splitlines()
    assert "trained. Next: alextrain evaluate" in last and json.loads(done.stdout)["val"]["images"] == 12


def test_the_view_fits_where_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(choose_view()) is ConsoleView and type(choose_view(quiet=True)) is QuietView
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert type(choose_view()) is LiveView and type(choose_view(quiet=True)) is QuietView
