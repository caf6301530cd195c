"""Damaged files in a run folder give an error of one line that names the file and the field. No command hangs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prep.console import UserError
from tests.helpers.alextrain import alextrain, refusal
from tests.helpers.metrics import training_line, validation_line
from tests.helpers.small_training import SMALL_ALEXNET, tiny_description
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.evaluation.evaluate import EvalResult
from train.evaluation.predictions import Predictions, load_predictions, read_evaluations, record_evaluation
from train.monitor.tensorboard import EventFile
from train.runs.ensemble_dir import read_ensemble
from train.runs.run import Run
from train.runs.run_dir import read_description, read_metrics, tensorboard_scalars
from train.runs.status import status_of
from train.trainer.loop import fit

STATUS = {"state": "finished", "said": "", "step": 3, "process": 7, "host": "far", "unix_time_s": 1.0}
EVALUATION: dict[str, Any] = {
    **{"step": 3, "split": "val", "split_fingerprint": "f" * 64, "views": 10, "precision": "fp32"},
    **{"top1_error": 0.5, "top5_error": 0.25, "loss": 1.5, "images": 12},
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with valid files."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(tiny_description()))
    (folder / "status.json").write_text(json.dumps(STATUS))
    write_lines(folder / "metrics.jsonl", training_line(10), validation_line(1, 0.5))
    write_lines(folder / "evaluations.jsonl", EVALUATION)
    return folder


def write_lines(path: Path, *lines: object) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def changed(data: Any, path: str, value: object) -> Any:
    """Return `data` with another value at a dotted path. The value "delete" removes the field."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    copy = json.loads(json.dumps(data))
    target = copy
    for part in parents:
        target = target[part]
    if value == "delete":
        del target[last]
    else:
        target[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("identity.seed", "x", "an integer"),
        ("identity.classes", 3, "2, as in the other fields"),
        ("settings.devices", ["cpu"], "an array of 2 values"),
        ("settings.devices.0", "tpu", "cpu, or cuda"),
        ("settings.store", "a\0b", "a path without NUL"),
        ("settings.batch_size", 10**30, "an integer"),
        ("settings.seed", 4, "0, as in identity"),
        ("settings.threads", 10**9, "4,096"),
        ("model.widths.fc6", 1_000_000, "16,384"),
        ("model.columns", 3, "1 or 2"),
        ("recipe.lr", "delete", "no field lr"),
        ("recipe.lr", float("inf"), "JSON"),
        ("recipe.dropout", 1, "less than 1"),
        ("recipe.other", 1, "unknown field"),
        ("recipe.schedule", {"factor": 2.0, "patience_epochs": 1, "drops": 1}, "factor 2.0"),
        ("store.colour.mean_rgb", [1, 2], "3 values"),
        ("store.settings.side_px", -1, "an integer of at least 1"),
        ("store.splits.train.label_counts", [40, 41], "the sum 80"),
        ("length.steps", None, "an integer"),
        ("environment", [], "an object"),
        ("ancestry", [{}], "no field"),
        ("classes", ["a", "\ud800"], "JSON"),
    ],
)
def test_a_wrong_field_of_run_json_is_named_with_its_value(
    run_dir: Path, path: str, value: object, expected: str
) -> None:
    (run_dir / "run.json").write_text(json.dumps(changed(tiny_description(), path, value)))
    with pytest.raises(UserError) as raised:
        read_description(run_dir)
    text = str(raised.value)
    assert text.startswith(f"{run_dir}/run.json: ") and expected in text and "\n" not in text
    assert expected == "JSON" or path.partition(".")[0] in text


def test_settings_of_another_version_are_kept(run_dir: Path) -> None:
    description = changed(tiny_description(), "settings.newer", {"a": [1]})
    (run_dir / "run.json").write_text(json.dumps(description))
    assert read_description(run_dir)["settings"]["newer"] == {"a": [1]}


def test_a_run_may_be_longer_than_it_can_ever_be_trained(run_dir: Path) -> None:
    """With `--epochs 2147483648`, the run goes on until the user stops it.

    Version 0.1.0 did not limit options such as --epochs and --checkpoint-every, so older runs may have such settings.
    """
    description = changed(tiny_description(), "settings.epochs", 10**10)
    description = changed(description, "settings.checkpoint_every", 10**12)
    steps = {"steps_per_epoch": 10_009, "steps": 10_009 * 2**31}  # an epoch of ImageNet has 10,009 steps of 128 images
    (run_dir / "run.json").write_text(json.dumps(changed(description, "length", steps)))
    assert read_description(run_dir)["length"] == steps


