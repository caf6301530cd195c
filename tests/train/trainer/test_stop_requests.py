"""Tests of SIGTERM, SIGINT and SIGHUP: training finishes the step in progress and saves a checkpoint."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import train.trainer.training
from prep.console import Terminated, say
from tests.helpers.small_training import assert_same_result, metrics_without_clock, small_config
from train.monitor.metrics_log import MetricsLog
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.loop import fit
from train.trainer.stop_requests import stop_requests


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_step_leaves_a_checkpoint_of_that_step_from_which_the_run_resumes(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path, signum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, log_line = tmp_path / "run", MetricsLog.train

    def send_signal_after_five(self: MetricsLog, line: dict[str, Any]) -> None:
        log_line(self, line)
        if line["step"] == 5:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(MetricsLog, "train", send_signal_after_five)
    with pytest.raises(BaseException) as raised:
        fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert raised.typename == ("KeyboardInterrupt" if signum == signal.SIGINT else "Terminated")
    assert checkpoint.load(run_dir).step == 6  # the run finished step 6 before it stopped
    monkeypatch.undo()
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert_same_result(run_dir, uninterrupted_run)


def test_a_signal_during_a_validation_stops_at_once_and_the_resumed_run_validates_again(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, evaluate = tmp_path / "run", train.trainer.training.evaluate

    def send_signal(*args: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **keywords)

    monkeypatch.setattr(train.trainer.training, "evaluate", send_signal)
    with pytest.raises(BaseException) as raised:
        fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert raised.typename == "Terminated"
    assert checkpoint.load(run_dir).step == 3
    assert not any(line["kind"] == "val" for line in metrics_without_clock(run_dir))
    monkeypatch.undo()
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert_same_result(run_dir, uninterrupted_run)


def test_a_signal_just_before_a_validation_stops_before_it_begins() -> None:
    """The signal arrives after the loop has looked for signals, and before the validation begins.

    The run must stop before the validation, because a validation on ImageNet takes minutes.
    """
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated), stop.raised_at_once():
            pytest.fail("the validation began")


def test_under_torchrun_a_repeated_signal_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sends SIGTERM to torchrun and to the ranks. torchrun then sends a second SIGTERM to the ranks."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("train.trainer.stop_requests.REPEATED_BY_TORCHRUN_S", 0.3)
    with stop_requests() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(stop.requested, Terminated)
        time.sleep(0.4)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_stops_at_once_and_the_handlers_are_restored_at_the_end() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert isinstance(stop.requested, KeyboardInterrupt)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_interrupts_a_blocked_print_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a signal handler interrupts a print and prints to the same stream itself, Python raises RuntimeError."""
    read_fd, write_fd = os.pipe()
    main_thread = threading.get_ident()

    def interrupt_then_read() -> None:
        while int.from_bytes(fcntl.ioctl(read_fd, termios.FIONREAD, bytes(4)), sys.byteorder) < 1 << 16:
            time.sleep(0.01)  # this loop runs until the pipe is full
        time.sleep(0.05)
        signal.pthread_kill(main_thread, signal.SIGINT)
        time.sleep(0.05)
        while os.read(read_fd, 1 << 16):
            pass

    reader = threading.Thread(target=interrupt_then_read)
    with os.fdopen(write_fd, "w") as stderr, monkeypatch.context() as patch, stop_requests() as stop:
        patch.setattr(sys, "stderr", stderr)
        reader.start()
        say("x" * (1 << 18))
    reader.join()
    os.close(read_fd)
    assert isinstance(stop.requested, KeyboardInterrupt)


@pytest.mark.parametrize("output", ["a closed pipe", "a full disk"])
def test_a_run_whose_messages_cannot_be_written_stops_with_a_checkpoint(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """A closed pipe: in `alextrain run 2>&1 | tee log`, Ctrl-C ends tee before alextrain.

    A full disk: standard error is a file on a full disk.
    """
    log_line, (read_fd, write_fd) = MetricsLog.train, os.pipe()
    os.close(read_fd)
    stderr = os.fdopen(os.open("/dev/full", os.O_WRONLY) if output == "a full disk" else os.dup(write_fd), "w")
    os.close(write_fd)

    def interrupt(self: MetricsLog, line: dict[str, Any]) -> None:
        if line["step"] == 1:
            monkeypatch.setattr(sys, "stderr", stderr)
            os.kill(os.getpid(), signal.SIGINT)
        log_line(self, line)

    monkeypatch.setattr(MetricsLog, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(Run.open(small_config(stores["ppm"], tmp_path / "run")))
    monkeypatch.undo()
    with suppress(OSError):
        stderr.close()
    assert checkpoint.load(tmp_path / "run").step == 2
