"""Tests of saved predictions, averages of predictions, evaluations.jsonl, and the command `evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.records import Records
from prep.console import UserError
from prep.store.manifest import Store
from tests.helpers.alextrain import alextrain, json_lines, refusal
from train.evaluation.evaluate import EvalResult
from train.evaluation.predictions import (
    Predictions,
    check_same_images,
    load_predictions,
    parse_weights,
    read_evaluations,
    record_evaluation,
)

ABOUT = {
    "run": "a",
    "step": 1,
    "checkpoint": "c",
    "split": "val",
    "split_fingerprint": "f",
    "views": 1,
    "precision": "fp32",
}
SAVED = Predictions(
    np.array([[0.9, 0.1], [0.2, 0.8]], np.float32),
    np.array([0, 0]),
    np.array([b"00000000", b"00000001"]),
    {**ABOUT, "classes": ["x", "y"]},
)


def test_saved_predictions_are_loaded_and_other_files_are_refused(tmp_path: Path) -> None:
    SAVED.save(tmp_path / "a.npz")
    loaded = load_predictions(tmp_path / "a.npz")
    assert loaded.probabilities.dtype == np.float32 and loaded.about == SAVED.about
    for name in ("probabilities", "labels", "keys"):
        assert np.array_equal(getattr(loaded, name), getattr(SAVED, name))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(content[: len(content) // 2])
    np.savez(tmp_path / "other.npz", features=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", about=np.array({"a": 1}, object), labels=0, keys=0, probabilities=0)
    for name in ("torn", "other", "pickle", "missing"):
        with pytest.raises(UserError, match=name):
            load_predictions(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match=r"a\.npz"):
        SAVED.save(tmp_path / "a.npy")
    assert {p.name for p in tmp_path.iterdir()} == {"a.npz", "torn.npz", "other.npz", "pickle.npz"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": {**SAVED.about, "split_fingerprint": "g"}}, "differ in split fingerprint"),
        ({"about": {**SAVED.about, "split": "train"}}, "differ in split "),
        ({"about": {**SAVED.about, "classes": ["y", "x"]}}, "differ in classes"),
        ({"about": {**SAVED.about, "classes": ["z"]}}, r"classes, including \w; 1 class, including z\)"),
        ({"keys": SAVED.keys[::-1]}, "in another order"),
        ({"labels": np.array([0, 1])}, "different images"),
    ],
)
def test_only_predictions_for_the_same_images_are_averaged(change: dict, message: str) -> None:
    check_same_images(["a", "b"], [SAVED, SAVED])
    with pytest.raises(UserError, match=message):
        check_same_images(["a", "b"], [SAVED, replace(SAVED, **change)])


def test_weights_are_parsed_or_refused() -> None:
    assert parse_weights(None, 2) is None and parse_weights("2,1.5", 2) == [2.0, 1.5]
    for text in ("1", "1,2,3", "1,-1", "3,-1", "0,0", "a,b", "nan,1", "inf,1"):
        with pytest.raises(UserError, match=text):
            parse_weights(text, 2)


def test_evaluations_are_recorded_for_all_views_and_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for views in (10, "dense", 1, 10):
        record_evaluation(tmp_path, {**ABOUT, "views": views}, EvalResult(0.5, 0.25, float(views == 1), 12))
    with monkeypatch.context() as patched, pytest.raises(UserError, match="evaluations"):
        patched.setattr("train.runs.append_log.open", lambda *_: open("/dev/full", "wb"), raising=False)
        record_evaluation(tmp_path, {**ABOUT, "step": 2}, EvalResult(0.5, 0.25, 1.0, 12))
    record_evaluation(tmp_path, {**ABOUT, "step": 3}, EvalResult(0.5, 0.25, 1.0, 12))
    assert [(line["step"], line["views"]) for line in read_evaluations(tmp_path)] == [
        (1, 1), (1, 10), (1, "dense"), (3, 1),
    ]  # fmt: skip


def test_a_run_can_be_averaged_with_saved_probabilities(trained_run: Path, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.npz"
    (alone,) = json_lines("evaluate", trained_run, "--store", store, "--views", "1", "--out", out)
    assert alone["images"] == 12 and alone["top1_misses"] == round(12 * alone["top1_error"])
    assert alone["top1_interval"][0] <= alone["top1_error"] <= alone["top1_interval"][1]
    saved, opened = load_predictions(out), Store.open(store)
    records = Records(opened, "val")
    assert saved.labels.tolist() == [records[k].label for k in range(12)]
    assert [key.decode() for key in saved.keys] == [records.key(k) for k in range(12)]
    np.testing.assert_allclose(saved.probabilities.sum(1), 1, rtol=1e-5)
    of_label = saved.probabilities[np.arange(12), saved.labels].astype(float)
    assert alone["loss"] == pytest.approx(-np.log(of_label).mean(), rel=1e-5)
    (of_best,) = json_lines("evaluate", trained_run / "best.pt", "--store", store, "--views", "1")
    assert of_best["loss"] > 0
    recorded = read_evaluations(trained_run)[-1]
    assert recorded["top1_error"] == alone["top1_error"] and recorded["views"] == 1

    other = replace(saved, probabilities=np.roll(saved.probabilities, 1, axis=1))
    other.save(tmp_path / "two.npz")
    args = ("evaluate", trained_run, tmp_path / "two.npz", "--store", store, "--views", "1", "--weights", "3,1")
    (average,) = json_lines(*args, "--out", tmp_path / "both.npz")
    assert average["members"][0]["top1_misses"] == alone["top1_misses"]
    mean = 0.75 * saved.probabilities.astype(float) + 0.25 * other.probabilities
    assert average["top1_misses"] == (mean.argmax(1) != saved.labels).sum()
    np.testing.assert_allclose(load_predictions(tmp_path / "both.npz").probabilities, mean, atol=1e-6)
    result = alextrain("evaluate", tmp_path / "one.npz", tmp_path / "two.npz")
    assert result.exit_code == 0 and result.stdout.count("\n") == 3
    assert "average of 2: val, centre view" in result.stdout


def test_predictions_of_other_classes_and_bad_paths_are_refused(trained_run: Path, store: Path, tmp_path: Path) -> None:
    SAVED.save(tmp_path / "other.npz")
    result = alextrain("evaluate", trained_run, tmp_path / "other.npz", "--store", store, "--views", "1")
    assert result.exit_code == 1 and "differ in classes" in result.stderr
    for out in ("scores.npy", "nowhere/scores.npz"):  # the path is refused before the evaluation
        assert "--out" in refusal("evaluate", trained_run, "--store", store, "--out", tmp_path / out, code=2)
        assert len(read_evaluations(trained_run)) == 1
    assert "not a file of saved probabilities" in refusal("evaluate", tmp_path / "none.npz")
