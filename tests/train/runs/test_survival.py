"""What a run survives: kills at any doing, bits that flip, disks that fill; what it takes over, and what it hands on.

The small network of tests/train/trainer/test_loop.py. Kills are those of tests/helpers/killed.py: 10 here, up to 100 by `make soak`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import train.cli
from prep.console import DiskFull, UserError
from tests.helpers.checkpoints import empty_checkpoint
from tests.helpers.project import ROOT
from tests.train.trainer.test_loop import SMALL, config, metrics, same_result, whole_run  # noqa: F401  # a fixture
from train.config.architecture import ARCHITECTURES
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.monitor.metrics_log import MetricsLog
from train.runs import checkpoint
from train.runs.checkpoint import BEST, Checkpoint, UnreadableCheckpoint, checkpoint_paths, read
from train.runs.loading import load_trained
from train.runs.run import Run
from train.trainer.fork import fork
from train.trainer.loop import fit

# ---------------------------------------------------------------- kills


def killed(store: Path, run_dir: Path, seed: int, how: str) -> dict[str, Any]:
    """Kill a run up to ten times, and hold its result to that of a run that was not killed."""
    words = [str(ROOT / "tests/helpers/killed.py"), str(store), str(run_dir), str(seed), how]
    root = ROOT
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=900,  # twelve forks, each of which ends itself after 120 s
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole = run_dir.with_name("whole")
    same_result(run_dir, whole)
    mine, theirs = (checkpoint.load(folder) for folder in (run_dir, whole))
    assert torch.equal(mine.random, theirs.random)
    for part in ("schedule", "stream", "best", "identity"):
        assert getattr(mine, part) == getattr(theirs, part), part
    assert sorted(os.listdir(run_dir)) == sorted(os.listdir(whole))
    assert not list(run_dir.glob(".*.tmp"))
    return json.loads(done.stdout)


def test_ten_kills_change_no_bit_and_leave_nothing_behind(stores: dict[str, Path], tmp_path: Path) -> None:
    said = killed(stores["ppm"], tmp_path / "run", 1, "at")
    assert said["kills"] == 10 and len(said["at"]) >= 3


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("how", ["at", "when"])
def test_a_hundred_kills(stores: dict[str, Path], tmp_path: Path, how: str, seed: int) -> None:
    """Ten of each run: at doings all of them; at any time those that came before it was done, as the first does."""
    said = killed(stores["ppm"], tmp_path / "run", seed, how)
    assert said["kills"] == 10 if how == "at" else 1 <= said["kills"] <= 10


def test_a_line_that_a_power_cut_tore_is_taken_back(
    stores: dict[str, Path],
    whole_run: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    run_dir = fit(Run.open(config(stores["jpeg"], tmp_path / "run", steps=4)))
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "ep\0\0\xc3\n\xff\xfe')
    fit(Run.open(config(stores["jpeg"], run_dir)))
    same_result(run_dir, whole_run)


# ---------------------------------------------------------------- checkpoints


def test_every_flipped_bit_is_found(whole_run: Path, tmp_path: Path) -> None:  # noqa: F811
    """In the header, the tensors, the padding, the directory and the digest itself; and every cut."""
    whole = checkpoint_paths(whole_run)[-1].read_bytes()
    file, chance = tmp_path / "checkpoint-00000001.pt", random.Random(0)
    places = [*range(40), *range(len(whole) - 160, len(whole)), *chance.sample(range(len(whole)), 300)]
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1 << chance.randrange(8)
        file.write_bytes(altered)
        with pytest.raises(UnreadableCheckpoint, match=r"00000001\.pt: torn, altered"):
            read(file)
    for length in (0, 1, 70, 71, len(whole) // 2, len(whole) - 71, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UnreadableCheckpoint):
            read(file)
    file.write_bytes(whole)
    assert read(file).step == 9
    file.write_bytes(whole + b"\0")
    with pytest.raises(UnreadableCheckpoint):
        read(file)


def test_an_altered_newest_checkpoint_is_named_and_the_one_before_used(
    stores: dict[str, Path],
    whole_run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    newest = checkpoint_paths(run_dir)[-1]
    altered = bytearray(newest.read_bytes())
    altered[len(altered) // 2] ^= 1
    newest.write_bytes(altered)
    fit(Run.open(config(stores["jpeg"], run_dir)))
    said = capsys.readouterr().err
    assert f"{newest}: torn, altered" in said and "resumes after step 8" in said
    same_result(run_dir, whole_run)


def test_a_checkpoint_of_the_format_before_is_told_from_a_torn_one(tmp_path: Path) -> None:
    torch.save({"format": 1, "step": 1}, tmp_path / "checkpoint-00000001.pt")
    with pytest.raises(UserError, match="checkpoint format 1, this program reads 2"):
        checkpoint.load_latest(tmp_path)


def test_a_checkpoint_is_a_zip_whose_comment_is_the_digest_of_what_is_before_it(whole_run: Path) -> None:  # noqa: F811
    """By zipfile and hashlib alone; torch loads it without anything but weights."""
    import hashlib
    import zipfile

    path = checkpoint_paths(whole_run)[-1]
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
        assert archive.testzip() is None
    data = path.read_bytes()
    assert comment == b"sha256:" + hashlib.sha256(data[: -len(comment)]).hexdigest().encode()
    state = torch.load(path, weights_only=True)
    assert {"parameters", "velocity", "schedule", "random", "stream", "recipe", "model", "classes"} <= set(state)
    assert state["environment"]["torch"] == torch.__version__ and state["recipe"]["sources"]["lr"]
    assert state["identity"]["store_fingerprint"]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_and_the_best_are_kept(stores: dict[str, Path], tmp_path: Path, keep: int) -> None:
    run_dir = fit(Run.open(config(stores["ppm"], tmp_path / "run", keep=keep, epochs=4)))
    assert [path.name[-5:-3] for path in checkpoint_paths(run_dir)] == ["09", "10", "12"][-keep:]
    errors = {line["step"]: line["top1_error"] for line in metrics(run_dir) if line["kind"] == "val"}
    best = min(errors, key=errors.__getitem__)  # the first of equal ones
    for state in (checkpoint.load(run_dir, "best"), load_trained(run_dir, ("cpu", "cpu"), "best").checkpoint):
        assert state.step == best
    assert checkpoint.load(run_dir).best == {"step": best, "top1_error": errors[best]}
    assert checkpoint.load(run_dir, str(run_dir / BEST)).step == best
    assert checkpoint.load(run_dir, "checkpoint-00000012.pt").step == 12
    (run_dir / "run.json").unlink()
    model, state = load_trained(run_dir / BEST, ("cpu", "cpu"))  # which needs nothing beside it
    assert model.architecture == SMALL and state.step == best and len(state.classes) == 3


def test_best_follows_the_error_and_is_said_where_it_is_not_there(tmp_path: Path) -> None:
    keeper = checkpoint.CheckpointKeeper(tmp_path, 1, None)
    with pytest.raises(UserError, match="no checkpoint of the run has been validated"):
        checkpoint.load(tmp_path, "best")
    for step, error in ((1, 0.5), (2, 0.7), (3, 0.4), (4, 0.4), (5, 0.9)):
        keeper.save(empty_checkpoint(step), is_last=False)
        keeper.record_validation(step, error)
    assert checkpoint.load(tmp_path, "best").step == 3
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["checkpoint-00000005.pt"]
    keeper.record_validation(5, 0.1)
    keeper.save(empty_checkpoint(5, steps_per_epoch=77), is_last=True)
    assert checkpoint.load(tmp_path, "best").steps_per_epoch == 77
    with pytest.raises(UserError, match=r"--checkpoint other: no such file"):
        checkpoint.load(tmp_path, "other")


def test_best_is_kept_where_files_have_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*of: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    keeper = checkpoint.CheckpointKeeper(tmp_path, 1, None)
    keeper.save(empty_checkpoint(1), is_last=False)
    keeper.record_validation(1, 0.5)
    assert checkpoint.load(tmp_path, "best").step == 1


def test_what_a_kill_left_undone_after_a_checkpoint_is_done_when_the_run_is_given_again(tmp_path: Path) -> None:
    """A run killed as it ended: nothing is saved again, yet best.pt and the number of checkpoints are right."""
    keeper = checkpoint.CheckpointKeeper(tmp_path, 3, None)
    for step in (1, 2, 3):
        keeper.save(empty_checkpoint(step), is_last=False)
    (tmp_path / BEST).write_bytes(b"an older one")
    (tmp_path / ".run.json.77.tmp").write_text("{")
    ended = empty_checkpoint(3, best={"step": 3, "top1_error": 0.5})
    checkpoint.CheckpointKeeper(tmp_path, 2, ended)
    assert [path.name[-4:-3] for path in checkpoint_paths(tmp_path)] == ["2", "3"] and not list(tmp_path.glob(".*"))
    assert checkpoint.load(tmp_path, "best").step == 3
    checkpoint.CheckpointKeeper(tmp_path, 2, replace(ended, best={"step": 2, "top1_error": 0.5}))
    assert checkpoint.load(tmp_path, "best").step == 3


def test_a_checkpoint_of_another_step_than_its_name_is_refused_and_others_files_are_left(tmp_path: Path) -> None:
    paths = [checkpoint.write(tmp_path, empty_checkpoint(step)) for step in (3, 4)]
    for name in ("checkpoint-mine.pt", "checkpoint-00000004 (copy).pt"):
        shutil.copy(paths[0], tmp_path / name)
    assert checkpoint_paths(tmp_path) == paths and checkpoint.load(tmp_path).step == 4
    (tmp_path / "checkpoint-00000005.pt").symlink_to("nowhere")
    assert checkpoint.load(tmp_path).step == 4
    shutil.copy(paths[0], tmp_path / "checkpoint-00000009.pt")
    with pytest.raises(
        UserError, match=r"00000009\.pt: is of step 3\. Name it checkpoint-00000003\.pt, or move it away"
    ):
        checkpoint.load(tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("_digests", PermissionError(13, "Permission denied"), r"00000002\.pt: cannot be read \(Permission denied\)"),
        ("torch.load", RuntimeError("can't allocate memory"), "can't allocate memory"),
    ],
)
def test_a_whole_checkpoint_that_cannot_be_read_now_is_not_taken_for_a_torn_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception, said: str
) -> None:
    """The one before it would be used, and this one removed."""

    def fail(*of: object, **more: object) -> None:
        raise error

    for step in (1, 2):
        checkpoint.write(tmp_path, empty_checkpoint(step))
    monkeypatch.setattr(f"train.runs.checkpoint.{where}", fail)
    with pytest.raises((UserError, RuntimeError), match=said) as told:
        checkpoint.load_latest(tmp_path)
    assert not isinstance(told.value, UnreadableCheckpoint)


def test_a_checkpoint_that_the_run_removes_before_it_is_read_is_not_taken_for_a_torn_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keeper = checkpoint.CheckpointKeeper(tmp_path, 1, None)
    keeper.save(empty_checkpoint(1), is_last=False)

    def read_late(path: Path) -> Checkpoint:
        if path.name.endswith("1.pt"):
            keeper.save(empty_checkpoint(2), is_last=False)
        return read(path)

    monkeypatch.setattr(checkpoint, "read", read_late)
    assert checkpoint.load(tmp_path).step == 2 and capsys.readouterr().err == ""


def test_lines_are_on_the_disk_before_their_checkpoint_and_that_before_the_last_is_removed(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut at any moment finds a checkpoint, and every line before it."""
    doings: list[str] = []

    def told(what: str, real: Any) -> Any:
        def call(thing: Any, *more: Any) -> Any:
            name = os.readlink(f"/proc/self/fd/{thing}") if isinstance(thing, int) else (more or (thing,))[-1]
            doings.append(f"{what} {os.path.basename(name)}")
            return real(thing, *more)

        return call

    for what in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, what, told(what, getattr(os, what)))
    run_dir = fit(Run.open(config(stores["ppm"], tmp_path / "run", steps=2, checkpoint_every=1, keep=1)))
    monkeypatch.undo()
    one, two = "checkpoint-00000001.pt", "checkpoint-00000002.pt"
    wanted = ["fsync metrics.jsonl", f"fsync .{two}.tmp", f"replace {two}", f"fsync {run_dir.name}", f"unlink {one}"]
    found = [doing for doing in doings if doing in wanted]
    last = len(found) - 1 - found[::-1].index(wanted[0])
    assert found[last : last + len(wanted)] == wanted


