"""The training loop: resume, train, log, checkpoint, validate."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pipeline.loader import EvalLoader, TrainLoader, eval_loader, train_loader
from pipeline.service.errors import ServiceError
from prep.console import say
from prep.files import hold_lock
from train.config.devices import keep_freed_memory
from train.config.identity import check_identity
from train.evaluation.evaluate import EvalResult, eval_batch_size, evaluate
from train.model.alexnet import AlexNet
from train.monitor.console_view import ConsoleView, RunLength
from train.monitor.metrics_log import MetricsLog
from train.monitor.step_counters import StepCounters
from train.monitor.view import choose_view
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.runs import checkpoint
from train.runs.run import Run, make_run_dir, write_description
from train.trainer.determinism import use_deterministic_algorithms
from train.trainer.out_of_memory import out_of_memory
from train.trainer.state import capture_state, restore_state, seed_generators
from train.trainer.step import TrainingStep
from train.trainer.step_graph import CountedStep, graph_for
from train.trainer.stop_requests import stop_requests
from train.trainer.watchdog import Watchdog


def fit(run: Run, view: ConsoleView | None = None) -> Path:
    """Train a run, or continue it from its newest checkpoint; returns the run folder.

    view  console output; by default a live display on a terminal and plain lines elsewhere

    Raises UserError if the folder holds another run or if memory runs out, and DiskFull if the disk is too full for
    checkpoints. Raises Diverged if a loss, gradient or parameter becomes NaN or infinite. Also raises the errors of the
    loaders. If the service cannot give the next batch, `fit` writes a checkpoint before it raises ServiceError. After
    Ctrl-C, SIGTERM or SIGHUP, `fit` finishes the step, writes a checkpoint and raises KeyboardInterrupt or Terminated.
    During a validation, `fit` raises at once, because the checkpoint was written before the validation.
    """
    make_run_dir(run.run_dir)
    with hold_lock(run.run_dir, "training"), out_of_memory(run.config), ExitStack() as streams:
        _fit(run, streams, view or choose_view())
    return run.run_dir


def _fit(run: Run, streams: ExitStack, view: ConsoleView) -> None:
    # ---- network, optimizer, schedule
    config, steps_per_epoch, last_step = run.config, run.steps_per_epoch, run.last_step
    if config.devices[0] == "cpu":
        keep_freed_memory()
    if config.deterministic:
        use_deterministic_algorithms()
    seed_generators(config, 0)
    network = AlexNet(len(run.store.classes), config.recipe, config.devices, config.model)
    optimizer, schedule = make_optimizer(network, config.recipe), Schedule(config.recipe)
    train_step = TrainingStep(network, optimizer, config.precision, config.accumulate)

    # ---- resume from the newest intact checkpoint in the run folder. The checkpoint must have the
    # ---- identity of the run.
    # ---- Without a checkpoint the run begins at step 0, with parameters drawn from the seed.
    step, validation_due = 0, False
    resumed = checkpoint.load_latest(run.run_dir)
    if resumed is not None:
        check_identity(resumed.identity, run.identity, run.run_dir)
        step, validation_due = resumed.step, resumed.validation_due
        restore_state(resumed, config, network, optimizer, schedule)
        checkpoint.drop_after(run.run_dir, step)
        view.note(f"{run.run_dir}: resumes after step {step:,}.")
    keeper = checkpoint.CheckpointKeeper(run.run_dir, config.keep, resumed)
    write_description(run, keeper.ancestry)
    loader = streams.enter_context(training_stream(run, schedule, step // max(steps_per_epoch, 1)))
    if resumed is not None:
        loader.load_state_dict(resumed.stream)
    validation = validation_stream(run)
    if validation is not None:
        streams.enter_context(validation)
    length = RunLength(steps_per_epoch, last_step, config.batch_size, len(run.store.classes))
    log = streams.enter_context(MetricsLog(run.run_dir, length, step, validation_due, view))
    watchdog = Watchdog(run, network, view.warn)
    counters = StepCounters(network.devices[0], config.log_every)
    counted_step = CountedStep(train_step, counters, graph_for(network.devices))

    def save(is_last: bool) -> None:
        state = capture_state(run, step, network, optimizer, schedule, loader, validation_due)
        keeper.save(state, is_last, before=log.sync)

    def log_interval() -> None:
        counts = counters.read()
        norms = watchdog.check(step, interval.images, counts, loader.augmentation)
        epoch = step / steps_per_epoch
        log.train({"kind": "train", "epoch": epoch, "step": step, **interval.read(counts, norms), "lr": lr})

    # ---- epochs. The checkpoint at the end of an epoch is written before the validation, so that a stop during the
    # ---- validation loses nothing.
    network.train()
    with stop_requests() as stop:
        while True:
            if validation_due and validation is not None:
                with stop.raised_at_once():
                    result = _validate(network, validation, config.precision, view)
                schedule.record_validation(result.top1_error)
                log.validation(step // steps_per_epoch, step, result)
                keeper.record_validation(step, result.top1_error)
                validation_due = False
                if step >= last_step or schedule.finished:
                    save(is_last=True)
            if step >= last_step or schedule.finished:
                break

            interval, saved_step = log.interval(loader, network), step
            stop.on_request = loader.stop_waiting
            try:
                for images, labels in loader:
                    lr = schedule.apply(optimizer, step / steps_per_epoch)
                    counted_step(images, labels)
                    step += 1
                    interval.add(len(labels))
                    epoch_ends = step % steps_per_epoch == 0
                    is_due = step % config.checkpoint_every == 0 or step == last_step
                    pause = bool(stop.requested) or epoch_ends or is_due
                    if pause or step % config.log_every == 0:
                        log_interval()
                    if pause:
                        break
            except ServiceError as error:  # there is no batch for the next step
                if interval.steps:
                    log_interval()
                if step > saved_step:
                    save(is_last=True)
                raise stop.requested or error from None

            validation_due = epoch_ends and validation is not None
            if epoch_ends and schedule.colour(step // steps_per_epoch) != loader.augmentation.colour:
                service = loader.service_status()
                loader.close()
                if service is not None and service.state == "local":  # a new stream could not connect to the service
                    run = without_service(run)
                loader = streams.enter_context(training_stream(run, schedule, step // steps_per_epoch))
            save(is_last=bool(stop.requested) or (step == last_step and not validation_due))
            if stop.requested:
                raise stop.requested


def training_stream(run: Run, schedule: Schedule, epochs_done: int) -> TrainLoader:
    """Return the training stream after `epochs_done` epochs.

    `schedule` determines the colour noise of the next epoch.
    """
    config, augmentation = run.config, run.config.recipe.augmentation
    colour = schedule.colour(epochs_done)
    if colour != augmentation.colour:
        if colour == "off":  # without the noise, training divides as evaluation does
            augmentation = replace(augmentation, divisor=augmentation.divisor_in_evaluation)
        augmentation = replace(augmentation, colour=colour)
    loader = train_loader(
        config.store,
        config.batch_size,
        config.devices[0],
        config.seed_of_stream,
        augmentation=augmentation,
        threads=config.threads,
        service=config.service,
        service_fallback=config.service_fallback,
    )
    loader.seek(epochs_done)
    return loader


def validation_stream(run: Run) -> EvalLoader | None:
    """Return the loader for the centre views of the split val; None, after a message, if the store has no split val."""
    config = run.config
    if "val" not in run.store.splits:
        say(
            f"{config.store} has no split val: validation errors are not computed, and a plateau schedule never "
            "reduces the rate."
        )
        return None
    batch = eval_batch_size(run.store.split("val").records, 1, config.devices[0])
    return eval_loader(
        config.store,
        batch,
        config.devices[0],
        augmentation=config.recipe.augmentation,
        threads=config.threads,
        service=config.service,
        service_fallback=config.service_fallback,
    )


def without_service(run: Run) -> Run:
    """Return a copy of `run` whose streams decode the images in this process, without a service."""
    return replace(run, config=replace(run.config, service=None, service_fallback=None))


def _validate(network: AlexNet, loader: EvalLoader, precision: str, view: ConsoleView) -> EvalResult:
    with view.progress("validation", loader.records, "images") as counter:
        return evaluate(network, loader, counter, precision)
