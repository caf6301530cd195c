"""Tests of ensembles: even after kills, stops and failures, members equal runs that were trained alone, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.loader import TrainLoader
from tests.helpers.small_training import assert_same_result, metrics_without_clock, small_config
from train.config.run_config import RunConfig
from train.experiments.ensemble import member_configs, train_members
from train.monitor.console_view import ConsoleView, QuietView
from train.monitor.metrics_log import MetricsLog
from train.runs import checkpoint
from train.runs.ensemble_dir import Ensemble
from train.runs.ensemble_status import ensemble_status, ensemble_status_lines
from train.runs.run import Run
from train.trainer.divergence import Diverged
from train.trainer.loop import fit
from train.trainer.training import Training

SEED = 3  # the seed of small_config


def ensemble_config(store: Path, folder: Path) -> RunConfig:
    """Return the settings of an ensemble: six steps in two epochs, with checkpoints after steps 2, 3, 4 and 6."""
    return small_config(store, folder, epochs=2)


def members_of(store: Path, folder: Path, members: int = 2) -> list[Run]:
    return [Run.open(config) for config in member_configs(ensemble_config(store, folder), members)]


def train_ensemble(runs: Sequence[Run], *, one_at_a_time: bool = False, view: ConsoleView | None = None) -> Path:
    folder = runs[0].run_dir.parent
    train_members(folder, Ensemble(len(runs), SEED, SEED), runs, lambda: view or QuietView(), one_at_a_time)
    return folder


@pytest.fixture(scope="module")
def alone(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs, each trained alone with the seed of a member of an ensemble and with the ensemble's stream seed."""
    folder = tmp_path_factory.mktemp("alone")
    config = ensemble_config(stores["ppm"], folder)
    changes = [{"seed": SEED + k, "stream_seed": SEED, "run_dir": folder / str(k)} for k in (1, 2, 3)]
    return [fit(Run.open(replace(config, **change)), QuietView()) for change in changes]