DAMAGED: dict[str, tuple[bytes, str]] = {
    "broken UTF-8": (b'{"kind": "\xff"}\n', "UTF-8"),
    "nested": (b"[" * 10_000 + b"]" * 10_000 + b"\n", "nested"),
    "cut in the middle": (b'{"kind": "tra\n{}\n', "cannot be read as JSON"),
    "list": (b"[]\n", "expected an object"),
    "another kind": (b'{"kind": "test", "step": 1, "views": 3}\n', "expected"),
    "large number": (b'{"kind": "train", "step": ' + b"9" * 5000 + b"}\n", "line"),
    "zeros": (b"\0" * 100 + b"\n", "cannot be read as JSON"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_a_damaged_line_is_named_with_its_number(run_dir: Path, name: str, damage: str) -> None:
    content, expected = DAMAGED[damage]
    path = run_dir / name
    with open(path, "ab") as file:
        file.write(content)
    number = 3 if name == "metrics.jsonl" else 2
    with pytest.raises(UserError, match=expected) as raised:
        read_metrics(run_dir) if name == "metrics.jsonl" else read_evaluations(run_dir)
    assert str(raised.value).startswith(f"{path}: line {number}") and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss", None),
        ("top1_error", 2),
        ("images_per_s", 0),
        ("gradient_norm", {"a\nb": 1.0}),
        ("gradient_norm", {"conv1": 1.0, "a\nb": 1.0}),
        ("weight_norm", {"conv1": "1"}),
        ("weight_norm", [1.0]),
        ("step", "delete"),
    ],
)
def test_a_wrong_field_of_metrics_is_named(run_dir: Path, field: str, value: object) -> None:
    write_lines(run_dir / "metrics.jsonl", changed(training_line(10), field, value))
    error = refusal("status", run_dir)
    assert "metrics.jsonl: line 1: " in error and field in error


def test_norms_of_layers_that_alexnet_does_not_have_are_read(run_dir: Path) -> None:
    norms = {"conv1": 1.0, "fc9.other": 2.0}
    write_lines(run_dir / "metrics.jsonl", {**training_line(10), "weight_norm": norms})
    assert read_metrics(run_dir)[0]["weight_norm"] == norms


def test_a_loss_of_nan_is_read_and_a_number_too_large_for_tensorboard_is_left_out(run_dir: Path) -> None:
    line = {**validation_line(1, 0.5), "loss": float("nan"), "large": 10**400}
    write_lines(run_dir / "metrics.jsonl", line)
    (read,) = read_metrics(run_dir)
    assert np.isnan(read["loss"]) and "val/large" not in tensorboard_scalars(read)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({**STATUS, "state": "resting"}, "state"),
        ({k: v for k, v in STATUS.items() if k != "said"}, "said"),
        ([], "an object"),
    ],
)
def test_a_damaged_status_is_refused(run_dir: Path, value: object, expected: str) -> None:
    (run_dir / "status.json").write_text(json.dumps(value))
    error = refusal("status", run_dir)
    assert "status.json: " in error and expected in error and "Remove this file" in error


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["named pipe", "folder"])
def test_a_named_pipe_or_folder_in_place_of_a_file_does_not_hang(run_dir: Path, make: Callable[[Path], None]) -> None:
    readers: dict[str, Callable[[], object]] = {
        "run.json": lambda: read_description(run_dir),
        "status.json": lambda: status_of(run_dir),
        "metrics.jsonl": lambda: read_metrics(run_dir),
        "evaluations.jsonl": lambda: read_evaluations(run_dir),
        "ensemble.json": lambda: read_ensemble(run_dir),
        "scores.npz": lambda: load_predictions(run_dir / "scores.npz"),
    }
    for name, read in readers.items():
        path = run_dir / name
        before = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(UserError, match="expected a regular file"):
            read()
        path.unlink() if path.is_fifo() else path.rmdir()
        if before is not None:
            path.write_bytes(before)


def test_a_line_that_a_power_cut_left_is_removed_before_the_next_evaluation(run_dir: Path) -> None:
    with open(run_dir / "evaluations.jsonl", "a") as file:
        file.write('{"step": 4, "spl')
    assert len(read_evaluations(run_dir)) == 1
    record_evaluation(run_dir, {**EVALUATION, "step": 5}, EvalResult(0.5, 0.25, 1.5, 12))
    assert [line["step"] for line in read_evaluations(run_dir)] == [3, 5]