# ---------------------------------------------------------------- full disks


@contextmanager
def files_up_to(bytes_: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_borne_until_it_has_room_again(
    stores: dict[str, Path],
    whole_run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From step 3 to 5 files may have as many bytes as metrics.jsonl had: neither lines nor checkpoints fit."""
    run_dir, log_line, room = tmp_path / "run", MetricsLog.train, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self: MetricsLog, line: dict[str, Any]) -> None:
        if line["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.path.stat().st_size + 30, room[1]))
        if line["step"] == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, room)
        log_line(self, line)

    monkeypatch.setattr(MetricsLog, "train", fill)
    try:
        fit(Run.open(config(stores["jpeg"], run_dir)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    said = capsys.readouterr().err
    assert said.count("Warning: ") == 2 and "failure 2 of 3" in said
    same_result(run_dir, whole_run)


def test_a_disk_that_stays_full_ends_the_run_with_3_and_costs_nothing_before(
    stores: dict[str, Path],
    whole_run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = fit(Run.open(config(stores["jpeg"], tmp_path / "run", steps=2)))
    with (
        files_up_to(60_000),
        pytest.raises(DiskFull, match=r"00000006\.pt: cannot be written \(File too large\)") as end,
    ):
        fit(Run.open(config(stores["jpeg"], run_dir)))
    assert end.value.exit_code == 3 and capsys.readouterr().err.count("Warning: ") == 2
    assert [path.name[-5:-3] for path in checkpoint_paths(run_dir)] == ["02"] and not list(run_dir.glob(".*.tmp"))
    fit(Run.open(config(stores["jpeg"], run_dir)))
    same_result(run_dir, whole_run)


def test_three_failures_end_a_run_only_in_a_row_and_no_checkpoint_is_written_over_missing_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise DiskFull("metrics.jsonl: cannot be written.")

    keeper = checkpoint.CheckpointKeeper(tmp_path, 2, None)
    for step in (1, 2, 4, 5):
        keeper.save(empty_checkpoint(step), is_last=False, before=full)
        if step == 2:
            keeper.save(empty_checkpoint(3), is_last=False)
    assert [path.name[-4:-3] for path in checkpoint_paths(tmp_path)] == ["3"]
    assert capsys.readouterr().err.count("Warning: metrics.jsonl") == 4
    with pytest.raises(DiskFull):
        keeper.save(empty_checkpoint(6), is_last=False, before=full)


def test_the_last_checkpoint_of_a_run_is_worth_an_error(stores: dict[str, Path], tmp_path: Path) -> None:
    with files_up_to(60_000), pytest.raises(DiskFull):
        fit(Run.open(config(stores["ppm"], tmp_path / "run", steps=2)))


@pytest.mark.parametrize("ends", ["by a signal", "after a validation"])
def test_a_full_disk_is_an_error_where_a_stop_wants_a_checkpoint_and_none_before_the_last_validation(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    log_line, validated, room = MetricsLog.train, MetricsLog.validation, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self: MetricsLog, line: dict[str, Any]) -> None:
        log_line(self, line)
        if line["step"] == (1 if ends == "by a signal" else 3):
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, room[1]))
            if ends == "by a signal":
                os.kill(os.getpid(), signal.SIGTERM)

    def make_room(self: MetricsLog, *of: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
        validated(self, *of)

    monkeypatch.setattr(MetricsLog, "train", fill)
    monkeypatch.setattr(MetricsLog, "validation", make_room)
    plan = config(stores["ppm"], tmp_path / "run", steps=3, checkpoint_every=100)
    try:
        with pytest.raises(DiskFull) if ends == "by a signal" else nullcontext():
            fit(Run.open(plan))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    steps = [path.name[-5:-3] for path in checkpoint_paths(plan.run_dir)]
    assert steps == ([] if ends == "by a signal" else ["03"])


def test_a_full_disk_has_its_exit_code_though_standard_error_goes_there_too() -> None:
    script = (
        "import click\nfrom prep.console import DiskFull, Group, say\n"
        "@click.group(cls=Group)\ndef main(): pass\n"
        "@main.command()\ndef run():\n    say('on the way')\n    raise DiskFull('no room')\nmain()"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", script, "run"], stderr=full, check=False)
    assert ended.returncode == 3


# ---------------------------------------------------------------- forks


def test_a_fork_without_changes_is_the_same_run(stores: dict[str, Path], whole_run: Path, tmp_path: Path) -> None:  # noqa: F811
    origin = fit(Run.open(config(stores["jpeg"], tmp_path / "run", steps=4)))
    forked = fork(Run.open(config(stores["jpeg"], origin)), tmp_path / "fork")
    fit(forked)
    assert metrics(tmp_path / "fork") == metrics(whole_run)[5:]  # 4 steps and a validation
    one, two = checkpoint.load(tmp_path / "fork"), checkpoint.load(whole_run)
    assert all(torch.equal(tensor, two.parameters[name]) for name, tensor in one.parameters.items())
    (ancestor,) = json.loads((tmp_path / "fork" / "run.json").read_text())["ancestry"]
    assert (ancestor["path"], ancestor["step"], ancestor["differences"]) == (str(origin), 4, [])
    assert ancestor["checkpoint_digest"] == read(checkpoint_paths(origin)[-1]).digest


def test_a_fork_changes_settings_goes_on_and_tells_where_it_came_from(stores: dict[str, Path], tmp_path: Path) -> None:
    origin = fit(Run.open(config(stores["ppm"], tmp_path / "run", steps=4)))
    changed = replace(
        config(stores["ppm"], origin), batch_size=4, seed=5, recipe=replace(SHORT, dropout=0.25, schedule=())
    )
    state = checkpoint.load(origin)
    checkpoint.write(origin, replace(state, schedule={**state.schedule, "drops": 2}))
    fork(Run.open(config(stores["ppm"], origin, seed=5)), tmp_path / "other")
    assert checkpoint.load(tmp_path / "other").schedule["drops"] == 2  # of the same schedule
    first = fork(Run.open(changed), tmp_path / "fork")
    assert checkpoint.load(first.run_dir).schedule["drops"] == 0
    assert checkpoint.load(first.run_dir).step == 9  # 4 of 3 an epoch: an epoch and a third; 7 an epoch of half
    fit(Run.open(replace(first.config, steps=12)))
    again = fork(Run.open(changed), tmp_path / "fork")  # the same command again: it goes on
    fit(again)
    lines = [line for line in metrics(first.run_dir) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(10, 22)) and lines[0]["epoch"] == pytest.approx(10 / 7)
    about = json.loads((first.run_dir / "run.json").read_text())
    assert checkpoint.load(first.run_dir).ancestry == about["ancestry"]
    found = {d["name"]: (d["there"], d["here"]) for d in about["ancestry"][0]["differences"]}
    plan = [{"after_epochs": 1.5, "lr": 0.002, "lr_conv1": None, "colour": None}]
    assert found == {
        "recipe.dropout": (0.5, 0.25),
        "recipe.schedule": (plan, []),
        "batch_size": (8, 4),
        "seed": (3, 5),
    }
    fork(Run.open(replace(changed, run_dir=first.run_dir)), tmp_path / "second")
    came = json.loads((tmp_path / "second" / "run.json").read_text())["ancestry"]
    assert [ancestor["path"] for ancestor in came] == [str(origin), str(first.run_dir)]
    with pytest.raises(UserError, match=rf"a run that began with {origin}, not with {tmp_path / 'second'}"):
        fork(Run.open(replace(changed, run_dir=tmp_path / "second")), first.run_dir)
    with pytest.raises(UserError, match="another batch size"):
        fit(Run.open(replace(first.config, batch_size=8)))
    wider = replace(SMALL, widths=replace(SMALL.widths, fc7=18))
    with pytest.raises(UserError, match=r"fc7\.weight has shape \(16, 16\) in the checkpoint, \(18, 16\)"):
        fork(Run.open(replace(changed, model=wider)), tmp_path / "third")
    with pytest.raises(UserError, match="that is --run-dir itself"):
        fork(Run.open(changed), origin)
    with pytest.raises(UserError, match="no such run to fork"):
        fork(Run.open(replace(changed, run_dir=tmp_path / "nowhere")), tmp_path / "third")


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_command_ends_with_the_code_of_its_signal_and_a_checkpoint(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    before, log_line = signal.getsignal(signal.SIGTERM), MetricsLog.train
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    def signalled(self: MetricsLog, line: dict[str, Any]) -> None:
        log_line(self, line)
        if line["step"] == 1:  # a second signal would be obeyed at once
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(MetricsLog, "train", signalled)
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL)
    words = ["--store", str(store), "--run-dir", str(tmp_path / "run"), "--gpus", "cpu", "--recipe", "short"]
    try:
        ended = CliRunner().invoke(
            train.cli.main, ["run", *words, "--batch", "8", "--accumulate", "2", "--log-every", "1", "--keep", "1"]
        )
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, hung_up)
    assert ended.exit_code == code, ended.output
    assert "batch 8 in 2 parts" in ended.stderr and "to continue from here" in ended.stderr
    assert checkpoint.load(tmp_path / "run").step == 2  # the step that was under way
    monkeypatch.undo()
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL)
    ended = CliRunner().invoke(train.cli.main, ["run", *words, "--batch", "8", "--accumulate", "2", "--dry-run"])
    assert ended.exit_code == 0 and "run: would resume after step 2." in ended.stderr
    refused = CliRunner().invoke(train.cli.main, ["run", *words, "--batch", "4", "--dry-run"])
    assert refused.exit_code == 1 and "another batch size (8, here 4)" in refused.stderr
    fork_words = ["--batch", "8", "--fork", str(tmp_path / "fork"), "--epochs", "1"]
    ended = CliRunner().invoke(train.cli.main, ["run", *words, *fork_words, "--dry-run"])
    assert ended.exit_code == 0 and not (tmp_path / "fork").exists()
    assert f"into {tmp_path / 'fork'}" in ended.stderr and "run after step 2." in ended.stderr
    ended = CliRunner().invoke(train.cli.main, ["run", *words, *fork_words])
    assert ended.exit_code == 0, ended.output
    assert "begins with" in ended.stderr and "1 difference: accumulate" in ended.stderr
    assert checkpoint.load(tmp_path / "fork").step == 3 and checkpoint.load(tmp_path / "run").step == 2


@pytest.mark.parametrize("where", ["a pipe that nobody reads", "a full disk"])
def test_a_run_that_no_one_hears_still_ends_with_a_checkpoint(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """`alextrain run 2>&1 | tee log`, and Ctrl-C, which ends tee first; or a log on the disk that is full."""
    log_line, (reads, writes) = MetricsLog.train, os.pipe()
    os.close(reads)
    stderr = os.fdopen(os.open("/dev/full", os.O_WRONLY) if where == "a full disk" else os.dup(writes), "w")
    os.close(writes)

    def interrupted(self: MetricsLog, line: dict[str, Any]) -> None:
        if line["step"] == 1:
            monkeypatch.setattr(sys, "stderr", stderr)
            os.kill(os.getpid(), signal.SIGINT)
        log_line(self, line)

    monkeypatch.setattr(MetricsLog, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(Run.open(config(stores["ppm"], tmp_path / "run")))
    monkeypatch.undo()
    with suppress(OSError):
        stderr.close()
    assert checkpoint.load(tmp_path / "run").step == 2


def test_parts_that_do_not_divide_a_batch_are_refused(store: Path, tmp_path: Path) -> None:
    plan = RunConfig(store, SHORT, 8, accumulate=3, run_dir=tmp_path / "run")
    with pytest.raises(
        UserError, match=r"a batch of 8 cannot be divided into that many equal parts\. Give one of 1, 2, 4, 8"
    ):
        fit(Run.open(plan))
    assert not (tmp_path / "run").exists()
