"""Training: it learns, it goes on to the bit after a signal, and it refuses to go on with something else.

A small network on the CPU. Kills, checkpoints and forks are tests/train/runs/test_survival.py's.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import termios
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.loader import EvalLoader, TrainLoader, train_loader
from prep.console import Terminated, UserError, say
from train.config.architecture import ALEXNET, HALF, Widths
from train.config.recipe import Cosine, Plateau, ScheduleChange
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.evaluation.evaluate import EvalResult
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.runs import checkpoint
from train.runs.loading import load_trained
from train.runs.preprocessing import save_mean_image
from train.runs.run import Run
from train.runs.run_dir import CLOCK_DEPENDENT
from train.trainer.loop import fit
from train.trainer.state import restore_state
from train.trainer.stop_requests import stop_requests

SMALL = replace(ALEXNET, widths=Widths(8, 8, 8, 8, 8, 16, 16))


def config(store: Path, run_dir: Path, **changes) -> RunConfig:
    """9 steps of 8 images: 3 epochs of 3 steps on the 30 training pictures of the test store."""
    plan = RunConfig(
        store=store,
        recipe=replace(SHORT, dropout=0.5, schedule=(ScheduleChange(1.5, lr=0.002),)),
        batch_size=8,
        seed=3,
        model=SMALL,
        run_dir=run_dir,
        epochs=3,
        log_every=1,
        checkpoint_every=2,
        threads=2,
    )
    return replace(plan, **changes)


def metrics(run_dir: Path) -> list[dict]:
    """The lines without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK_DEPENDENT} for line in lines]


