"""The training loop, on one page."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pipeline.loader import EvalLoader, TrainLoader, eval_loader, train_loader
from prep.console import Terminated, say
from prep.files import hold_lock
from prep.store.manifest import Store
from train.config.devices import keep_freed_memory
from train.config.identity import check_identity, identity
from train.config.run_config import RunConfig, check_parts, length
from train.evaluation.evaluate import EvalResult, batch_of, evaluate
from train.model.alexnet import AlexNet
from train.monitor.console_view import ConsoleView, RunLength
from train.monitor.metrics_log import MetricsLog
from train.monitor.view import choose_view
from train.runs import checkpoint
from train.runs.run import claim, describe, what_it_trains
from train.trainer.optim import PaperSGD, make_optimizer
from train.trainer.schedule import Schedule
from train.trainer.step import TrainingStep
from train.trainer.watchdog import Watchdog, out_of_memory


def fit(config: RunConfig, view: ConsoleView | None = None) -> Path:
    """Train, or go on training; returns the run folder. `view`: what a person sees; by default what fits the terminal.

    Raises UserError as the loaders do, for a run folder of another run, a batch that its parts do not divide and a
    lack of memory, DiskFull, Diverged when the loss is no longer a number; after Ctrl-C, SIGTERM or SIGHUP finishes the
    step, writes a checkpoint and raises KeyboardInterrupt or Terminated.
    """
    check_parts(config)
    claim(config.run_dir)
    with hold_lock(config.run_dir, "training"), out_of_memory(config), ExitStack() as streams:
        _fit(config, streams, view or choose_view())
    return config.run_dir


def _fit(config: RunConfig, streams: ExitStack, view: ConsoleView) -> None:
    # ---- store, model, optimizer
    store = Store.open(config.store)
    if config.devices[0] == "cpu":
        keep_freed_memory()
    _seed(config, 0)
    model = AlexNet(len(store.classes), config.recipe, config.devices, config.model)
    optimizer, schedule = make_optimizer(model, config.recipe), Schedule(config.recipe)
    train_on = TrainingStep(model, optimizer, config.precision, config.accumulate)
    steps_per_epoch, last_step = length(config, store)

    # ---- resume. What holds, in this order: 1. the newest checkpoint of the run folder that can be read, if it is of
    # ---- the same run; 2. the seed. The stream is the one of the epoch, continued where the checkpoint left it.
    step, validation_due = 0, False
    state = checkpoint.load_latest(config.run_dir)
    if state is not None:
        check_identity(state, identity_of(config, store), config.run_dir)
        step, validation_due = state["step"], state["validation_due"]
        _restore(state, config, model, optimizer, schedule)
        checkpoint.drop_after(config.run_dir, step)
        view.note(f"{config.run_dir}: goes on after step {step:,}.")
    keeper = checkpoint.Keeper(config.run_dir, config.keep, state)
    describe(config, store, keeper.ancestry)
    loader = streams.enter_context(stream_at(config, schedule, step // max(steps_per_epoch, 1)))
    if state is not None:
        loader.load_state_dict(state["stream"])
    validation = _validation(config, store)
    if validation is not None:
        streams.enter_context(validation)
    plan = RunLength(steps_per_epoch, last_step, config.batch_size)
    log = streams.enter_context(MetricsLog(config.run_dir, plan, step, validation_due, view))
    watch = Watchdog(config, store, model, view.warn)

    def save(last: bool) -> None:
        state = state_of(config, store, step, model, optimizer, schedule, loader, validation_due)
        keeper.save(step, state, last, log.sync)

    # ---- epochs. A checkpoint comes before its validation, which may take long: a stop loses nothing then.
    model.train()
    with _stop_requests() as stop:
        while True:
            if validation_due and validation is not None:
                with stop.at_once():
                    result = _validate(model, validation, config.precision, view)
                schedule.saw_validation(result.top1_error)
                log.validation(step // steps_per_epoch, step, result)
                keeper.validated(step, result.top1_error)
                validation_due = False
                if step >= last_step or schedule.finished:
                    save(last=True)
            if step >= last_step or schedule.finished:
                break

            interval = log.interval(loader, model)
            for images, labels in loader:
                lr = schedule.apply(optimizer, step / steps_per_epoch)
                stepped = train_on(images, labels)
                step += 1
                interval.add(*stepped)
                watch.add(*stepped)
                epoch_ends = step % steps_per_epoch == 0
                pause = bool(stop.asked) or epoch_ends or step % config.checkpoint_every == 0 or step == last_step
                if pause or step % config.log_every == 0:
                    norms = watch.check(step, loader.augmentation)
                    epoch = step / steps_per_epoch
                    log.train({"kind": "train", "epoch": epoch, "step": step, **interval.read(norms), "lr": lr})
                if pause:
                    break

            validation_due = epoch_ends and validation is not None
            if epoch_ends and schedule.color_stats(step // steps_per_epoch) != loader.augmentation.colour:
                loader.close()
                loader = streams.enter_context(stream_at(config, schedule, step // steps_per_epoch))
            save(last=bool(stop.asked) or (step == last_step and not validation_due))
            if stop.asked:
                raise stop.asked


def _seed(config: RunConfig, step: int) -> None:
    """Seed every generator; that of column 1's GPU differently, or both columns would drop the same units."""
    torch.manual_seed(config.seed + step)
    if config.devices[0] != config.devices[1]:
        with torch.cuda.device(config.devices[1]):
            torch.cuda.manual_seed(config.seed + step + (1 << 32))