def assert_members_equal(folder: Path, alone: Sequence[Path]) -> None:
    """Assert that members and runs that were trained alone have equal files, parameters and random states."""
    for number, expected in enumerate(alone, start=1):
        run_dir = folder / f"member-{number}"
        assert_same_result(run_dir, expected)
        assert sorted(os.listdir(run_dir)) == sorted(os.listdir(expected))
        state, other = checkpoint.load(run_dir), checkpoint.load(expected)
        assert torch.equal(state.random, other.random)
        for part in ("schedule", "stream", "best", "identity"):
            assert getattr(state, part) == getattr(other, part), part
        assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def test_members_have_the_bits_of_runs_trained_alone_from_a_stream_that_is_read_once(
    stores: dict[str, Path], tmp_path: Path, alone: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, serve = [], TrainLoader._next
    monkeypatch.setattr(TrainLoader, "_next", lambda self: (served.append(self.step), serve(self))[1])
    folder = train_ensemble(members_of(stores["ppm"], tmp_path / "ensemble", 3))
    assert len(served) == 6  # the ensemble took as many batches as a single run
    assert_members_equal(folder, alone)
    parameters = [checkpoint.load(folder / f"member-{k}").parameters["fc8.weight"] for k in (1, 2)]
    assert not torch.equal(*parameters)
    assert json.loads((folder / "ensemble.json").read_text()) == {"members": 3, "seed": SEED, "stream_seed": SEED}


def test_members_trained_one_at_a_time_have_the_same_bits_and_an_ensemble_can_get_another_member(
    stores: dict[str, Path], tmp_path: Path, alone: list[Path]
) -> None:
    runs = members_of(stores["ppm"], tmp_path / "ensemble")
    train_ensemble(runs[:1])
    assert_members_equal(train_ensemble(runs, one_at_a_time=True), alone[:2])


def test_members_that_were_killed_at_different_steps_go_on_to_the_same_bits(
    stores: dict[str, Path], tmp_path: Path, alone: list[Path]
) -> None:
    """At the kill, member 1 has saved step 3, and member 2 has saved step 2. Member 3 is added later."""
    killed, saves = KeyboardInterrupt(), []
    save = Training.save

    def save_until_kill(training: Training, loader: TrainLoader, is_last: bool) -> None:
        if training.step == 3 and training.run.run_dir.name == "member-2":
            raise killed
        saves.append((training.run.run_dir.name, training.step))
        save(training, loader, is_last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "save", save_until_kill)
        with pytest.raises(KeyboardInterrupt):
            train_ensemble(members_of(stores["ppm"], tmp_path / "ensemble", 2))
    assert saves[-1] == ("member-1", 3)
    leftover = tmp_path / "ensemble" / ".ensemble.json.1-ab.tmp"
    leftover.touch()  # a kill just before a rename leaves such a temporary file
    trained, train = [], Training.train

    def train_and_note(training: Training, *batch: torch.Tensor) -> None:
        train(training, *batch)
        trained.append((training.step, training.run.run_dir.name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "train", train_and_note)
        folder = train_ensemble(members_of(stores["ppm"], tmp_path / "ensemble", 3))
    assert [step for step, name in trained if name == "member-1"] == [4, 5, 6]
    assert [step for step, name in trained if name == "member-2"] == [3, 4, 5, 6]
    assert not leftover.exists()
    assert trained == sorted(trained)  # each batch is used once, by all members that need it
    assert_members_equal(folder, alone)


def test_a_signal_stops_all_members_after_the_same_step_and_they_resume_to_the_same_bits(
    stores: dict[str, Path], tmp_path: Path, alone: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_line = MetricsLog.train

    def send_signal_after_two(self: MetricsLog, line: dict[str, Any]) -> None:
        log_line(self, line)
        if line["step"] == 2 and self.path.parent.name == "member-1":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsLog, "train", send_signal_after_two)
    with pytest.raises(KeyboardInterrupt):
        train_ensemble(members_of(stores["ppm"], tmp_path / "ensemble"))
    monkeypatch.undo()
    status = ensemble_status(tmp_path / "ensemble", Ensemble(3, SEED, SEED))
    assert [member["state"] for member in status["members"]] == ["stopped", "stopped", "new"]
    steps = [member["step"] for member in status["members"][:2]]
    assert steps[0] == steps[1] and 2 <= steps[0] <= 3 and status["state"] == "stopped" and not status["finished"]
    lines = ensemble_status_lines(status)
    assert lines[0].endswith("ensemble of 3 networks: 2 stopped, 1 not trained yet")
    assert lines[1] == "alexnet, recipe short, seeds 4 to 6, stream seed 3"
    assert lines[2].startswith(f"member-1: stopped (by Ctrl-C), step {steps[0]} of 6, loss ")
    folder = train_ensemble(members_of(stores["ppm"], tmp_path / "ensemble"))
    assert_members_equal(folder, alone[:2])
    assert ensemble_status(folder, Ensemble(2, SEED, SEED))["state"] == "finished"


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_the_other_members_go_on_if_a_member_diverges(
    stores: dict[str, Path], tmp_path: Path, alone: list[Path], monkeypatch: pytest.MonkeyPatch, one_at_a_time: bool
) -> None:
    train = Training.train

    def train_with_fault(training: Training, images: torch.Tensor, labels: torch.Tensor) -> None:
        if training.run.config.seed == SEED + 1 and training.step == 4:
            images = torch.full_like(images, torch.nan)
        train(training, images, labels)

    monkeypatch.setattr(Training, "train", train_with_fault)
    expected = r"^member-1 diverged; members that did not diverge have been trained\. .*member-1: step 5"
    with pytest.raises(Diverged, match=expected):
        train_ensemble(members_of(stores["ppm"], tmp_path / "ensemble"), one_at_a_time=one_at_a_time)
    folder = tmp_path / "ensemble"
    assert_same_result(folder / "member-2", alone[1])
    assert checkpoint.load(folder / "member-1").step == 4
    assert json.loads((folder / "member-1/status.json").read_text())["state"] == "failed"


class RecordingView(ConsoleView):
    """A view that keeps the lines that it would print."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []
        self.ended = False

    def train(self, line: Any) -> None:
        self.lines.append(line)

    validation = train

    def end(self) -> None:
        assert not self.ended
        self.ended = True


def test_the_view_of_an_ensemble_shows_the_mean_and_the_value_of_each_member(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    view = RecordingView()
    folder = train_ensemble(members_of(stores["ppm"], tmp_path / "ensemble"), view=view)
    assert view.ended
    logs = [metrics_without_clock(folder / name) for name in ("member-1", "member-2")]
    assert len(view.lines) == len(logs[0]) == 8  # six steps and two validations
    for shown, *lines in zip(view.lines, *logs, strict=True):
        assert (shown["step"], shown["kind"]) == (lines[0]["step"], lines[0]["kind"])
        for key in ("loss", "top1_error", "top5_error"):
            assert shown[key] == pytest.approx((lines[0][key] + lines[1][key]) / 2, rel=1e-12)
        name, key = ("member_losses", "loss") if shown["kind"] == "train" else ("member_top1_errors", "top1_error")
        assert shown[name] == {"member-1": lines[0][key], "member-2": lines[1][key]}
