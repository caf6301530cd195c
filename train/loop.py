"""The training loop, on one page."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.loader import EvalLoader, TrainLoader, eval_loader, train_loader
from prep.console import Terminated, UserError, progress, say
from prep.manifest import Store
from train import checkpoint
from train.devices import keep_freed_memory
from train.evaluate import EvalResult, batch_of, evaluate, wrong
from train.model import AlexNet
from train.optim import PaperSGD, Schedule, make_optimiser
from train.run import RunConfig, begin, check_identity, identity


def fit(config: RunConfig) -> Path:
    """Train, or go on training; returns the run folder.

    Raises UserError as the loaders do, for a run folder of another run, and when the loss is no longer a number; after
    Ctrl-C or SIGTERM finishes the step, writes a checkpoint and raises KeyboardInterrupt or Terminated.
    """
    # ---- store, model, optimiser
    store = Store.open(config.store)
    begin(config, store)
    if config.devices[0] == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    model = AlexNet(len(store.classes), config.recipe, config.devices, config.widths)
    optimiser, schedule = make_optimiser(model, config.recipe), Schedule(config.recipe)
    steps_per_epoch = store.split("train").records // config.batch_size
    last_step = min(config.epochs * steps_per_epoch, config.steps if config.steps is not None else math.inf)

    # ---- resume. What holds, in this order: 1. the newest checkpoint of the run folder that can be read, if it is of
    # ---- the same run; 2. the seed. The stream is the one of the epoch, continued where the checkpoint left it.
    step = 0
    state = checkpoint.load_latest(config.run_dir)
    if state is not None:
        check_identity(state, identity(config, store), config.run_dir)
        step = _restore(state, model, optimiser, schedule)
        say(f"{config.run_dir}: goes on after step {step:,}.")
    loader = _stream(config, schedule, step // max(steps_per_epoch, 1))
    if state is not None and state["stream"] is not None:
        loader.load_state_dict(state["stream"])
    validation = _validation(config, store)
    log = _Log(config.run_dir / "metrics.jsonl", step)

    # ---- steps
    model.train()
    with _stop_requests() as stop:
        interval = _Interval(loader)
        while step < last_step and not schedule.finished:
            for images, labels in loader:
                lr = schedule.apply(optimiser, step / steps_per_epoch)
                labels = labels.to(model.devices[0], non_blocking=True)
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimiser.step()
                step += 1
                interval.add(loss.detach(), logits.detach(), labels)
                epoch_ends = step % steps_per_epoch == 0
                pause = bool(stop) or epoch_ends or step % config.checkpoint_every == 0 or step == last_step
                if pause or step % config.log_every == 0:
                    log.train(
                        {"kind": "train", "epoch": step / steps_per_epoch, "step": step, **interval.read(), "lr": lr}
                    )
                if pause:
                    break

            # ---- at an epoch's end, every so often, and when asked to stop
            stream_state: dict[str, Any] | None = loader.state_dict()
            epoch = step // steps_per_epoch
            if epoch_ends and validation is not None:
                result = _validate(model, validation)
                schedule.saw_validation(result.top1_error)
                log.validation(epoch, step, result)
            if epoch_ends and schedule.colour(epoch) != loader.how.colour:
                loader.close()
                loader, stream_state = _stream(config, schedule, epoch), None
            checkpoint.save(config.run_dir, step, _state(config, store, step, model, optimiser, schedule, stream_state))
            if stop:
                raise stop[0]
            interval = _Interval(loader)
    loader.close()
    return config.run_dir


def _stream(config: RunConfig, schedule: Schedule, epochs_done: int) -> TrainLoader:
    """The training stream of an epoch: where the schedule changes the colour noise, another stream begins, with its
    own seed.
    """
    how = config.recipe.augmentation
    colour = schedule.colour(epochs_done)
    if colour != how.colour:
        how = replace(how, colour=colour, divisor=1.0 if colour == "off" else how.divisor)
    return train_loader(
        config.store,
        config.batch_size,
        config.devices[0],
        config.seed + (1 << 32 if how is not config.recipe.augmentation else 0),
        augmentation=how,
        threads=config.threads,
    )


def _validation(config: RunConfig, store: Store) -> EvalLoader | None:
    if "val" not in store.splits:
        say(f"{config.store} has no split val: no validation errors, and a schedule that waits for them never moves.")
        return None
    batch = batch_of(store.split("val").records, 1, config.devices[0])
    return eval_loader(
        config.store, batch, config.devices[0], augmentation=config.recipe.augmentation, threads=config.threads
    )


def _validate(model: AlexNet, loader: EvalLoader) -> EvalResult:
    with progress("validation", loader.records, "images") as report:
        return evaluate(model, loader, report)


def _state(
    config: RunConfig,
    store: Store,
    step: int,
    model: AlexNet,
    optimiser: PaperSGD,
    schedule: Schedule,
    stream: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that decides what comes next. `_restore` takes the same names."""
    return {
        "identity": identity(config, store),
        "step": step,
        "parameters": model.joined(),
        "velocity": model.joined(optimiser.velocity),
        "schedule": schedule.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": [torch.cuda.get_rng_state(d) for d in model.devices if d.type == "cuda"],
        "stream": stream,
    }


