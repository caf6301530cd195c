"""Tests of `alextrain run --members` and of the commands that read the folder of an ensemble."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import train.experiments.ensemble
from prep.console import UserError
from tests.helpers.alextrain import alextrain, json_lines, refusal
from tests.helpers.small_training import SMALL_ALEXNET, small_config
from train.config.architecture import ARCHITECTURES
from train.evaluation.paper_table import paper_row
from train.evaluation.predictions import load_predictions
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.out_of_memory import out_of_memory


@pytest.fixture(autouse=True, scope="module")
def small_alexnet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)
        yield


def run_words(store: Path, run_dir: Path) -> list[object]:
    words = ["run", "--store", store, "--run-dir", run_dir, "--gpus", "cpu", "--recipe", "short", "--batch", "10"]
    return [*words, "--steps", "2", "--seed", "7", "--log-every", "1"]


@pytest.fixture(scope="module")
def ensemble(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of two networks that were trained for two steps. A test must not write into the ensemble's folder."""
    folder = tmp_path_factory.mktemp("members") / "pair"
    (result,) = json_lines(*run_words(store, folder), "--members", "2")
    assert result["run_dir"] == str(folder) and "val" not in result
    assert [member["seed"] for member in result["members"]] == [8, 9]
    assert [member["run_dir"] for member in result["members"]] == [str(folder / f"member-{k}") for k in (1, 2)]
    assert [member["train"]["step"] for member in result["members"]] == [2, 2]
    return folder


def test_evaluate_averages_the_members_of_an_ensemble(ensemble: Path, store: Path, tmp_path: Path) -> None:
    words = ("evaluate", ensemble, "--store", store, "--views", "1")
    (average,) = json_lines(*words, "--out", tmp_path / "pair.npz")
    probabilities = []
    for number in (1, 2):
        out = tmp_path / f"{number}.npz"
        (alone,) = json_lines("evaluate", ensemble / f"member-{number}", *words[2:], "--out", out)
        assert average["members"][number - 1] == alone
        probabilities.append(load_predictions(out).probabilities.astype(float))
    assert not np.array_equal(*probabilities)
    mean, saved = sum(probabilities) / 2, load_predictions(tmp_path / "pair.npz")
    np.testing.assert_allclose(saved.probabilities, mean, atol=1e-6)
    of_label = mean[np.arange(12), saved.labels]
    assert average["top1_misses"] == (mean.argmax(1) != saved.labels).sum()
    assert average["loss"] == pytest.approx(-np.log(of_label).mean(), rel=1e-5)
    result = alextrain(*words, "--weights", "3,1")
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        *("member-1", "member-2"),
        "2 CNNs, average of 2, weights 3,1",
    ]
    assert "expected 2 numbers" in refusal(*words, "--weights", "1,1,1", code=2)


def test_the_rows_of_the_papers_table_are_shown_only_for_its_data_and_views() -> None:
    """The values are the validation errors in table 2 of Krizhevsky, Sutskever and Hinton (2012)."""
    rows = {networks: paper_row(networks, 1000, 10, "val") for networks in (1, 2, 5, 7)}
    errors = {networks: row and (row.top1_error, row.top5_error) for networks, row in rows.items()}
    assert errors == {1: (0.407, 0.182), 2: None, 5: (0.381, 0.164), 7: (0.367, 0.154)}
    assert paper_row(5, 1000, 1, "val") is paper_row(5, 100, 10, "val") is paper_row(5, 1000, 10, "test") is None
    assert rows[7] is not None and "does not train such networks" in rows[7].text()


