"""One run in training: its network, optimizer, schedule, random generators, log and checkpoints.

The training loop (train/trainer/loop.py) gives the batches of a stream to one Training, or to several.
"""

from __future__ import annotations

from types import TracebackType

from torch import Tensor

from pipeline.augment import Augmentation
from pipeline.loader import EvalLoader, TrainLoader
from train.evaluation.evaluate import evaluate
from train.model.alexnet import AlexNet
from train.monitor.console_view import ConsoleView, RunLength
from train.monitor.interval_metrics import IntervalMetrics, StreamWaits
from train.monitor.metrics_log import MetricsLog
from train.monitor.silent_log import SilentLog
from train.monitor.step_counters import StepCounters, counts_of_all
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.replicas.gradients import GradientSum
from train.replicas.group import ALONE, ReplicaGroup
from train.runs import checkpoint
from train.runs.run import Run, write_description
from train.trainer.divergence import DivergenceCheck
from train.trainer.state import Generators, capture_state, load_on_all_ranks, restore_state, seed_generators
from train.trainer.step import TrainingStep
from train.trainer.step_graph import CountedStep, graph_for


class Training:
    """A run in training. As a context manager, it writes into the run's status.json how the training ended.

    `step` is the number of steps that the run has made. `validation_due` is True if an epoch ended with the newest
    step, and the validation of the epoch has not been computed. `resumed` is the checkpoint from which the run
    continues, or None.
    """

    def __init__(self, run: Run, generators: Generators, view: ConsoleView, group: ReplicaGroup = ALONE) -> None:
        """Create the network, and restore the newest intact checkpoint in the run folder.

        group  the replicas that train the run together. Only rank 0 uses the run folder: it writes log and checkpoints,
               and sends the restored checkpoint to the other ranks, which do not need access to the folder

        The checkpoint must have the identity of the run. Without a checkpoint, the run begins at step 0. The initial
        parameters are drawn from the seed. Raises UserError if the folder holds another run.
        """
        config = run.config
        self.run, self.view, self.group, self._generators = run, view, group, generators
        generators.switch_to(self)
        seed_generators(config, 0)
        self.network = AlexNet(len(run.store.classes), config.recipe, config.devices, config.model)
        self.network.train()
        self.network.replicas = group
        self.optimizer = make_optimizer(self.network, config.recipe)
        self.schedule = Schedule(config.recipe, config.batch_size)
        self.step, self.validation_due = 0, False
        self.resumed = resumed = load_on_all_ranks(run.run_dir, run.identity, group)
        if resumed is not None:
            self.step, self.validation_due = resumed.step, resumed.validation_due
            restore_state(resumed, config, self.network, self.optimizer, self.schedule)
            view.note(f"{run.run_dir}: resumes after step {self.step:,}.")
            self._stream = resumed.stream  # state of the stream after `step`
        with group.together():
            # None on all ranks except rank 0, which writes the checkpoints.
            self._keeper = self._begin_in_folder() if group.is_first else None
        gradient_sum = None if group.link is None else GradientSum(self.network.parameters(), group.link)
        train_step = TrainingStep(self.network, self.optimizer, config.precision, config.accumulate, gradient_sum)
        # A log line is written after log_every steps, before each checkpoint and at the end of each epoch.
        longest_interval = min(config.log_every, config.checkpoint_every, max(run.steps_per_epoch, 1))
        self._counters = StepCounters(self.network.devices[0], longest_interval)
        self._counted_step = CountedStep(train_step, self._counters, graph_for(self.network.devices))
        self._divergence_check = DivergenceCheck(run, self.network, view.warn)
        self._log: MetricsLog | SilentLog | None = None
        self._lr = 0.0  # learning rate of the last step

    def _begin_in_folder(self) -> checkpoint.CheckpointKeeper:
        if self.resumed is not None:
            checkpoint.drop_after(self.run.run_dir, self.step)
        keeper = checkpoint.CheckpointKeeper(self.run.run_dir, self.run.config.keep, self.resumed)
        write_description(self.run, keeper.ancestry)
        return keeper

    @property
    def is_done(self) -> bool:
        """Return whether no step is left, or a plateau schedule has ended the run."""
        return self.step >= self.run.last_step or self.schedule.finished

    def open_log(self) -> None:
        """Begin the log of the run.

        Raises DiskFull if there is no disk space, and UserError for any other disk error.
        """
        run, config = self.run, self.run.config
        length = RunLength(run.steps_per_epoch, run.last_step, config.batch_size, len(run.store.classes))
        if self.group.is_first:
            self._log = MetricsLog(run.run_dir, length, self.step, self.validation_due, self.view)
        else:
            self._log = SilentLog()

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """End the log. `error` is the reason why the training ended early. A second call has no effect."""
        log, self._log = self._log, None
        if log is not None:
            log.__exit__(None if error is None else type(error), error, None)

    def begin_interval(self, waits: StreamWaits) -> None:
        """Begin the interval of the next log line."""
        self._interval: IntervalMetrics = self._open_log.interval(waits, self.network)

    @property
    def steps_since_log(self) -> int:
        """Number of steps since the last log line."""
        return self._interval.steps

    def train(self, images: Tensor, labels: Tensor) -> None:
        """Train the network on the images of this replica for the next step.

        Takes the arguments of TrainingStep, and raises the same errors.
        """
        self._generators.switch_to(self)
        self._lr = self.schedule.apply(self.optimizer, self.step / self.run.steps_per_epoch)
        self._counted_step(images, labels)
        self.step += 1
        self._interval.add(self.run.config.batch_size)

    def log_interval(self, augmentation: Augmentation) -> None:
        """Check the steps since the last log line, and write the log line of these steps.

        `augmentation` is the stream's augmentation in these steps. Raises Diverged if a loss, gradient or parameter is
        NaN or infinite. All replicas call this method at the same step.
        """
        counts = counts_of_all(self._counters.read(), self.group)
        norms = self._divergence_check.check(self.step, self._interval.images, counts, augmentation)
        metrics, epoch = self._interval.read(counts, norms), self.step / self.run.steps_per_epoch
        self._open_log.train({"kind": "train", "epoch": epoch, "step": self.step, **metrics, "lr": self._lr})

    def save(self, loader: TrainLoader, is_last: bool) -> None:
        """Write a checkpoint. Only rank 0 writes. `loader` must be at the batch of the next step.

        is_last  True if the run ends with this checkpoint

        Raises the errors of CheckpointKeeper.save.
        """
        self._stream = loader.state_dict()
        self._save(is_last)

    def _save(self, is_last: bool) -> None:
        if self._keeper is None:
            return
        assert isinstance(self._log, MetricsLog)  # open_log has been called, and `close` has not been called
        self._generators.switch_to(self)
        network, optimizer, schedule = self.network, self.optimizer, self.schedule
        state = capture_state(self.run, self.step, network, optimizer, schedule, self._stream, self.validation_due)
        self._keeper.save(state, is_last, before=self._log.sync)

    def validate(self, validation: EvalLoader) -> None:
        """Compute the validation errors after `step`, write their log line, and keep the best checkpoint.

        Each replica evaluates the images that its `validation` serves.
        """
        with self.view.progress("validation", validation.own_records, "images") as counter:
            result = evaluate(self.network, validation, counter, self.run.config.precision, group=self.group)
        self.schedule.record_validation(result.top1_error)
        self._open_log.validation(self.step // self.run.steps_per_epoch, self.step, result)
        if self._keeper is not None:
            self._keeper.record_validation(self.step, result.top1_error)
        self.validation_due = False
        if self.is_done:  # the validation has changed the state, and the loop writes no later checkpoint of this run
            self._save(is_last=True)

    @property
    def _open_log(self) -> MetricsLog | SilentLog:
        assert self._log is not None  # open_log has been called, and `close` has not
        return self._log
