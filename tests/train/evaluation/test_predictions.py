"""Saved probabilities, the errors of several together, and what may not be averaged; the command `evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.records import Records
from prep.console import UserError
from prep.store.manifest import Store
from train.cli import main
from train.evaluation.evaluate import EvalResult
from train.evaluation.predictions import (
    Predictions,
    check_same_images,
    load_predictions,
    parse_weights,
    read_evaluations,
    record_evaluation,
)


def evaluate(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["evaluate", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


ABOUT = {"run": "a", "step": 1, "split": "val", "split_fingerprint": "f", "views": 1, "precision": "fp32"}
MADE = Predictions(
    np.array([[0.9, 0.1], [0.2, 0.8]], np.float32),
    np.array([0, 0]),
    np.array([b"00000000", b"00000001"]),
    {**ABOUT, "classes": ["x", "y"]},
)


def test_what_is_saved_is_loaded_and_nothing_else(tmp_path: Path) -> None:
    MADE.save(tmp_path / "a.npz")
    again = load_predictions(tmp_path / "a.npz")
    assert again.probabilities.dtype == np.float32 and again.about == MADE.about
    for name in ("probabilities", "labels", "keys"):
        assert np.array_equal(getattr(again, name), getattr(MADE, name))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "other.npz", features=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", about=np.array({"a": 1}, object), labels=0, keys=0, probabilities=0)
    for name in ("torn", "other", "pickle", "missing"):
        with pytest.raises(UserError, match=name):
            load_predictions(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match=r"a\.npz"):
        MADE.save(tmp_path / "a.npy")
    assert {p.name for p in tmp_path.iterdir()} == {"a.npz", "torn.npz", "other.npz", "pickle.npz"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": {**MADE.about, "split_fingerprint": "g"}}, "differ in split fingerprint"),
        ({"about": {**MADE.about, "split": "train"}}, "differ in split "),
        ({"about": {**MADE.about, "classes": ["y", "x"]}}, "differ in classes"),
        ({"keys": MADE.keys[::-1]}, "another order"),
        ({"labels": np.array([0, 1])}, "other images"),
    ],
)
def test_only_what_is_said_of_the_same_images_is_averaged(change: dict, message: str) -> None:
    check_same_images(["a", "b"], [MADE, MADE])
    with pytest.raises(UserError, match=message):
        check_same_images(["a", "b"], [MADE, replace(MADE, **change)])


def test_weights() -> None:
    assert parse_weights(None, 2) is None and parse_weights("2,1.5", 2) == [2.0, 1.5]
    for text in ("1", "1,2,3", "1,-1", "3,-1", "0,0", "a,b", "nan,1", "inf,1"):
        with pytest.raises(UserError, match=text):
            parse_weights(text, 2)


def test_results_are_noted_of_any_views_whatever_a_full_disk_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for views in (10, "dense", 1, 10):
        record_evaluation(tmp_path, {**ABOUT, "views": views}, EvalResult(0.5, 0.25, views == 1, 12))
    with monkeypatch.context() as patched, pytest.raises(UserError, match="evaluations"):
        patched.setattr("train.runs.append_log.open", lambda *_: open("/dev/full", "wb"), raising=False)
        record_evaluation(tmp_path, {**ABOUT, "step": 2}, EvalResult(0.5, 0.25, 1.0, 12))
    record_evaluation(tmp_path, {**ABOUT, "step": 3}, EvalResult(0.5, 0.25, 1.0, 12))
    assert [(line["step"], line["views"]) for line in read_evaluations(tmp_path)] == [
        (1, 1), (1, 10), (1, "dense"), (3, 1),
    ]  # fmt: skip


def test_a_run_its_saved_probabilities_and_both_together(trained_run: Path, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "one.npz"
    code, said, _ = evaluate(trained_run, "--store", store, "--views", "1", "--out", out, "--json")
    alone = json.loads(said)
    assert code == 0 and alone["images"] == 12 and alone["top1_misses"] == round(12 * alone["top1_error"])
    assert alone["top1_interval"][0] <= alone["top1_error"] <= alone["top1_interval"][1]
    saved, opened = load_predictions(out), Store.open(store)
    records = Records(opened, "val")
    assert saved.labels.tolist() == [records[k].label for k in range(12)]
    assert [key.decode() for key in saved.keys] == [records.key(k) for k in range(12)]
    np.testing.assert_allclose(saved.probabilities.sum(1), 1, rtol=1e-5)
    right = saved.probabilities[np.arange(12), saved.labels].astype(float)
    assert alone["loss"] == pytest.approx(-np.log(right).mean(), rel=1e-5)
    code, said, _ = evaluate(trained_run / "best.pt", "--store", store, "--views", "1", "--json")
    assert code == 0 and json.loads(said)["loss"] > 0
    noted = read_evaluations(trained_run)[-1]
    assert noted["top1_error"] == alone["top1_error"] and noted["views"] == 1

    other = replace(saved, probabilities=np.roll(saved.probabilities, 1, axis=1))
    other.save(tmp_path / "two.npz")
    words = (trained_run, tmp_path / "two.npz", "--store", store, "--views", "1", "--weights", "3,1")
    code, said, _ = evaluate(*words, "--out", tmp_path / "both.npz", "--json")
    together = json.loads(said)
    assert code == 0 and together["members"][0]["top1_misses"] == alone["top1_misses"]
    mean = 0.75 * saved.probabilities.astype(float) + 0.25 * other.probabilities
    assert together["top1_misses"] == (mean.argmax(1) != saved.labels).sum()
    np.testing.assert_allclose(load_predictions(tmp_path / "both.npz").probabilities, mean, atol=1e-6)
    code, said, _ = evaluate(tmp_path / "one.npz", tmp_path / "two.npz")
    assert code == 0 and said.count("\n") == 3 and "average of 2: val, centre view" in said


def test_refusals_of_the_command(trained_run: Path, store: Path, tmp_path: Path) -> None:
    MADE.save(tmp_path / "other.npz")
    code, _, err = evaluate(trained_run, tmp_path / "other.npz", "--store", store, "--views", "1")
    assert code == 1 and "differ in classes" in err
    for out in ("scores.npy", "nowhere/scores.npz"):  # said before the work, which is left undone
        code, said, err = evaluate(trained_run, "--store", store, "--out", tmp_path / out)
        assert code == 1 and not said and "--out" in err and len(read_evaluations(trained_run)) == 1
    code, _, err = evaluate(tmp_path / "none.npz")
    assert code == 1 and "no saved probabilities" in err