def test_an_ensemble_goes_on_from_its_folder_alone_and_can_be_forked(ensemble: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ensemble, tmp_path / "pair"))
    words = ("run", "--run-dir", folder)
    again = alextrain(*words)
    assert "0 steps trained, summed over 2 networks" in again.stderr and "2 networks with seeds 8 to 9" in again.stderr
    assert alextrain(*words, "--fork", tmp_path / "fork", "--steps", "3", "--one-at-a-time", "-q").exit_code == 0
    for number in (1, 2):
        state = checkpoint.load(tmp_path / "fork" / f"member-{number}")
        assert state.step == 3 and state.ancestry[0]["path"] == str(folder / f"member-{number}")
        assert (state.identity["seed"], state.identity["stream_seed"]) == (7 + number, 7)
    shown = alextrain(*words, "--members", "3", "--steps", "3", "--dry-run").stderr.splitlines()
    assert shown[-3:] == [
        f"{folder / 'member-1'}: would resume after step 2.",
        f"{folder / 'member-2'}: would resume after step 2.",
        f"{folder / 'member-3'}: would begin at step 0.",
    ]
    assert not (folder / "member-3").exists()
    shutil.rmtree(folder / "member-2")
    error = refusal("evaluate", folder)
    assert f"{folder / 'member-2'}: the training of this member has not begun" in error
    assert f"alextrain run --run-dir {folder}. " in error


@pytest.mark.parametrize("text", [None, "", '{"members": 2', "[]", '{"members": true, "seed": 7, "stream_seed": 7}'])
def test_a_missing_or_damaged_ensemble_json_is_written_again(
    ensemble: Path, store: Path, tmp_path: Path, text: str | None
) -> None:
    folder = Path(shutil.copytree(ensemble, tmp_path / "pair"))
    path, good = folder / "ensemble.json", (ensemble / "ensemble.json").read_text()
    path.unlink() if text is None else path.write_text(text)
    for command in ("status", "evaluate", "run"):
        words = ("run", "--run-dir") if command == "run" else (command,)
        error = refusal(*words, folder)
        assert f"{path}: " in error and "repeat the alextrain run command with --members, and" in error
    words = run_words(store, folder)
    assert (
        "member-1 was trained with another seed (8, here 1)"
        in alextrain(*words, "--members", "2", "--seed", "0").stderr
    )
    (folder / "member-3").mkdir()
    assert "holds member-3. Pass --members 3, or move" in refusal(*words, "--members", "2", "-q")
    (folder / "member-3").rmdir()
    assert alextrain(*words, "--members", "2", "-n").exit_code == 0
    assert not path.exists() if text is None else path.read_text() == text
    assert "0 steps trained, summed over 2 networks" in alextrain(*words, "--members", "2").stderr
    assert path.read_text() == good