@pytest.fixture(scope="module")
def whole_run(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(Run.open(config(stores["jpeg"], tmp_path_factory.mktemp("whole") / "run")))


def same_result(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    one, two = (checkpoint.load_latest(run_dir) for run_dir in (a, b))
    assert one.step == two.step
    for part in ("parameters", "velocity"):
        for name, tensor in getattr(one, part).items():
            assert torch.equal(tensor, getattr(two, part)[name]), name


def test_metrics_have_every_step_once(whole_run: Path) -> None:
    lines = metrics(whole_run)
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    validations = [line for line in lines if line["kind"] == "val"]
    assert [line["epoch"] for line in validations] == [1, 2, 3] and len({line["images"] for line in validations}) == 1
    assert lines[0]["lr"] == SHORT.lr
    assert steps[-1] % 3 == 0 and lines[-2]["lr"] == 0.002


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_that_step(
    stores: dict[str, Path], whole_run: Path, tmp_path: Path, signum: int, monkeypatch: pytest.MonkeyPatch
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
        fit(Run.open(config(stores["jpeg"], run_dir)))
    assert stop.typename == ("KeyboardInterrupt" if signum == signal.SIGINT else "Terminated")
    assert checkpoint.load_latest(run_dir).step == 6  # the step that was under way
    monkeypatch.undo()
    fit(Run.open(config(stores["jpeg"], run_dir)))
    same_result(run_dir, whole_run)


def test_steps_end_a_run_and_more_steps_continue_it(stores: dict[str, Path], whole_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(Run.open(config(stores["jpeg"], run_dir, steps=5)))
    assert checkpoint.load_latest(run_dir).step == 5
    fit(Run.open(config(stores["jpeg"], run_dir)))
    same_result(run_dir, whole_run)


def test_the_colour_noise_can_end_during_a_run(stores: dict[str, Path], tmp_path: Path) -> None:
    plan = config(stores["jpeg"], tmp_path / "a", recipe=replace(SHORT, schedule=(ScheduleChange(1, colour="off"),)))
    fit(Run.open(plan))
    fit(Run.open(replace(plan, run_dir=tmp_path / "b", steps=6)))
    fit(Run.open(replace(plan, run_dir=tmp_path / "b")))
    same_result(tmp_path / "a", tmp_path / "b")
    assert checkpoint.load_latest(tmp_path / "a").stream["augmentation"]["colour"] == "off"


def test_a_small_network_learns_its_pictures_by_heart(stores: dict[str, Path], tmp_path: Path) -> None:
    recipe = replace(SHORT, schedule=(), dropout=0.0, lr=0.003)
    run_dir = fit(
        Run.open(
            config(
                stores["jpeg"], tmp_path / "run", recipe=recipe, epochs=30, log_every=4, checkpoint_every=1000, seed=0
            )
        )
    )
    lines = [line for line in metrics(run_dir) if line["kind"] == "train"]
    last = lines[-5:]
    assert lines[0]["loss"] > 0.9
    assert sum(line["loss"] for line in last) / len(last) < 0.5
    assert sum(line["top1_error"] for line in last) / len(last) < 0.25


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 4}, "batch size"),
        ({"seed": 4}, "seed"),
        ({"model": HALF}, r"model \(alexnet, here half\): columns is 2, here 1"),
        ({"model": replace(SMALL, widths=replace(SMALL.widths, fc7=18))}, "model: widths.fc7 is 16, here 18"),
        ({"recipe": replace(SHORT, lr=0.5)}, "recipe: dropout is 0.5, here 0.0"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    stores: dict[str, Path], whole_run: Path, change: dict, named: str
) -> None:
    with pytest.raises(UserError, match=f"another {named}"):
        fit(Run.open(config(stores["jpeg"], whole_run, **change)))


def test_another_store_is_refused(stores: dict[str, Path], whole_run: Path) -> None:
    with pytest.raises(UserError, match="was trained with another store fingerprint"):
        fit(Run.open(config(stores["ppm"], whole_run)))


@pytest.mark.parametrize("name", ["letter.txt", "metrics.jsonl"])
def test_a_folder_of_something_else_is_refused(stores: dict[str, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("dear")
    with pytest.raises(UserError, match="something else than a run"):
        fit(Run.open(config(stores["jpeg"], tmp_path)))
    assert (tmp_path / name).read_text() == "dear"


def test_a_torn_checkpoint_is_passed_over(stores: dict[str, Path], whole_run: Path, tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    fit(Run.open(config(stores["jpeg"], run_dir)))
    before, newest = checkpoint.checkpoint_paths(run_dir)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    _, state = load_trained_small(run_dir)
    assert f"{state.step:08d}" in before.name and "torn" in capsys.readouterr().err
    fit(Run.open(config(stores["jpeg"], run_dir)))
    same_result(run_dir, whole_run)


def load_trained_small(run_dir: Path):
    return load_trained(run_dir, ("cpu", "cpu"))


def test_a_checkpoint_executes_nothing(tmp_path: Path) -> None:
    """A pickle that would run a command is refused by weights_only, and counts as one that cannot be read."""
    import pickle

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    (tmp_path / "checkpoint-00000001.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="none of its 1 checkpoints"):
        checkpoint.load_latest(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_loss_that_is_no_number_stops_the_run(stores: dict[str, Path], tmp_path: Path) -> None:
    plan = config(stores["jpeg"], tmp_path / "run", recipe=replace(SHORT, schedule=(), lr=1e12))
    with pytest.raises(UserError, match="diverged"):
        fit(Run.open(plan))
    state = checkpoint.load_latest(tmp_path / "run")
    assert state is None or all(torch.isfinite(t).all() for t in state.parameters.values())


def test_a_signal_during_validation_ends_the_run_at_once_and_loses_nothing(
    stores: dict[str, Path], whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.trainer.loop

    validate = train.trainer.loop.evaluate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    run_dir = tmp_path / "run"
    monkeypatch.setattr(train.trainer.loop, "evaluate", signalled)
    with pytest.raises(BaseException) as stop:
        fit(Run.open(config(stores["jpeg"], run_dir)))
    assert stop.typename == "Terminated"
    assert checkpoint.load_latest(run_dir).step == 3 and not any(m["kind"] == "val" for m in metrics(run_dir))
    monkeypatch.undo()
    fit(Run.open(config(stores["jpeg"], run_dir)))
    same_result(run_dir, whole_run)


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


def test_a_plateau_drops_the_rate_ends_the_run_and_survives_a_stop(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors that never fall: a drop after the second validation, the end after the third."""
    monkeypatch.setattr("train.trainer.loop.evaluate", lambda *of: EvalResult(0.5, 0.25, 2.0, 12))
    recipe = replace(SHORT, schedule=Plateau(factor=0.5, patience_epochs=1, drops=1))
    plan = config(stores["ppm"], tmp_path / "a", recipe=recipe, epochs=5)
    fit(Run.open(plan))
    lines = metrics(plan.run_dir)
    assert [line["epoch"] for line in lines if line["kind"] == "val"] == [1, 2, 3]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates == [SHORT.lr] * 6 + [SHORT.lr / 2] * 3
    for steps in (7, None, None):
        fit(Run.open(replace(plan, run_dir=tmp_path / "b", steps=steps)))
    same_result(plan.run_dir, tmp_path / "b")


def test_on_other_devices_the_generators_begin_anew(whole_run: Path, stores: dict[str, Path]) -> None:
    state, plan = checkpoint.load(whole_run), config(stores["jpeg"], whole_run)
    model = AlexNet(3, plan.recipe, ("cpu", "cpu"), SMALL)
    for devices, seed in ((["cuda:0", "cuda:1"], plan.seed + 9), (["cpu", "cpu"], None)):
        restore_state(
            replace(state, devices=devices), plan, model, make_optimizer(model, plan.recipe), Schedule(plan.recipe)
        )
        assert torch.equal(torch.get_rng_state(), state.random) == (seed is None)
        assert seed is None or torch.initial_seed() == seed


def test_a_run_is_as_long_as_the_shorter_of_epochs_and_steps(stores: dict[str, Path], tmp_path: Path) -> None:
    runs = [Run.open(config(stores["ppm"], tmp_path, steps=steps)) for steps in (None, 5, 100)]
    assert [(run.steps_per_epoch, run.last_step) for run in runs] == [(3, 9), (3, 5), (3, 9)]


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


def test_torn_checkpoints_do_not_push_out_good_ones(stores: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(Run.open(config(stores["jpeg"], run_dir, steps=2)))
    for step in (5, 6):
        (run_dir / f"checkpoint-{step:08d}.pt").write_bytes(b"torn")
    fit(Run.open(config(stores["jpeg"], run_dir, steps=4)))
    assert checkpoint.load_latest(run_dir).step == 4
    assert [path.name[-5:] for path in checkpoint.checkpoint_paths(run_dir)] == ["03.pt", "04.pt"]


def test_two_trainings_in_one_folder_are_refused(stores: dict[str, Path], whole_run: Path) -> None:
    from prep.files import hold_lock

    with hold_lock(whole_run, "training"), pytest.raises(UserError, match="another training is at work"):
        fit(Run.open(config(stores["jpeg"], whole_run)))


def test_settings_of_a_run_that_never_reached_a_checkpoint_bind_nobody(stores: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".run.json.77.tmp").write_text("{")  # of one that was killed as it began
    with pytest.raises(UserError, match="a batch takes 64"):
        fit(Run.open(config(stores["jpeg"], run_dir, batch_size=64)))
    fit(Run.open(config(stores["jpeg"], run_dir, steps=1)))
    assert json.loads((run_dir / "run.json").read_text())["settings"]["batch_size"] == 8


def test_a_mean_image_is_that_of_the_store_though_the_folder_was_begun_with_another(tmp_path: Path) -> None:
    recipe = replace(SHORT, augmentation=replace(SHORT.augmentation, mean="image"))
    for value in (1.0, 2.0):
        save_mean_image(tmp_path, SimpleNamespace(mean_image=lambda: np.full((3, 4, 4), value)), recipe)  # noqa: B023
        assert (np.load(tmp_path / "mean_image.npy") == value).all()


def test_a_trained_network_is_loaded_by_the_recipe_that_it_was_trained_with(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    recipe = replace(SHORT, name="mine", input_divisor=3.0, schedule=())
    run_dir = fit(Run.open(config(stores["jpeg"], tmp_path / "run", recipe=recipe, steps=1)))
    model, state = load_trained(run_dir, ("cpu", "cpu"))
    assert model.recipe == recipe and len(state.classes) == 3


def test_another_network_with_changed_numbers_trains_goes_on_and_is_loaded_as_it_was(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """One column, no overlap, tanh: run.json tells of it, the folder holds to it, two parts make the same whole."""
    from train.config.overrides import OVERRIDE_SOURCE, apply_overrides

    half = replace(HALF, widths=Widths(6, 7, 8, 8, 8, 16, 16))
    recipe = apply_overrides(replace(SHORT, schedule=()), ["activation=tanh", "pool_px=2", "dropout=0.5"])
    plan = config(stores["jpeg"], tmp_path / "a", recipe=recipe, model=half, epochs=2)
    fit(Run.open(plan))
    fit(Run.open(replace(plan, run_dir=tmp_path / "b", steps=4)))
    with pytest.raises(UserError, match="another recipe"):
        fit(Run.open(replace(plan, run_dir=tmp_path / "b", recipe=apply_overrides(recipe, ["pool_px=3"]))))
    fit(Run.open(replace(plan, run_dir=tmp_path / "b")))
    same_result(tmp_path / "a", tmp_path / "b")
    model, _ = load_trained(tmp_path / "a", ("cpu", "cpu"))
    assert model.architecture == half and model.recipe == recipe and len(model.columns) == 1
    described = json.loads((tmp_path / "a" / "run.json").read_text())
    assert described["identity"]["model"] == "half" and described["recipe"]["sources"]["pool_px"] == OVERRIDE_SOURCE
    assert described["recipe"]["name"] == "short, activation=tanh, dropout=0.5, pool_px=2"


def test_labels_are_smoothed_as_the_recipe_says_under_a_cosine_with_warm_up(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """The first loss by the formula of Szegedy et al. 2016: (1 - e) times that of the label, e times that of all."""
    recipe = replace(SHORT, dropout=0.0, label_smoothing=0.3, epochs=2, schedule=Cosine(1, 0.1, 0.01))
    plan = config(stores["jpeg"], tmp_path / "run", recipe=recipe, epochs=2)
    fit(Run.open(plan))
    lines = [line for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    rates = [line["lr"] / SHORT.lr for line in lines]
    assert rates == pytest.approx([0.1, 0.4, 0.7, 1.0, 0.7525, 0.2575])
    torch.manualseed_generators(plan.seed)
    model = AlexNet(3, recipe, ("cpu", "cpu"), SMALL)
    with train_loader(stores["jpeg"], 8, "cpu", plan.seed, augmentation=recipe.augmentation) as loader:
        images, labels = next(iter(loader))
    p = torch.log_softmax(model(images).double(), 1).detach()
    wanted = -0.7 * p[torch.arange(8), labels].mean() - 0.3 * p.mean()
    assert lines[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_columns_on_two_gpus_are_seeded_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both columns would otherwise drop the same units: torch.manual_seed gives every GPU the same seed."""
    from contextlib import nullcontext

    from train.trainer.state import seed_generators

    seeds, where = [], []
    monkeypatch.setattr("torch.manual_seed", seeds.append)
    monkeypatch.setattr("torch.cuda.manual_seed", seeds.append)
    monkeypatch.setattr("torch.cuda.device", lambda device: where.append(device) or nullcontext())
    seed_generators(config(tmp_path, tmp_path, devices=("cuda:0", "cuda:1")), 0)
    assert len(set(seeds)) == 2 and where == ["cuda:1"]
    seed_generators(config(tmp_path, tmp_path, devices=("cuda:0", "cuda:0")), 0)
    assert len(seeds) == 3


@pytest.mark.parametrize("ends", ["well", "diverged"])
def test_the_streams_of_a_run_are_closed(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Though someone keeps them, as a traceback does: both, that of training and that of validation."""
    kept: list[TrainLoader | EvalLoader] = []
    for kind in (TrainLoader, EvalLoader):
        begin = kind._start
        monkeypatch.setattr(kind, "_start", lambda self, jobs, begin=begin: (kept.append(self), begin(self, jobs)))
    recipe = replace(SHORT, schedule=(), lr=0.001 if ends == "well" else 1e12)
    plan = config(stores["jpeg"], tmp_path / "run", recipe=recipe, epochs=2)
    if ends == "well":
        fit(Run.open(plan))
        assert {type(loader) for loader in kept} == {TrainLoader, EvalLoader}
    else:
        with pytest.raises(UserError, match="diverged"):
            fit(Run.open(plan))
    for loader in list(kept):
        with pytest.raises(ValueError, match="closed"):
            next(iter(loader))