def test_event_files_with_odd_names_are_ignored(run_dir: Path) -> None:
    folder = run_dir / "tensorboard"
    folder.mkdir()
    for name in ("1abc", "1abc.x", "99999999999999999999999.x", "٣.x", "1700000000"):
        (folder / f"events.out.tfevents.{name}").touch()
    (folder / "events.out.tfevents.4000000000.host.1").touch()
    EventFile(folder, [], 0)
    assert any(path.name.startswith("events.out.tfevents.4000000001.") for path in folder.iterdir())


def good_predictions(classes: int = 2) -> Predictions:
    about = {key: EVALUATION[key] for key in ("step", "split", "split_fingerprint", "views", "precision")}
    about |= {"run": "a", "checkpoint": "c", "classes": ["x", "y"][:classes]}
    keys = np.array([b"00000000", b"00000001"])
    return Predictions(np.full((2, classes), 0.5, np.float32), np.array([0, 1]), keys, about)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": np.array([0, 2])}, "labels from 0 to 2, expected 0 to 1"),
        ({"labels": np.array([0, -1])}, "labels from -1 to 0"),
        ({"labels": np.array([0.0, 1.0])}, "labels is float64"),
        ({"keys": np.array([b"00000000"])}, "1 keys for 2 images"),
        ({"keys": np.array([1, 2])}, "keys is int64"),
        ({"probabilities": np.full((2, 2), np.nan, np.float32)}, "probabilities from nan"),
        ({"probabilities": np.full((2, 3), 0.5, np.float32)}, r"probabilities of shape \(2, 3\)"),
        ({"probabilities": np.full((2, 2), 0.5)}, "probabilities is float64"),
        ({"about": {}}, "about: .* has no field"),
        ({"about": {**good_predictions().about, "views": 7}}, "views is 7, expected"),
    ],
)
def test_wrong_arrays_of_saved_predictions_are_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "a.npz"
    Predictions(**{**vars(good_predictions()), **change}).save(path)
    with pytest.raises(UserError, match=expected):
        load_predictions(path)


def test_predictions_that_unpack_to_more_than_their_file_are_refused(tmp_path: Path) -> None:
    arrays = vars(good_predictions())
    labels = np.zeros(10**6, np.int64)
    np.savez_compressed(
        tmp_path / "a.npz", **{**arrays, "labels": labels, "about": np.array(json.dumps(arrays["about"]))}
    )
    with pytest.raises(UserError, match="expected at most"):
        load_predictions(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "text", ['{"members": 2}', '{"members": 1001, "seed": 0, "stream_seed": 0}', "[" * 10_000, "\ufeff{}"]
)
def test_a_damaged_ensemble_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(UserError, match=r"ensemble\.json: .*repeat the alextrain run command with --members"):
        read_ensemble(tmp_path)


def test_numbers_of_threads_without_bounds_are_refused_in_one_line() -> None:
    for threads in ("9" * 25, "1000000", "0"):
        result = alextrain("run", "--threads", threads)
        assert result.exit_code == 2 and "--threads" in result.stderr.splitlines()[-1]


def test_gpu_numbers_without_bounds_are_refused_in_one_line() -> None:
    for gpus in ("9" * 25, "9" * 5000, "٣", "1e3", "-1", "0x1"):
        assert len(refusal("run", "--gpus", gpus, "--run-dir", "nowhere", "--store", "nowhere")) < 1000


def test_run_refuses_a_damaged_run_json_and_goes_on_without_the_file(
    trained_run: Path, store: Path, tmp_path: Path
) -> None:
    """Without run.json, the command continues from the newest checkpoint, and writes run.json again."""
    path = trained_run / "run.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(changed(content, "recipe.lr", "x")))
    for command in ("run", "export", "evaluate", "figures", "status"):
        words = ("run", "--run-dir") if command == "run" else (command,)
        rest = ("--to", "safetensors") if command == "export" else ()
        error = refusal(*words, trained_run, *rest)
        assert 'recipe.lr is "x", expected a number' in error and "Move the file away" in error
    assert not list(trained_run.glob("*.png"))
    path.unlink()
    config = RunConfig(store, SHORT, 10, model=SMALL_ALEXNET, run_dir=trained_run, epochs=2, log_every=1, threads=1)
    assert fit(Run.open(config)) == trained_run
    assert json.loads(path.read_text())["recipe"] == content["recipe"]