def test_a_command_that_is_refused_does_not_change_ensemble_json(ensemble: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "pair", tmp_path / "other"
    for path in (folder, other):
        shutil.copytree(ensemble, path)
    seeds = json.dumps({"members": 3, "seed": 20, "stream_seed": 7})
    (other / "ensemble.json").write_text(seeds)
    words = ("run", "--run-dir", folder)
    for more in ([], ["--dry-run"]):
        assert "another batch size (10, here 5)" in alextrain(*words, "--members", "3", "--batch", "5", *more).stderr
        expected = (
            f"{other} holds another ensemble (3 networks, seed 20, stream seed 7; here 2 networks, seed 7, stream"
        )
        assert expected in alextrain(*words, "--fork", other, *more).stderr
    assert (folder / "ensemble.json").read_text() == (ensemble / "ensemble.json").read_text()
    assert (other / "ensemble.json").read_text() == seeds


def test_an_ensemble_is_forked_although_a_kill_ended_the_command_between_two_members(
    ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_dir = tmp_path / "fork"
    words = ("run", "--run-dir", ensemble, "--fork", new_dir, "--set", "lr=0.001", "--steps", "3", "-q")
    fork = train.experiments.ensemble.fork

    def fork_first(run: Run, folder: Path) -> Run:
        if folder.name == "member-2":
            raise KeyboardInterrupt
        return fork(run, folder)

    with monkeypatch.context() as patch:
        patch.setattr("train.experiments.ensemble.fork", fork_first)
        assert alextrain(*words).exit_code != 0
    # Without --fork, member 2 would begin at step 0, so the command is refused.
    assert "cannot be read" in refusal("run", "--run-dir", new_dir)
    assert alextrain(*words).exit_code == 0
    assert [checkpoint.load(new_dir / f"member-{k}").ancestry[0]["step"] for k in (1, 2)] == [2, 2]


def test_member_folders_that_are_missing_or_copies_are_noticed(ensemble: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ensemble, tmp_path / "pair"))
    shutil.rmtree(folder / "member-2")
    shutil.copytree(folder / "member-1", folder / "member-2")
    for command in (["run", "--run-dir"], ["evaluate"]):
        assert "member-2" in (error := alextrain(*command, folder).stderr) and "trained with" in error
    shutil.rmtree(folder / "member-1")
    shutil.rmtree(folder / "member-2")
    shutil.copytree(ensemble / "member-2", folder / "member-2")
    (folder / "member-1").mkdir()  # a kill before run.json is written leaves such a folder
    (status,) = json_lines("status", folder)
    assert [member["state"] for member in status["members"]] == ["new", "finished"]
    # Member 1 gets the settings of member 2.
    assert "2 steps trained, summed over 2 networks" in alextrain("run", "--run-dir", folder).stderr
    states = [checkpoint.load(path / "member-1") for path in (folder, ensemble)]
    assert states[0].identity == states[1].identity and torch.equal(*(s.parameters["fc8.weight"] for s in states))


def test_status_and_compare_list_the_members(ensemble: Path, tmp_path: Path) -> None:
    (status,) = json_lines("status", ensemble)
    assert status["finished"] and [member["seed"] for member in status["members"]] == [8, 9]
    assert (status["seed"], status["stream_seed"], status["state"]) == (7, 7, "finished")
    lines = alextrain("status", ensemble).stdout.splitlines()
    assert lines[0] == f"{ensemble}: ensemble of 2 networks: 2 finished"
    assert [line.partition(",")[0] for line in lines[2:]] == ["member-1: finished", "member-2: finished"]
    (comparison,) = json_lines("compare", ensemble, "--out", tmp_path / "curves.png")
    assert "member-2" in json.dumps(comparison)


def test_what_does_not_fit_an_ensemble_is_refused_with_what_to_do(
    ensemble: Path, small_run: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ("run", "--run-dir", ensemble)
    for command in (["report"], ["figures"], ["export", "--to", "safetensors"], ["features"]):
        error = refusal(*command, ensemble)
        assert "an ensemble of 2 networks, not a single run" in error and f"such as {ensemble}/member-1." in error
    fork = ("--members", "3", "--fork", tmp_path / "x")
    assert "has 2 networks. Pass --members 2, or omit" in refusal(*pair, *fork, code=2)
    assert "--seed 8: the ensemble in" in refusal(*pair, "--seed", "8")
    assert "--stream-seed 8: the ensemble in" in refusal(*pair, "--stream-seed", "8")
    assert "is not in the range 2<=x<=1000" in alextrain(*pair, "--members", "99999999999", "-n").stderr
    assert "holds a single run" in refusal("run", "--run-dir", small_run, "--members", "2")
    assert "holds no ensemble to fork" in refusal("run", "--run-dir", small_run, *fork)
    assert "Pass --members N" in refusal("run", "--run-dir", tmp_path / "new", "--one-at-a-time", code=2)
    (tmp_path / "file").write_text("x")
    assert "files but no ensemble" in refusal(*run_words(store, tmp_path), "--members", "2", "-q")
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    error = refusal(*pair, "--members", "2", code=2)
    assert "cannot train an ensemble together" in error and "--seed 8 --stream-seed 7 --run-dir" in error


def test_out_of_memory_names_the_option_that_trains_the_members_by_turns(tmp_path: Path) -> None:
    expected = r"Pass --one-at-a-time \(the 5 networks are trained one after another\), or --accumulate"
    with pytest.raises(UserError, match=expected), out_of_memory(small_config(tmp_path, tmp_path), 5):
        raise MemoryError