def stream_at(config: RunConfig, schedule: Schedule, epochs_done: int) -> TrainLoader:
    """The training stream of an epoch: where the schedule changes the colour noise, another stream begins."""
    how = config.recipe.augmentation
    colour = schedule.color_stats(epochs_done)
    if colour != how.colour:
        how = replace(how, colour=colour, divisor=1.0 if colour == "off" else how.divisor)
    loader = train_loader(
        config.store, config.batch_size, config.devices[0], config.seed, augmentation=how, threads=config.threads
    )
    loader.seek(epochs_done)
    return loader


def _validation(config: RunConfig, store: Store) -> EvalLoader | None:
    if "val" not in store.splits:
        say(f"{config.store} has no split val: no validation errors, and a schedule that waits for them never moves.")
        return None
    batch = batch_of(store.split("val").records, 1, config.devices[0])
    return eval_loader(
        config.store, batch, config.devices[0], augmentation=config.recipe.augmentation, threads=config.threads
    )


def _validate(model: AlexNet, loader: EvalLoader, precision: str, view: ConsoleView) -> EvalResult:
    with view.progress("validation", loader.records, "images") as report:
        return evaluate(model, loader, report, precision)


def state_of(
    config: RunConfig,
    store: Store,
    step: int,
    model: AlexNet,
    optimizer: PaperSGD,
    schedule: Schedule,
    loader: TrainLoader,
    validation_due: bool,
) -> dict[str, Any]:
    """Everything that decides what comes next; `_restore` takes the same names."""
    return {
        "identity": identity_of(config, store),
        **what_it_trains(config, store),
        "step": step,
        "steps_per_epoch": len(loader),
        "validation_due": validation_due,
        "parameters": model.joined_tensors(),
        "velocity": model.joined_tensors(optimizer.velocity),
        "schedule": schedule.state_dict(),
        "devices": list(config.devices),
        "random": torch.get_rng_state(),
        "random_cuda": [torch.cuda.get_rng_state(d) for d in model.devices if d.type == "cuda"],
        "stream": loader.state_dict(),
    }


def _restore(state: dict[str, Any], config: RunConfig, model: AlexNet, optimizer: PaperSGD, schedule: Schedule) -> None:
    """Put a checkpoint's state back; on other devices the random generators begin anew. The stream is its loader's."""
    model.load_joined_tensors(state["parameters"])
    model.load_joined_tensors(state["velocity"], optimizer.velocity)
    schedule.load_state_dict(state["schedule"])
    if state["devices"] != list(config.devices):
        _seed(config, state["step"])
        return
    torch.set_rng_state(state["random"])
    gpus = [device for device in model.devices if device.type == "cuda"]
    for device, generator in zip(gpus, state["random_cuda"], strict=True):
        torch.cuda.set_rng_state(generator, device)


class _Stop:
    """What to raise once the step is done, None until Ctrl-C, SIGTERM or SIGHUP asks for it."""

    def __init__(self) -> None:
        self.asked: BaseException | None = None
        self.waits = True

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, nothing is lost by stopping: raise right away, also what was asked for since the loop looked last."""
        self.waits = False
        try:
            if self.asked is not None:
                raise self.asked
            yield
        finally:
            self.waits = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        stop = KeyboardInterrupt() if signum == signal.SIGINT else Terminated(signum)
        if self.asked is not None or not self.waits:
            raise stop
        self.asked = stop
        with suppress(RuntimeError):  # the signal came in the middle of another line, which cannot be broken into
            say("Stopping after this step, with a checkpoint.")


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Signals ask the loop to stop; a second one raises at once. A closed terminal is one, but not under nohup."""
    stop, asking = _Stop(), [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        asking.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, stop) for signum in asking}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
