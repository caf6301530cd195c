"""The training loop: resume, train, log, checkpoint, validate. One stream trains one run, or several runs at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pipeline.loader import EvalLoader, TrainLoader, eval_loader, train_loader
from pipeline.service.errors import ServiceError
from prep.console import say
from prep.files import hold_lock
from train.config.devices import keep_freed_memory
from train.evaluation.evaluate import eval_batch_size
from train.monitor.console_view import ConsoleView
from train.monitor.interval_metrics import StreamWaits
from train.monitor.view import choose_view
from train.optim.schedule import Schedule
from train.replicas.agreement import Agreement
from train.replicas.group import ALONE, ReplicaGroup
from train.runs.run import Run, make_run_dir
from train.trainer.determinism import use_deterministic_algorithms
from train.trainer.divergence import Diverged
from train.trainer.out_of_memory import out_of_memory
from train.trainer.state import Generators
from train.trainer.stop_requests import StopRequests, stop_requests
from train.trainer.training import Training


def fit(run: Run, view: ConsoleView | None = None, group: ReplicaGroup = ALONE) -> Path:
    """Train a run, or continue it from its newest checkpoint. Returns the run folder.

    view   console output; by default a live display on a terminal and plain lines elsewhere
    group  the replicas that train the run together, all of which call `fit`. Only rank 0 uses the run folder

    Raises UserError if the folder holds another run or if memory runs out, and DiskFull if the disk is too full for
    checkpoints. Raises Diverged if a loss, gradient or parameter becomes NaN or infinite. Also raises the errors of the
    loaders. If the service cannot give the next batch, `fit` writes a checkpoint before it raises ServiceError. After
    Ctrl-C, SIGTERM or SIGHUP, `fit` finishes the step, writes a checkpoint and raises KeyboardInterrupt or Terminated.
    A signal during a validation makes `fit` raise at once, because the checkpoint was written before the validation.

    With several replicas, an error of one rank ends all ranks: the other ranks raise OtherReplicaFailed. A signal to
    one rank stops all ranks after the same step. Raises ReplicaLost if a rank hangs, or ends without reporting an
    error.
    """
    fit_together([run], [view or choose_view()], group)
    return run.run_dir


def fit_together(runs: Sequence[Run], views: Sequence[ConsoleView], group: ReplicaGroup = ALONE) -> None:
    """Train several runs from one stream: each batch is decoded once and trains one run after another.

    The runs may differ only in their seed and their folder. The stream seeds of the runs are equal. The runs may be at
    different steps. The stream then begins at the lowest step, and a batch trains only the runs that have not yet been
    trained on this batch. The result of each run has the same bits as if `fit` had trained the run alone.

    If one of several runs diverges, the other runs continue, and Diverged is raised at the end. Also raises all other
    errors of `fit`. All errors except Diverged end the training of all runs.
    """
    with ExitStack() as resources:
        with group.together():
            for run in runs if group.is_first else ():
                make_run_dir(run.run_dir)
                resources.enter_context(hold_lock(run.run_dir, "training"))
        resources.enter_context(out_of_memory(runs[0].config, len(runs)))
        _fit(runs, views, group, resources)


def _fit(runs: Sequence[Run], views: Sequence[ConsoleView], group: ReplicaGroup, resources: ExitStack) -> None:
    config = runs[0].config
    if config.devices[0] == "cpu":
        keep_freed_memory()
    if config.deterministic:
        use_deterministic_algorithms()
    generators = Generators(config.devices)
    trainings = [Training(run, generators, view, group) for run, view in zip(runs, views, strict=True)]
    with group.together():
        stream = _Stream(min(trainings, key=lambda training: training.step), group, resources)
        validation = validation_stream(runs[0], group)
        if validation is not None:
            resources.enter_context(validation)
        for training in trainings:
            training.open_log()
            resources.enter_context(training)
    with stop_requests() as stop:
        _Loop(trainings, stream, validation, stop).run()


def raise_diverged(diverged: Sequence[tuple[Path, Diverged]]) -> None:
    """Raise Diverged if `diverged` is not empty. This function is called after all other runs have been trained.

    diverged  folder and error of each run that has diverged
    """
    if diverged:
        run_dir, error = diverged[0]
        names = ", ".join(run_dir.name for run_dir, _ in diverged)
        raise Diverged(f"{names} diverged; members that did not diverge have been trained. {run_dir}: {error}")


class _Loop:
    """Gives the batches of a stream to trainings, which may be at different steps."""

    def __init__(
        self, trainings: Sequence[Training], stream: _Stream, validation: EvalLoader | None, stop: StopRequests
    ) -> None:
        self._active, self._stream, self._validation, self._stop = list(trainings), stream, validation, stop
        self._run, self._is_alone = trainings[0].run, len(trainings) == 1
        self._group = trainings[0].group
        self._agreement = Agreement(self._group, self._run.config.service is not None)
        self._diverged: list[tuple[Path, Diverged]] = []  # run folder and error of each training that diverged

    def run(self) -> None:
        """Train until all trainings have made all their steps.

        The checkpoint at the end of an epoch is written before the validation. A stop during the validation therefore
        loses nothing.
        """
        while self._active:
            for training in self._active:
                if training.validation_due and self._validation is not None:
                    with self._stop.raised_at_once():
                        training.validate(self._validation)
            for training in [training for training in self._active if training.is_done]:
                training.close()
                self._active.remove(training)
            if self._active:
                self._train(min(training.step for training in self._active))
        raise_diverged(self._diverged)

    def _train(self, step: int) -> None:
        """Train from `step` on until the next checkpoints are due or a stop is requested, and write the checkpoints."""
        stop, config, first_step, epoch_ends = self._stop, self._run.config, step, False
        stopped: BaseException | None = None  # an exception on all replicas, or None on all replicas
        loader = self._stream.move_to(step)
        waits = StreamWaits(loader)
        current = [training for training in self._active if training.step == step]
        for training in current:
            training.begin_interval(waits)
        later_steps = {training.step for training in self._active} - {step}
        stop.on_request = loader.stop_waiting
        try:
            for images, labels in self._agreement.batches(loader):
                for training in current:
                    training.train(images, labels)
                step += 1
                epoch_ends = step % self._run.steps_per_epoch == 0
                is_due = step % config.checkpoint_every == 0 or step == self._run.last_step
                stopped = self._agreement.stop(stop.requested)
                pause = stopped is not None or epoch_ends or is_due
                if pause or step % config.log_every == 0:
                    self._log_interval(current, loader)
                if pause or not current:
                    break
                if step in later_steps:  # the runs that were already at this step are trained from here on
                    joining = [training for training in self._active if training.step == step]
                    for training in joining:
                        if training not in current:
                            training.begin_interval(waits)
                    current = joining
        except ServiceError as error:  # there is no batch for the next step
            self._log_interval([training for training in current if training.steps_since_log], loader)
            loader = self._stream.move_to(step)  # goes back if this replica has already taken the next batch
            if step > first_step:
                self._save([training for training in current if training in self._active], loader, is_last=True)
            stopped = self._agreement.stop(stop.requested)
            with self._group.together():
                raise stopped or error from None
        for training in current:
            training.validation_due = epoch_ends and self._validation is not None
        loader = self._stream.move_to(step)
        self._save(current, loader, is_last=stopped is not None)
        if stopped is not None:
            # torchrun terminates all replicas when one of them ends, so all replicas wait for rank 0's checkpoint.
            self._group.barrier()
            raise stopped

    def _log_interval(self, trainings: list[Training], loader: TrainLoader) -> None:
        """Write the log lines of `trainings`. If one of several runs has diverged, it is no longer trained."""
        for training in list(trainings):
            try:
                training.log_interval(loader.augmentation)
            except Diverged as error:
                if self._is_alone:
                    raise
                training.view.warn(f"{error} The other members continue.")
                training.close(error)
                trainings.remove(training)
                self._active.remove(training)
                self._diverged.append((training.run.run_dir, error))

    def _save(self, trainings: Sequence[Training], loader: TrainLoader, is_last: bool) -> None:
        for training in trainings:
            ends = training.step == self._run.last_step and not training.validation_due
            training.save(loader, is_last or ends)


class _Stream:
    """The training stream, which is opened again when the schedule changes the colour noise after an epoch.

    The colour noise depends only on the epoch, so one stream serves all trainings.
    """

    def __init__(self, first: Training, group: ReplicaGroup, resources: ExitStack) -> None:
        """Open the stream at the step of `first`. Raises the errors of train_loader and TrainLoader.load_state_dict."""
        self._run, self._schedule, self._group, self._resources = first.run, first.schedule, group, resources
        self._loader = self._open(first.step // max(self._run.steps_per_epoch, 1))
        if first.resumed is not None:
            self._loader.load_state_dict(first.resumed.stream)

    def move_to(self, step: int) -> TrainLoader:
        """Return the loader. Its next batch is the batch of the step after `step`."""
        epoch, step_of_epoch = divmod(step, self._run.steps_per_epoch)
        if self._schedule.colour(epoch) != self._loader.augmentation.colour:
            service = self._loader.service_status()
            self._loader.close()
            if service is not None and service.state == "local":  # the service is lost: do not connect to it again
                self._run = without_service(self._run)
            self._loader = self._open(epoch)
        if (self._loader.epoch, self._loader.step) != (epoch, step_of_epoch):
            self._loader.seek(epoch, step_of_epoch)
        return self._loader

    def _open(self, epoch: int) -> TrainLoader:
        return self._resources.enter_context(training_stream(self._run, self._schedule, epoch, self._group))


def training_stream(run: Run, schedule: Schedule, epochs_done: int, group: ReplicaGroup = ALONE) -> TrainLoader:
    """Return the training stream of a replica, which begins after `epochs_done` epochs.

    In each step, the replica gets a contiguous part of the images of the batch. `schedule` determines the colour noise
    of the next epoch.
    """
    config, augmentation = run.config, run.config.recipe.augmentation
    colour = schedule.colour(epochs_done)
    if colour != augmentation.colour:
        if colour == "off":  # without colour noise, the divisor is that of evaluation
            augmentation = replace(augmentation, divisor=augmentation.divisor_in_evaluation)
        augmentation = replace(augmentation, colour=colour)
    loader = train_loader(
        config.store,
        config.batch_size // group.size,
        config.devices[0],
        config.seed_of_stream,
        augmentation=augmentation.for_stream(),
        threads=config.threads,
        shard=group.rank,
        world_size=group.size,
        service=config.service,
        service_fallback=config.service_fallback,
    )
    loader.seek(epochs_done)
    return loader


def validation_stream(run: Run, group: ReplicaGroup = ALONE) -> EvalLoader | None:
    """Return the loader for the centre views of the split val. Without a split val, print a message and return None.

    In a group of several replicas, the loader serves this replica's part of the split.
    """
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
        augmentation=config.recipe.augmentation.for_stream(),
        threads=config.threads,
        shard=group.rank,
        world_size=group.size,
        service=config.service,
        service_fallback=config.service_fallback,
    )


def without_service(run: Run) -> Run:
    """Return a copy of `run` whose streams decode the images in this process, without a service."""
    return replace(run, config=replace(run.config, service=None, service_fallback=None))
