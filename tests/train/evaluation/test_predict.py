"""Tests of the command `predict`. Predictions for a photograph must equal those for its record in a store."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.records import Records
from prep.console import UserError
from prep.store.manifest import Store
from tests.helpers.alextrain import alextrain, json_lines, refusal
from train.config.architecture import ALEXNET, Widths
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.evaluation.predictions import load_predictions
from train.runs.preprocessing import load_eval_transform
from train.runs.run import Run
from train.trainer.loop import fit


@pytest.mark.parametrize("views", [1, 10])
def test_predictions_for_a_photograph_equal_those_for_its_record(
    small_run: Path, trained_run: Path, store: Path, photo_folder: Path, tmp_path: Path, views: int
) -> None:
    out = tmp_path / "val.npz"
    assert alextrain("evaluate", trained_run, "--store", store, "--views", views, "--out", out).exit_code == 0
    saved = load_predictions(out)
    records = Records(Store.open(store), "val")
    photographs = [next(photo_folder.rglob(Path(records.source(k)).name)) for k in (0, 5)]
    answers = json_lines("predict", small_run, *photographs, "--views", views)
    for number, answer in zip((0, 5), answers, strict=True):
        actual = {guess["class"]: guess["probability"] for guess in answer["guesses"]}
        expected = dict(zip(saved.about["classes"], saved.probabilities[number].tolist(), strict=True))
        assert actual == pytest.approx(expected, rel=1e-4)
        probabilities = [guess["probability"] for guess in answer["guesses"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)


def test_a_checkpoint_file_can_be_named_in_place_of_its_run(
    small_run: Path, photo_folder: Path, tmp_path: Path
) -> None:
    """The name of the photograph has a newline and a byte that is not UTF-8. Both are escaped in the output."""
    photograph = tmp_path / "a\nb\udcff.jpg"
    shutil.copy(next((photo_folder / "val").glob("*.JPEG")), photograph)
    by_file = json_lines("predict", small_run / "best.pt", photograph)
    assert by_file == json_lines("predict", small_run, photograph, "--checkpoint", "best")
    result = alextrain("predict", small_run, photograph, "--views", "1")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    assert r"a\nb\udcff.jpg: n000" in result.stdout


def test_dense_views_are_refused_because_predict_does_not_compute_them() -> None:
    result = alextrain("predict", "run", "cat.jpg", "--views", "dense")
    assert result.exit_code == 2 and "'dense' is not one of '1', '10'" in result.stderr


def test_predict_needs_the_description_of_the_store_in_run_json_but_not_the_store(
    trained_run: Path, photo_folder: Path
) -> None:
    description = json.loads((trained_run / "run.json").read_text())
    photograph = next((photo_folder / "val").glob("*.JPEG"))
    with_store = json_lines("predict", trained_run, photograph)
    description["settings"]["store"] = "nowhere"
    (trained_run / "run.json").write_text(json.dumps(description))
    assert json_lines("predict", trained_run, photograph) == with_store
    assert "run.json: not a" in refusal("predict", trained_run, trained_run / "run.json")
    del description["store"]
    (trained_run / "run.json").write_text(json.dumps(description))
    assert "run.json: the content has no field store" in refusal("predict", trained_run, photograph)


def test_bad_photographs_do_not_end_predict(small_run: Path, photo_folder: Path, tmp_path: Path) -> None:
    """One of the photographs is no image, and another does not exist."""
    good = sorted((photo_folder / "val").glob("*.JPEG"))[:2]
    (tmp_path / "text.jpg").write_text("no image")
    alone = json_lines("predict", small_run, *good, "--views", "1")
    words = ["predict", small_run, good[0], tmp_path / "text.jpg", tmp_path / "none.jpg", good[1], "--views", "1"]
    result = alextrain(*words)
    assert result.exit_code == 1
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == [str(path) for path in good]
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith(f"Error: {tmp_path}/text.jpg: not an image in a known format")]
    assert [line for line in lines if line.startswith(f"Error: {tmp_path}/none.jpg: cannot be read: No such file")]
    assert lines[-1] == "Error: 2 of 4 photographs could not be read; see the lines above."
    answers = [json.loads(line) for line in alextrain(*words, "--json").stdout.splitlines()]
    assert [answer for answer in answers if "guesses" in answer] == alone
    assert [Path(answer["image"]).name for answer in answers if "error" in answer] == ["text.jpg", "none.jpg"]


def test_the_mean_image_is_kept_in_the_run_folder(store: Path, tmp_path: Path, photo_folder: Path) -> None:
    recipe = replace(SHORT, augmentation=replace(SHORT.augmentation, mean="image"))
    small = replace(ALEXNET, widths=Widths(2, 2, 2, 2, 2, 2, 2))
    moved = tmp_path / "store"
    shutil.copytree(store, moved)
    run_dir = fit(Run.open(RunConfig(moved, recipe, 8, model=small, run_dir=tmp_path / "run", steps=1, threads=1)))
    shutil.rmtree(moved)
    assert np.array_equal(load_eval_transform(run_dir, recipe).mean_image, Store.open(store).mean_image())
    assert json_lines("predict", run_dir, next((photo_folder / "val").glob("*.JPEG")))
    (run_dir / "mean_image.npy").unlink()
    with pytest.raises(UserError, match=r"mean_image\.npy"):
        load_eval_transform(run_dir, recipe)
