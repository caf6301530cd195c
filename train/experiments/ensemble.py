"""Trains the members of an ensemble. The members are networks with different seeds that are trained on one stream.

Krizhevsky, Sutskever and Hinton (2012) averaged the predictions of five networks. The seed of a member determines its
initial parameters and its dropout. All members share the stream, with its record order, crops and colour noise. Each
member is an ordinary run with its own run folder. The weights of a member have the same bits as if the member were
trained alone with the same seed and stream seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from prep.console import UserError
from prep.files import hold_lock
from train.config.identity import check_identity
from train.config.run_config import RunConfig
from train.monitor.console_view import ConsoleView
from train.monitor.ensemble_view import EnsembleView
from train.runs.ensemble_dir import Ensemble, check_ensemble_dir, make_ensemble_dir, member_dir
from train.runs.run import Run
from train.runs.run_dir import newest_checkpoint, read_description
from train.trainer.divergence import Diverged
from train.trainer.fork import fork, preview_fork
from train.trainer.loop import fit, fit_together, raise_diverged


def member_configs(config: RunConfig, members: int) -> list[RunConfig]:
    """Return the configurations of the members of an ensemble.

    config  configuration of the ensemble. The run_dir of `config` is the folder of the ensemble. Member k, counted from
    1, has the seed config.seed + k
    """
    return [
        replace(
            config,
            seed=config.seed + number,
            stream_seed=config.seed_of_stream,
            run_dir=member_dir(config.run_dir, number),
        )
        for number in range(1, members + 1)
    ]


def train_members(
    folder: Path,
    ensemble: Ensemble,
    runs: Sequence[Run],
    new_view: Callable[[], ConsoleView],
    one_at_a_time: bool = False,
) -> None:
    """Train the members of an ensemble, or continue each member from its newest checkpoint.

    folder         folder of the ensemble
    runs           the members
    new_view       function that returns a new view for console output
    one_at_a_time  True: the members are trained one after another, which needs the memory of only one member. False:
                   each batch trains all members

    Raises the errors of fit_together. Raises UserError if the folder holds other files or another ensemble.
    """
    check_members(folder, ensemble, runs)
    make_ensemble_dir(folder, ensemble)
    with hold_lock(folder, "training"):
        if not one_at_a_time:
            views = EnsembleView(new_view(), [run.run_dir.name for run in runs])
            fit_together(runs, [views.member(run.run_dir.name) for run in runs])
            return
        diverged = []
        for run in runs:
            view = new_view()
            view.note(f"{run.run_dir}: seed {run.config.seed}")
            try:
                fit(run, view)
            except Diverged as error:
                view.warn(f"{run.run_dir.name}: {error} The other members continue.")
                diverged.append((run.run_dir, error))
        raise_diverged(diverged)


def check_members(folder: Path, ensemble: Ensemble, runs: Sequence[Run]) -> None:
    """Raise UserError if the folder holds other files or another ensemble.

    Also raises UserError if the folder of a member holds a run with another identity (train/config/identity.py).

    The check precedes the first write, so that a command with wrong options does not change the folder.
    """
    check_ensemble_dir(folder, ensemble)
    for run in runs:
        try:
            identity = read_description(run.run_dir)["identity"]
        except UserError:  # there is no run.json yet, or it is damaged and will be rewritten
            continue
        if newest_checkpoint(run.run_dir) is not None:
            check_identity(identity, run.identity, run.run_dir)


def fork_members(new_dir: Path, ensemble: Ensemble, runs: Sequence[Run]) -> list[Run]:
    """Start an ensemble in `new_dir` whose members are forks of `runs`, and return the forks.

    ensemble.json is written last (train_members). If a kill leaves a folder with too few forks, the folder is therefore
    not an ensemble yet, and the same command forks the missing members. Raises the errors of `fork` and
    check_ensemble_dir.
    """
    check_ensemble_dir(new_dir, ensemble)
    return [fork(run, new_dir / run.run_dir.name) for run in runs]


def preview_members(ensemble: Ensemble, runs: Sequence[Run], new_dir: Path | None) -> list[str]:
    """Return the messages of `alextrain run --dry-run` for all members.

    Raises the errors of preview_fork, check_members and check_ensemble_dir.
    """
    if new_dir is None:
        check_members(runs[0].run_dir.parent, ensemble, runs)
    else:
        check_ensemble_dir(new_dir, ensemble)
    return [line for run in runs for line in preview_fork(run, new_dir and new_dir / run.run_dir.name)]
