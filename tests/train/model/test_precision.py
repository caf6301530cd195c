"""Tests of precision: bfloat16 compared with float32 on a CPU, the TF32 switches, the precision in a run's identity."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.loader import eval_loader
from prep.console import Progress, UserError
from tests.helpers.small_training import SMALL_ALEXNET, small_config
from train import cli
from train.config.recipe import Recipe
from train.config.recipes import PAPER, RELEASED, SHORT
from train.evaluation.evaluate import evaluate
from train.model.alexnet import AlexNet
from train.model.lrn import local_response_norm, within_map_norm
from train.model.precision import autocast, set_precision
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.runs.run import Run
from train.trainer.loop import fit
from train.trainer.step import TrainingStep

BF16_STEP = 2.0**-8  # the largest relative error that rounding to bfloat16 causes


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Restore torch's global precision switches after a test. Use one thread, because the tensors are small."""
    matmul, conv, threads = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.get_num_threads()
    before = matmul.fp32_precision, conv.fp32_precision
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    matmul.fp32_precision, conv.fp32_precision = before


def small(recipe: Recipe = SHORT) -> AlexNet:
    torch.manual_seed(0)
    return AlexNet(5, replace(recipe, init="he", input_divisor=64.0), ("cpu", "cpu"), SMALL_ALEXNET)


def random_images(n: int = 6) -> torch.Tensor:
    return 60 * torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("recipe", [PAPER, RELEASED], ids=lambda recipe: recipe.name)
def test_logits_in_bfloat16_are_near_those_in_float32_but_not_equal(recipe: Recipe) -> None:
    model, images = small(recipe).eval(), random_images()
    with torch.no_grad():
        exact = model(images)
        with autocast("bf16", model.devices[0]):
            rounded = model(images)
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    error = float((rounded.float() - exact).norm() / exact.norm())
    assert BF16_STEP / 16 < error < 8 * BF16_STEP  # each of the eight layers rounds its output


def test_a_step_in_bfloat16_keeps_parameters_gradients_velocities_and_loss_in_float32() -> None:
    model = small()
    optimizer = make_optimizer(model, SHORT)
    Schedule(SHORT).apply(optimizer, 0)
    stepped = TrainingStep(model, optimizer, "bf16")(random_images(), torch.arange(6) % 5)
    assert stepped.loss.dtype == stepped.logits.dtype == torch.float32
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == optimizer.velocity(parameter).dtype == torch.float32
    assert torch.equal(stepped.logits, stepped.logits.bfloat16().float())  # the logits were cast from bfloat16


def test_the_loss_in_bfloat16_is_the_float32_loss_of_its_logits() -> None:
    model = small()
    labels = torch.arange(6) % 5
    stepped = TrainingStep(model, make_optimizer(model, SHORT), "bf16")(random_images(), labels)
    logits = stepped.logits.double().numpy()
    by_hand = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), labels]
    assert float(stepped.loss) == pytest.approx(by_hand.mean(), rel=1e-6)


@pytest.mark.parametrize("norm", [local_response_norm, within_map_norm])
def test_normalization_of_bfloat16_sums_in_float32(norm) -> None:
    """Only the result is rounded to bfloat16, so there is one rounding error. Rounded squares would add more errors."""
    x = torch.randn(2, 48, 9, 9, generator=torch.Generator().manual_seed(2)).mul_(50).bfloat16()
    expected = norm(x.double(), 5, 1e-2, 0.75, 2.0)
    with autocast("bf16", torch.device("cpu")):
        actual = norm(x, 5, 1e-2, 0.75, 2.0)
    assert ((actual.double() - expected).abs() <= 1.01 * BF16_STEP * expected.abs()).all()


