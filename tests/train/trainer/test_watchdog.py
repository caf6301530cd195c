"""What stops a run or warns of it, each caused: poisoned pictures, losses that say nothing, memory that ends."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train.trainer.offending_batch
from pipeline.loader import TrainLoader, train_loader
from prep.console import UserError
from tests.train.trainer.test_loop import SMALL, config
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.loop import fit
from train.trainer.step import StepResult, TrainingStep
from train.trainer.watchdog import Diverged, Watchdog, parameter_norms


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_poisoned_picture_is_found_kept_aside_and_costs_no_checkpoint(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """One of the second batch, of the store whose labels are numbers; whenever the line is due."""
    serve = TrainLoader.__iter__
    with train_loader(numbered, 8, "cpu", 3) as loader:
        bad = [labels.tolist() for _, labels in loader][1][3]
    served: list[list[int]] = []

    def poisoned(self: TrainLoader) -> Any:
        for images, labels in serve(self):
            images[labels == bad] = math.nan
            served.append(labels.tolist())
            yield images, labels

    monkeypatch.setattr(TrainLoader, "__iter__", poisoned)
    every = 1 if log_every == 1 else 4
    plan = config(numbered, tmp_path / "run", log_every=log_every, checkpoint_every=every, epochs=5)
    with pytest.raises(Diverged) as stop:
        fit(Run.open(plan))
    at = 2
    assert f"step {at}: the loss is nan" in str(stop.value)
    about = json.loads((tmp_path / "run" / f"offending-step-{at}" / "batch.json").read_text())
    assert [record["label"] for record in about["records"]] == served[at - 1]
    assert all(f"{record['label']:03d}.jpg" in record["record"] for record in about["records"])
    assert all(" key " in record["record"] for record in about["records"])
    assert [record["label"] for record in about["records"] if record["no_numbers"]] == [bad]
    assert about["steps"][0] <= at <= about["steps"][1] and math.isnan(about["losses"][at - about["steps"][0]])
    assert {"parameter", "gradient"} == set(about["norms"]["conv1.weight"])
    sheet = np.asarray(Image.open(tmp_path / "run" / f"offending-step-{at}" / "pictures.png"))
    assert sheet.shape == (112, 8 * 112, 3)
    place = served[at - 1].index(bad)
    white = [(sheet[:, 112 * k : 112 * (k + 1)] == 255).all() for k in range(8)]
    assert white == [k == place for k in range(8)]
    state = checkpoint.load_latest(tmp_path / "run")
    assert state is None or state.step < at
    assert state is None or all(torch.isfinite(t).all() for t in state.parameters.values())


def test_norms_are_those_of_numpy() -> None:
    torch.manual_seed(0)
    model = AlexNet(5, SHORT, ("cpu", "cpu"), SMALL)
    optimizer = make_optimizer(model, SHORT)
    TrainingStep(model, optimizer)(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    norms = parameter_norms(model)
    gradients = model.joined_tensors(lambda p: p.grad)
    for name, tensor in model.joined_tensors().items():
        assert norms[name]["parameter"] == pytest.approx(np.linalg.norm(tensor.double().numpy().ravel()), rel=1e-5)
        wanted = np.linalg.norm(gradients[name].double().numpy().ravel())
        assert norms[name]["gradient"] == pytest.approx(wanted, rel=1e-5)
    model.fc8.bias.requires_grad_(False).grad = None
    assert set(parameter_norms(model)["fc8.bias"]) == {"parameter"}


@pytest.mark.parametrize("part", ["parameter", "gradient"])
def test_a_parameter_or_gradient_that_is_no_number_stops_though_the_loss_is_one(
    numbered: Path, tmp_path: Path, part: str
) -> None:
    model = AlexNet(37, SHORT, ("cpu", "cpu"), SMALL)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    broken = model.columns[1].conv3.weight
    with torch.no_grad():
        (broken if part == "parameter" else broken.grad)[0, 0, 0, 0] = math.inf
    (tmp_path / "run").mkdir()
    watch = Watchdog(Run.open(config(numbered, tmp_path / "run")), model)
    watch.add(*stepped(1.0))
    whose = "the gradient of " if part == "gradient" else ""
    with pytest.raises(Diverged, match=rf"step 4: {whose}conv3\.weight has norm inf: .*offending-step-4"):
        watch.check(4, SHORT.augmentation)


def stepped(loss: float, labels: range | list[int] = range(8)) -> StepResult:
    return StepResult(torch.tensor(loss), torch.zeros(len(labels), 37), torch.tensor(list(labels)))


@pytest.fixture
def watch(numbered: Path, tmp_path: Path) -> Watchdog:
    """Of a run of 400 steps on 37 classes: 200 of them at ln 37 are stuck."""
    model = AlexNet(37, SHORT, ("cpu", "cpu"), SMALL)
    return Watchdog(Run.open(RunConfig(numbered, SHORT, 8, epochs=100, run_dir=tmp_path)), model)


def judged(watch: Watchdog, losses: list[float], first: int = 0) -> None:
    """Ten steps a line."""
    for place, loss in enumerate(losses):
        for _ in range(10):
            watch.add(*stepped(loss))
        watch.check(first + 10 * (place + 1), SHORT.augmentation)


def test_a_loss_that_stays_a_guess_is_said_once(watch: Watchdog, capsys: pytest.CaptureFixture[str]) -> None:
    guess = math.log(37)
    judged(watch, [guess * 1.009, guess * 0.991] * 9 + [guess])
    assert "Warning" not in capsys.readouterr().err
    judged(watch, [guess] * 30, 190)
    said = capsys.readouterr().err
    assert said.count("Warning") == 1 and "step 200: the loss has been within 1% of ln 37 = 3.611" in said
    assert "for 200 steps. Usually: a learning rate" in said


def test_a_loss_that_left_its_guess_is_not_stuck(watch: Watchdog, capsys: pytest.CaptureFixture[str]) -> None:
    guess = math.log(37)
    judged(watch, ([guess] * 19 + [guess * 0.98]) * 3)
    assert "Warning" not in capsys.readouterr().err


def test_a_loss_of_zero_and_labels_of_one_class_are_said_once(
    watch: Watchdog, capsys: pytest.CaptureFixture[str]
) -> None:
    judged(watch, [0.0] * 3)
    said = capsys.readouterr().err
    assert said.count("Warning") == 1 and "step 10: the loss is 0. Usually: a store with one class" in said
    for _ in range(2):
        for _ in range(4):
            watch.add(*stepped(1.0, [5] * 8))
        watch.check(34, SHORT.augmentation)
    said = capsys.readouterr().err
    assert said.count("Warning") == 1 and "all 32 labels since step 30 are 5." in said


def test_few_labels_of_one_class_are_chance_and_one_other_is_enough(
    watch: Watchdog, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in ([4] + [5] * 7, [5] * 7 + [6]):
        for labels in ([5] * 8, [5] * 8, other, [5] * 8):
            watch.add(*stepped(1.0, labels))
        watch.check(4, SHORT.augmentation)
    for _ in range(3):
        watch.add(*stepped(1.0, [5] * 8))
    watch.check(3, SHORT.augmentation)
    assert "Warning" not in capsys.readouterr().err


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def raise_untyped(words: str) -> None:
    raise RuntimeError(words)


RUN_OUT = {
    "CPU": lambda: torch.empty(1 << 48),
    "GPU": raise_out_of_memory,
    "driver": lambda: raise_untyped("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "cuBLAS": lambda: raise_untyped("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("run_out", RUN_OUT.values(), ids=RUN_OUT)
@pytest.mark.parametrize(("parts", "named"), [(1, "--accumulate 2"), (2, "--accumulate 4"), (8, "Give --batch 4")])
def test_a_lack_of_memory_is_said_with_what_fits(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_out: Any, parts: int, named: str
) -> None:
    """The CPU's by its allocator itself."""
    monkeypatch.setattr("train.trainer.loop.TrainingStep.__call__", lambda *of: run_out())
    with pytest.raises(UserError) as told:
        fit(Run.open(config(stores["ppm"], tmp_path / "run", accumulate=parts)))
    said = str(told.value)
    assert "out of memory on cpu (" in said and named in said and "--batch 4" in said and "\n" not in said
    assert "--fork" not in said


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*of: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("train.trainer.loop.TrainingStep.__call__", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        fit(Run.open(config(stores["ppm"], tmp_path / "run")))


def test_a_batch_that_cannot_be_written_aside_hides_nothing(
    numbered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*of: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.trainer.offending_batch, "save_image_grid", full)
    recipe = replace(SHORT, schedule=(), lr=1e12)
    with pytest.raises(Diverged, match=r"training has diverged.*could not be written \(.*No space"):
        fit(Run.open(config(numbered, tmp_path / "run", recipe=recipe)))
