"""Tests of runs with a service: the same bits as without a service, loss of the service, and signals."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.service.errors import ServiceLost
from prep.console import Terminated
from tests.helpers.alextrain import alextrain, json_lines, refusal
from tests.helpers.project import ROOT
from tests.helpers.small_training import SMALL_ALEXNET, assert_same_result, metrics_without_clock, small_config
from tests.helpers.torchrun.job import TorchrunServer
from tests.train.service.conftest import Service, config_with_two_streams
from train.config.architecture import ARCHITECTURES
from train.experiments.ensemble import member_configs, train_members
from train.monitor.console_view import QuietView
from train.monitor.interval_metrics import IntervalMetrics
from train.runs import checkpoint
from train.runs.ensemble_dir import Ensemble
from train.runs.run import Run
from train.trainer.loop import fit


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """after_step(n, action) makes the next run call `action` after its n-th step, before this step is logged."""
    count_step = IntervalMetrics.add

    def install(step: int, action: Callable[[], None]) -> None:
        trained = itertools.count(1)

        def add(self: IntervalMetrics, images: int) -> None:
            count_step(self, images)
            if next(trained) == step:
                action()

        monkeypatch.setattr(IntervalMetrics, "add", add)

    return install


def test_a_run_with_a_service_reads_no_record_and_has_the_result_of_a_run_without(
    store_without_records: Path,
    lasting_service: Service,
    local_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training and validation read from the service, also after the run has opened a second training stream."""
    config = config_with_two_streams(store_without_records, tmp_path / "run", service=lasting_service.option)
    fit(Run.open(config))
    assert_same_result(tmp_path / "run", local_run)
    state, expected = (checkpoint.load(folder) for folder in (tmp_path / "run", local_run))
    assert state.stream == expected.stream and state.identity == expected.identity
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch") and "  step " in line]
    assert len(lines) == 9
    assert all(re.search(r"  service lasting: \d workers?, \d+ batch(es)? queued$", line) for line in lines)


def test_the_members_of_an_ensemble_train_on_one_stream_of_a_service(
    store_without_records: Path, lasting_service: Service, local_run: Path, tmp_path: Path
) -> None:
    """Member 1 has the seeds of `local_run`. When the colour noise changes, the training opens a second stream."""
    changes = {"service": lasting_service.option, "seed": 2, "stream_seed": 3}
    config = config_with_two_streams(store_without_records, tmp_path / "pair", **changes)
    runs = [Run.open(member) for member in member_configs(config, 2)]
    train_members(tmp_path / "pair", Ensemble(2, 2, 3), runs, QuietView)
    assert_same_result(tmp_path / "pair/member-1", local_run)
    assert checkpoint.load(tmp_path / "pair/member-2").stream == checkpoint.load(local_run).stream


@pytest.mark.soak
def test_two_processes_evaluate_the_images_of_a_service(
    stores: dict[str, Path], lasting_service: Service, local_run: Path, torchrun: TorchrunServer, tmp_path: Path
) -> None:
    """The service decodes each image once. The last batch of each process is smaller than its other batches."""
    run_dir, made = shutil.copytree(local_run, tmp_path / "run"), lasting_service.images_made()
    words = ("evaluate", run_dir, "--store", stores["jpeg"], "--gpus", "cpu", "--views", "10")
    (expected,) = json_lines(*words)
    job = torchrun("--nproc-per-node", 2, "-m", "train", *words, "--service", lasting_service.option, "--json")
    assert job.wait(120) == 0, job.stderr
    (result,) = [json.loads(line) for line in job.stdout.splitlines()]
    assert result.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert result == expected and lasting_service.images_made() == made + result["images"]


@pytest.mark.parametrize("when", ["in the first epoch", "in the last epoch"])
def test_a_run_whose_service_is_lost_goes_on_with_the_local_store(
    stores: dict[str, Path],
    service: Service,
    local_run: Path,
    tmp_path: Path,
    after_step: Any,
    capsys: pytest.CaptureFixture[str],
    when: str,
) -> None:
    """If the service is lost in the first epoch, the run later opens its second training stream without the service."""
    after_step(1 if when == "in the first epoch" else 7, service.stop)
    options = {"service": service.option, "service_fallback": "local"}
    fit(Run.open(config_with_two_streams(stores["jpeg"], tmp_path / "run", **options)))
    assert_same_result(tmp_path / "run", local_run)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("service stopped is lost")]
    if when == "in the first epoch":
        assert any(line.endswith("  service stopped lost, this machine decodes") for line in lines)


@pytest.mark.soak
def test_a_run_without_a_fallback_stops_with_a_log_line_and_a_checkpoint_of_its_last_step_and_resumes(
    stores: dict[str, Path], service: Service, tmp_path: Path, after_step: Any
) -> None:
    """An epoch has 15 steps and one log line. The test stops the service after step 1.

    At that time, the loader has read a few batches ahead.
    """
    changes = {"batch_size": 2, "epochs": 1, "log_every": 100, "checkpoint_every": 100}
    fit(Run.open(small_config(stores["jpeg"], tmp_path / "local", **changes)))
    config = small_config(stores["jpeg"], tmp_path / "run", service=service.option, **changes)
    after_step(1, service.stop)
    with pytest.raises(
        ServiceLost, match=r"service stopped is lost: .*--service-fallback local, or leave out --service"
    ):
        fit(Run.open(config))
    (line,) = metrics_without_clock(tmp_path / "run")
    assert 1 <= line["step"] < 15 and checkpoint.load(tmp_path / "run").step == line["step"]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "service stopped is lost" in status["said"]
    service.start()
    fit(Run.open(config))
    service.stop()
    lines = [resumed for resumed in metrics_without_clock(tmp_path / "run") if resumed["kind"] == "train"]
    assert [resumed["step"] for resumed in lines] == [line["step"], 15]
    state, expected = (checkpoint.load(folder) for folder in (tmp_path / "run", tmp_path / "local"))
    assert all(tensor.equal(expected.parameters[name]) for name, tensor in state.parameters.items())