def _restore(state: dict[str, Any], model: AlexNet, optimiser: PaperSGD, schedule: Schedule) -> int:
    """Put a checkpoint's state back; returns its step. The stream is restored by its loader."""
    model.load_joined(state["parameters"])
    model.load_joined(state["velocity"], optimiser.velocity)
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])
    gpus = [device for device in model.devices if device.type == "cuda"]
    if len(gpus) == len(state["random_cuda"]):
        for device, generator in zip(gpus, state["random_cuda"], strict=True):
            torch.cuda.set_rng_state(generator, device)
    step: int = state["step"]
    return step


class _Interval:
    """Sums since the last line, on the device: reading them is the only time the loop waits for it."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader
        self._begin()

    def _begin(self) -> None:
        self.started, self.waited = time.perf_counter(), self.loader.waited_s
        self.steps = self.images = 0
        self.loss: torch.Tensor | float = 0.0
        self.misses: torch.Tensor | int = 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.steps, self.images = self.steps + 1, self.images + len(labels)
        self.loss, self.misses = self.loss + loss, self.misses + wrong(logits, labels)

    def read(self) -> dict[str, float]:
        """Means over the interval; begins the next. Raises UserError for a loss that is not finite."""
        loss = float(self.loss) / self.steps
        misses = torch.as_tensor(self.misses).tolist()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} within the last {self.steps} steps: training has diverged. The last checkpoint is "
                "kept. A lower rate usually helps: choose another --recipe, or a larger --batch for the same rate."
            )
        seconds = time.perf_counter() - self.started
        read = {
            "loss": loss,
            "top1_error": misses[0] / self.images,
            "top5_error": misses[1] / self.images,
            "images_per_s": self.images / seconds,
            "waiting_share": (self.loader.waited_s - self.waited) / seconds,
        }
        self._begin()
        return read


class _Log:
    """metrics.jsonl and the lines on the terminal. Lines after the step from which a run goes on are taken back."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            temporary = path.with_name(".metrics.tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, path)
        self.path = path

    def train(self, line: dict[str, Any]) -> None:
        self._write(line)
        say(
            f"epoch {line['epoch']:6.2f}  step {line['step']:,}  loss {line['loss']:.3f}  "
            f"top-1 {line['top1_error']:6.1%}  top-5 {line['top5_error']:6.1%}  lr {line['lr']:g}  "
            f"{line['images_per_s']:,.1f} images/s  waits for stream {line['waiting_share']:.1%}"
        )

    def validation(self, epoch: int, step: int, result: EvalResult) -> None:
        self._write({"kind": "val", "epoch": epoch, "step": step, **vars(result)})
        say(
            f"epoch {epoch:6.2f}  validation  loss {result.loss:.3f}  top-1 {result.top1_error:6.1%}  "
            f"top-5 {result.top5_error:6.1%}  of {result.images:,} images, centre view"
        )

    def _write(self, line: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for a line that a kill has cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextmanager
def _stop_requests() -> Iterator[list[BaseException]]:
    """A list that is empty until Ctrl-C or SIGTERM puts in what to raise once the step is done; a second one raises
    now.
    """
    asked: list[BaseException] = []

    def ask(signum: int, frame: FrameType | None) -> None:
        stop = Terminated() if signum == signal.SIGTERM else KeyboardInterrupt()
        if asked:
            raise stop
        asked.append(stop)
        say("Stopping after this step, with a checkpoint.")

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