@pytest.mark.parametrize("norm", [local_response_norm, within_map_norm])
def test_gradient_of_normalization_of_bfloat16_is_rounded_once(norm) -> None:
    x = torch.randn(2, 48, 9, 9, generator=torch.Generator().manual_seed(3)).mul_(50).bfloat16().requires_grad_()
    upstream = torch.randn(2, 48, 9, 9, generator=torch.Generator().manual_seed(4)).bfloat16()
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(norm(exact, 5, 1e-2, 0.75, 2.0), exact, upstream.double())
    with autocast("bf16", torch.device("cpu")):
        y = norm(x, 5, 1e-2, 0.75, 2.0)
    (actual,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    assert float((actual.double() - expected).norm() / expected.norm()) < BF16_STEP / 2


def test_a_small_network_learns_in_bfloat16() -> None:
    """The network memorizes three images. At every step, the loss in bfloat16 is close to the loss in float32."""
    images, labels, lines = random_images(3), torch.arange(3), []
    for precision in ("fp32", "bf16"):
        model = small(replace(SHORT, dropout=0.0, lr=0.02))
        optimizer = make_optimizer(model, model.recipe)
        Schedule(model.recipe).apply(optimizer, 0)
        step = TrainingStep(model, optimizer, precision)
        lines.append([float(step(images, labels).loss) for _ in range(6)])
        assert lines[-1][-1] < 0.75 * lines[-1][0], lines
    assert lines[1] == pytest.approx(lines[0], rel=0.02) and lines[1] != lines[0]


def test_run_json_has_the_precision(stores: dict[str, Path], tmp_path: Path) -> None:
    run_dir = fit(Run.open(small_config(stores["jpeg"], tmp_path / "run", steps=1, batch_size=2, precision="bf16")))
    description = json.loads((run_dir / "run.json").read_text())
    assert description["settings"]["precision"] == description["identity"]["precision"] == "bf16"


def test_a_run_is_not_continued_in_another_precision(stores: dict[str, Path], tmp_path: Path) -> None:
    run_config = small_config(stores["jpeg"], tmp_path / "run", steps=1)
    fit(Run.open(run_config))
    with pytest.raises(UserError, match=r"another precision \(fp32, here bf16\)"):
        fit(Run.open(replace(run_config, precision="bf16", steps=2)))


def test_evaluation_in_bfloat16_is_near_that_in_float32(stores: dict[str, Path]) -> None:
    model = small()
    model.fc8.weight.data.mul_(20)
    with eval_loader(stores["jpeg"], 6) as loader:
        results = [
            evaluate(model, loader, Progress(loader.records, "images"), precision) for precision in ("fp32", "bf16")
        ]
    assert results[0].loss != results[1].loss
    assert results[1].loss == pytest.approx(results[0].loss, rel=0.05)


def test_tf32_is_switched_for_matrix_products_and_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    for precision, mode in [("tf32", "tf32"), ("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")]:
        set_precision(precision, ("cuda:0", "cuda:1"))
        assert matmul.fp32_precision == conv.fp32_precision == mode, precision


def test_tf32_in_an_older_torch_is_switched_by_its_older_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    matmul, cudnn = SimpleNamespace(allow_tf32=False), SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    for precision, allowed in [("fp32", False), ("tf32", True), ("fp32", False)]:
        set_precision(precision, ("cuda:0",))
        assert vars(matmul) == vars(cudnn) == {"allow_tf32": allowed}
    monkeypatch.undo()


def test_a_precision_that_a_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="tf32: the device is cpu"):
        set_precision("tf32", ("cpu", "cpu"))
    with pytest.raises(UserError, match="fp16: expected one of fp32, tf32, bf16"):
        set_precision("fp16", ("cpu",))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla V100")
    with pytest.raises(UserError, match=r"Tesla V100 has compute capability 7\.0; bfloat16 needs 8\.0"):
        set_precision("bf16", ("cuda:0", "cuda:1"))


@pytest.mark.parametrize("command", [["run"], ["evaluate", "run"]], ids=lambda words: words[0])
def test_the_commands_refuse_tf32_on_a_cpu_before_they_begin(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*command, "--store", str(stores["jpeg"]), "--gpus", "cpu", "--precision", "tf32"]
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 2 and "only GPUs have TF32" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_precision_of_a_command_reaches_the_run(stores: dict[str, Path], tmp_path: Path) -> None:
    words = ["run", "--store", str(stores["jpeg"]), "--gpus", "cpu", "--batch", "8", "--dry-run", "--json"]
    result = CliRunner().invoke(cli.main, [*words, "--run-dir", str(tmp_path / "run"), "--precision", "bf16"])
    assert result.exit_code == 0 and json.loads(result.stdout)["precision"] == "bf16" and "bf16;" in result.stderr
