"""Signals that ask a training to stop."""

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

from prep.console import Terminated, say
from tests.helpers.small_training import assert_same_result, metrics_without_clock, small_config
from train.monitor.metrics_log import MetricsLog
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.loop import fit
from train.trainer.stop_requests import stop_requests


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_that_step(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path, signum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    from train.monitor.metrics_log import MetricsLog

    log_line = MetricsLog.train

    def signal_after_five(self, line) -> None:
        log_line(self, line)
        if line["step"] == 5:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(MetricsLog, "train", signal_after_five)
    with pytest.raises(BaseException) as stop:
        fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert stop.typename == ("KeyboardInterrupt" if signum == signal.SIGINT else "Terminated")
    assert checkpoint.load_latest(run_dir).step == 6  # the step that was under way
    monkeypatch.undo()
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert_same_result(run_dir, uninterrupted_run)


def test_a_signal_during_validation_ends_the_run_at_once_and_loses_nothing(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.trainer.loop

    validate = train.trainer.loop.evaluate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    run_dir = tmp_path / "run"
    monkeypatch.setattr(train.trainer.loop, "evaluate", signalled)
    with pytest.raises(BaseException) as stop:
        fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert stop.typename == "Terminated"
    assert checkpoint.load_latest(run_dir).step == 3 and not any(
        m["kind"] == "val" for m in metrics_without_clock(run_dir)
    )
    monkeypatch.undo()
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert_same_result(run_dir, uninterrupted_run)


def test_a_signal_just_before_a_validation_does_not_wait_for_it() -> None:
    """After the loop has looked for one: the validation of ImageNet takes minutes."""
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated), stop.raised_at_once():
            pytest.fail("it began")


def test_a_second_signal_is_obeyed_at_once_and_none_after_the_loop() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert isinstance(stop.requested, KeyboardInterrupt)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_in_the_middle_of_a_line_that_waits_for_its_reader_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python refuses to write another within it."""
    reads, writes = os.pipe()
    main = threading.get_ident()

    def interrupt_then_read() -> None:
        while int.from_bytes(fcntl.ioctl(reads, termios.FIONREAD, bytes(4)), sys.byteorder) < 1 << 16:
            time.sleep(0.01)
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        while os.read(reads, 1 << 16):
            pass

    reader = threading.Thread(target=interrupt_then_read)
    with os.fdopen(writes, "w") as stderr, monkeypatch.context() as patch, stop_requests() as stop:
        patch.setattr(sys, "stderr", stderr)
        reader.start()
        say("x" * (1 << 18))
    reader.join()
    os.close(reads)
    assert isinstance(stop.requested, KeyboardInterrupt)


@pytest.mark.parametrize("where", ["a pipe that nobody reads", "a full disk"])
def test_a_run_that_no_one_hears_still_ends_with_a_checkpoint(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """`alextrain run 2>&1 | tee log`, and Ctrl-C, which ends tee first; or a log on the disk that is full."""
    log_line, (reads, writes) = MetricsLog.train, os.pipe()
    os.close(reads)
    stderr = os.fdopen(os.open("/dev/full", os.O_WRONLY) if where == "a full disk" else os.dup(writes), "w")
    os.close(writes)

    def interrupted(self: MetricsLog, line: dict[str, Any]) -> None:
        if line["step"] == 1:
            monkeypatch.setattr(sys, "stderr", stderr)
            os.kill(os.getpid(), signal.SIGINT)
        log_line(self, line)

    monkeypatch.setattr(MetricsLog, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(Run.open(small_config(stores["ppm"], tmp_path / "run")))
    monkeypatch.undo()
    with suppress(OSError):
        stderr.close()
    assert checkpoint.load(tmp_path / "run").step == 2