def test_a_service_that_is_lost_before_a_validation_leaves_the_validation_to_the_resumed_run(
    stores: dict[str, Path], service: Service, local_run: Path, tmp_path: Path, after_step: Any
) -> None:
    config = config_with_two_streams(stores["jpeg"], tmp_path / "run", service=service.option)
    after_step(3, service.stop)
    with pytest.raises(ServiceLost):
        fit(Run.open(config))
    state = checkpoint.load(tmp_path / "run")
    assert state.step == 3 and state.validation_due
    fit(Run.open(replace(config, service=None)))
    assert_same_result(tmp_path / "run", local_run)


@pytest.fixture
def small_alexnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)


@pytest.mark.usefixtures("small_alexnet")
def test_the_command_ends_with_one_line_and_exit_code_1_if_the_service_is_lost_or_missing(
    stores: dict[str, Path], service: Service, tmp_path: Path, after_step: Any
) -> None:
    words = ["run", "--store", stores["jpeg"], "--run-dir", tmp_path / "run", "--gpus", "cpu", "--recipe", "short"]
    words += ["--batch", "4", "--epochs", "3", "--log-every", "1", "--quiet", "--service", service.option]
    after_step(1, service.stop)
    assert refusal(*words).startswith("Error: service stopped is lost: ")
    step = checkpoint.load(tmp_path / "run").step
    assert step >= 1
    assert "no such service" in refusal(*words)
    assert f"would resume after step {step}." in alextrain(*words, "--dry-run").stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 7])
def test_a_signal_during_a_run_with_a_service_leaves_a_checkpoint(
    stores: dict[str, Path], lasting_service: Service, tmp_path: Path, after_step: Any, signum: int, step: int
) -> None:
    """Step 1 belongs to the first training stream, and step 7 to the second.

    The run opens the second stream after it has installed its signal handlers.
    """
    after_step(step, lambda: os.kill(os.getpid(), signum))
    config = config_with_two_streams(stores["jpeg"], tmp_path / "run", service=lasting_service.option)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(BaseException) as raised:
        fit(Run.open(config))
    assert raised.typename == ("KeyboardInterrupt" if signum == signal.SIGINT else "Terminated")
    assert checkpoint.load(tmp_path / "run").step == step
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.soak
def test_a_signal_while_a_run_waits_for_a_silent_service_leaves_a_checkpoint_at_once(
    stores: dict[str, Path], service: Service, tmp_path: Path, after_step: Any
) -> None:
    """The coordinator is suspended after step 1. The run counts the service as lost only after 45 s."""
    pid = service.coordinator_pid()
    signalled_s = []

    def send_signal() -> None:
        signalled_s.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(4.0, send_signal)

    def suspend() -> None:
        os.kill(pid, signal.SIGSTOP)
        timer.start()

    after_step(1, suspend)
    changes = {"batch_size": 2, "epochs": 1, "log_every": 100, "checkpoint_every": 100}
    try:
        with pytest.raises(Terminated):
            fit(Run.open(small_config(stores["jpeg"], tmp_path / "run", service=service.option, **changes)))
        assert time.monotonic() - signalled_s[0] < 20
        assert 1 <= checkpoint.load(tmp_path / "run").step < 15
    finally:
        timer.cancel()
        os.kill(pid, signal.SIGCONT)
        service.stop()


@pytest.mark.soak
def test_sigterm_ends_the_command_with_its_exit_code_and_a_checkpoint(
    stores: dict[str, Path], lasting_service: Service, tmp_path: Path
) -> None:
    words = ["run", "--store", stores["jpeg"], "--run-dir", tmp_path / "run", "--gpus", "cpu", "--recipe", "short"]
    words += ["--model", "half", "--batch", "4", "--epochs", "1000", "--log-every", "1"]
    command = [sys.executable, "-m", "train", *map(str, words), "--service", lasting_service.option]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        before = [line := next(process.stderr)]
        while not line.startswith("epoch"):
            before.append(line := next(process.stderr))
        process.send_signal(signal.SIGTERM)
        after = process.stderr.read()
    assert process.returncode == 143, "".join(before) + after
    assert "Stopping after this step, with a checkpoint." in after and "to continue from here" in after
    assert checkpoint.load(tmp_path / "run").step >= 1


def test_evaluate_gives_the_errors_of_the_local_store_and_the_service_decodes_every_image_once(
    stores: dict[str, Path], lasting_service: Service, local_run: Path
) -> None:
    for views in ("1", "10", "dense"):
        words = ["evaluate", local_run, "--store", stores["jpeg"], "--gpus", "cpu", "--views", views]
        (expected,) = json_lines(*words)
        before = lasting_service.images_made()
        (found,) = json_lines(*words, "--service", lasting_service.option)
        assert found == expected and lasting_service.images_made() - before == 12
