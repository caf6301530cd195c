"""`alextrain compare`: what differs and nothing else, the errors, and a picture that holds the numbers of the lines."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.colors import to_rgb
from PIL import Image

import train.cli
from prep.console import UserError
from tests.train.runs.test_status import validation
from train.config.architecture import ALEXNET, HALF, Architecture
from train.config.overrides import apply_overrides
from train.config.recipe import Recipe
from train.config.recipes import CAFFE, SHORT
from train.report import compare
from train.report.compare import (
    comparison_json,
    comparison_lines,
    differences,
    draw_comparison,
    labels_of,
    read_runs,
)


def made(
    folder: Path, recipe: Recipe = SHORT, model: Architecture = ALEXNET, errors: tuple[float, ...] = (), **settings: Any
) -> Path:
    """A run's folder as train.runs.run_dir.describe and train.monitor.metrics_log write it, with a validation for each of `errors`."""
    folder.mkdir()
    about = {
        "identity": {
            "model": model.name,
            "recipe": recipe.name,
            "store_fingerprint": settings.pop("store_print", "f0"),
        },
        "settings": {"run_dir": str(folder), "store": "store", "batch_size": 8, "seed": 0, "epochs": 10, **settings},
        "model": asdict(model),
        "recipe": asdict(recipe),
        "length": {"steps_per_epoch": 10, "steps": 100},
        "store": {},
        "classes": ["a", "b"],
        "environment": {"torch": "2.13.0"},
    }
    (folder / "run.json").write_text(json.dumps(about))
    lines = []
    for epoch, error in enumerate(errors, 1):
        step = {"kind": "train", "epoch": epoch, "step": 10 * epoch, "loss": 4 * error, "top1_error": error, "lr": 0.1}
        lines += [step, validation(epoch, error)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    faster = apply_overrides(SHORT, ["lr=0.05", "augmentation.colour=off"])
    runs = read_runs([made(tmp_path / "a"), made(tmp_path / "b", faster, seed=1, store="elsewhere")])
    assert differences(runs) == {
        "settings.seed": [0, 1],
        "recipe.name": ["short", "short, augmentation.colour=off, lr=0.05"],
        "recipe.augmentation.colour": [SHORT.augmentation.colour, "off"],
        "recipe.lr": [SHORT.lr, 0.05],
    }
    assert labels_of(runs) == [
        f"seed 0, colour {SHORT.augmentation.colour}, lr {SHORT.lr:g}",
        "seed 1, colour off, lr 0.05",
    ]


def test_a_field_that_one_run_does_not_have_differs(tmp_path: Path) -> None:
    runs = read_runs([made(tmp_path / "a"), made(tmp_path / "b", accumulate=4, store_print="f1")])
    assert differences(runs) == {"store fingerprint": ["f0", "f1"], "settings.accumulate": [None, 4]}
    assert labels_of(runs) == ["store fingerprint f0, accumulate none", "store fingerprint f1, accumulate 4"]


def test_another_network_or_recipe_is_named_not_spelt_out(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a", SHORT, HALF), made(tmp_path / "b", CAFFE)
    runs = read_runs([a, b])
    assert "model.widths.conv1" in differences(runs) and "recipe.momentum" not in differences(runs)
    assert labels_of(runs) == ["half, short", "alexnet, caffe"]


@pytest.mark.parametrize("how", ["alike", "only how often it tells", "too much"])
def test_where_fields_tell_nothing_the_folder_does(tmp_path: Path, how: str) -> None:
    changed = {"alike": {}, "only how often it tells": {"log_every": 5}, "too much": dict.fromkeys("abcde", 1)}[how]
    a, b = made(tmp_path / "a"), made(tmp_path / "b", **changed)
    assert labels_of(read_runs([a, b])) == [str(a), str(b)]


def test_a_fork_says_what_it_came_from(tmp_path: Path) -> None:
    forked = made(tmp_path / "b")
    about = json.loads((forked / "run.json").read_text())
    (forked / "run.json").write_text(json.dumps({**about, "ancestry": [{"path": "/runs/long/a", "step": 1030}]}))
    runs = read_runs([made(tmp_path / "a"), forked])
    (row,) = [line.split(None, 2) for line in comparison_lines(runs) if line.startswith("ancestry")]
    assert row[1:] == ["none", "a after step 1,030"]
    assert labels_of(runs) == ["ancestry none", "ancestry a after step 1,030"]


def test_a_folder_that_begins_with_an_underscore_is_in_the_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    draw = compare._curves
    monkeypatch.setattr(compare, "_curves", lambda figure, runs: (kept.append(figure), draw(figure, runs)))
    for name in ("_a", "b"):
        made(tmp_path / name, errors=(0.5, 0.4))
    monkeypatch.chdir(tmp_path)
    draw_comparison(read_runs([Path("_a"), Path("b")]), tmp_path / "curves.png")
    assert [text.get_text().strip() for text in kept[0].legends[0].get_texts()] == ["_a", "b"]


def test_two_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b, c = made(tmp_path / "a"), made(tmp_path / "b"), made(tmp_path / "c", seed=1)
    assert labels_of(read_runs([a, b, c])) == [f"seed 0, {a}", f"seed 0, {b}", "seed 1"]


def test_final_and_best_errors(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a", errors=(0.9, 0.5, 0.625)), made(tmp_path / "b", seed=1)
    runs = read_runs([a, b])
    first, second = comparison_json(runs)["runs"]
    assert (first["val"]["epoch"], first["val"]["top1_error"]) == (3, 0.625)
    assert (first["best"]["epoch"], first["best"]["top1_error"]) == (2, 0.5) and first["train"]["loss"] == 2.5
    assert second == {"run_dir": str(b), "label": "seed 1", "train": None, "val": None, "best": None}
    head, *rows = [text.split("  ") for text in comparison_lines(runs)]
    cells = {row[0].strip() or row[1]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert [cell.strip() for cell in head if cell.strip()] == [str(a), str(b)]
    assert cells["settings.seed"] == ["0", "1"] and cells["step"] == ["30", "none yet"]
    assert cells["last validation"] == ["epoch 3", "none yet"] and cells["best validation"] == ["epoch 2", "none yet"]


@pytest.mark.parametrize("count", [2, 12])
def test_the_picture_has_every_run_in_a_colour_of_its_own(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    draw = compare._curves
    monkeypatch.setattr(compare, "_curves", lambda figure, runs: (kept.append(figure), draw(figure, runs)))
    errors = [(0.9, 0.5 + k / 100, 0.625) for k in range(count)]
    runs = read_runs([made(tmp_path / str(k), seed=k, errors=errors[k]) for k in range(count)])
    draw_comparison(runs, tmp_path / "out.png")
    (figure,) = kept
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"seed {k}" for k in range(count)]
    loss, error = ([line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes)
    for k in range(count):
        assert [[epoch, 100 * share] for epoch, share in enumerate(errors[k], 1)] in error
        assert [[epoch, 4 * share] for epoch, share in enumerate(errors[k], 1)] in loss
    colours = {to_rgb(handle.get_color()) for handle in figure.legends[0].legend_handles}
    assert len(colours) == count
    drawn = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).reshape(-1, 3)
    for colour in colours:
        assert (np.abs(drawn - 255 * np.array(colour)).max(1) < 2).any()


def test_the_command_draws_and_answers(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a", errors=(0.5,)), made(tmp_path / "b", replace(SHORT, lr=0.5), errors=(0.25,))
    out = tmp_path / "out.svg"
    done = CliRunner().invoke(train.cli.main, ["compare", str(a), str(b), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["differences"]["recipe.lr"] == [SHORT.lr, 0.5]
    assert "<svg" in out.read_text()
    done = CliRunner().invoke(train.cli.main, ["compare", str(a), str(b), "--out", str(tmp_path / "out.png")])
    assert done.exit_code == 0 and "recipe.lr" in done.stdout and (tmp_path / "out.png").stat().st_size > 5000


def test_mistakes(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    for run_dirs, said in (([a], "needs two or more"), ([a, b, tmp_path / "x" / ".." / "a"], "named twice")):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=said):
            read_runs(run_dirs)
    with pytest.raises(UserError, match="not a run"):
        read_runs([a, tmp_path])
    with pytest.raises(UserError, match=r"a picture is .png or .svg"):
        draw_comparison(read_runs([a, b]), tmp_path / "out.gif")
    with pytest.raises(UserError, match="no"):
        draw_comparison(read_runs([a, b]), tmp_path / "no" / "out.png")
