"""Tests of `alextrain compare`: the fields that differ, the labels, the errors, and the curves in the figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.colors import to_rgb
from PIL import Image

import train.cli
from prep.console import UserError
from tests.helpers.metrics import training_line, validation_line
from tests.helpers.small_training import tiny_description
from train.config.architecture import ALEXNET, HALF, Architecture
from train.config.overrides import apply_overrides
from train.config.recipe import Recipe
from train.config.recipes import CAFFE, SHORT
from train.report import compare
from train.report.compare import (
    comparison_json,
    comparison_lines,
    differing_fields,
    draw_comparison,
    read_runs,
    run_labels,
)


def write_run(
    folder: Path, recipe: Recipe = SHORT, model: Architecture = ALEXNET, errors: tuple[float, ...] = (), **settings: Any
) -> Path:
    """Write run.json and metrics.jsonl of a run, and return the run folder. `errors` are validation errors."""
    folder.mkdir(parents=True)
    fingerprint = settings.pop("store_fingerprint", "f0" * 32)
    description = tiny_description(recipe, model, fingerprint, run_dir=str(folder), **settings)
    (folder / "run.json").write_text(json.dumps(description))
    lines = []
    for epoch, error in enumerate(errors, 1):
        step = training_line(10 * epoch, epoch=epoch, loss=4 * error, top1_error=error, lr=0.1)
        lines += [step, validation_line(epoch, error)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list of the matplotlib figures that draw_comparison has drawn in the test."""
    figures: list[Any] = []
    draw = compare._draw_curves

    def draw_and_keep(figure: Any, runs: Any) -> None:
        figures.append(figure)
        draw(figure, runs)

    monkeypatch.setattr(compare, "_draw_curves", draw_and_keep)
    return figures


def test_only_fields_that_differ_are_listed(tmp_path: Path) -> None:
    faster = apply_overrides(SHORT, ["lr=0.05", "augmentation.colour=off"])
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", faster, seed=1, store="elsewhere")])
    assert differing_fields(runs) == {
        "settings.seed": [0, 1],
        "recipe.name": ["short", "short, augmentation.colour=off, lr=0.05"],
        "recipe.augmentation.colour": [SHORT.augmentation.colour, "off"],
        "recipe.lr": [SHORT.lr, 0.05],
    }
    assert run_labels(runs) == [
        f"a: seed 0, colour {SHORT.augmentation.colour}, lr {SHORT.lr:g}",
        "b: seed 1, colour off, lr 0.05",
    ]


def test_a_field_that_only_one_run_has_differs(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", other=4, store_fingerprint="f1" * 32)])
    assert differing_fields(runs) == {"store fingerprint": ["f0" * 32, "f1" * 32], "settings.other": [None, 4]}
    shown = [f"store fingerprint {digits * 19}{digits[0]}…" for digits in ("f0", "f1")]
    assert run_labels(runs) == [f"a: {shown[0]}, other none", f"b: {shown[1]}, other 4"]


def test_labels_name_the_network_and_recipe_but_not_their_fields(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", SHORT, HALF), write_run(tmp_path / "b", CAFFE)
    runs = read_runs([a, b])
    assert "model.widths.conv1" in differing_fields(runs) and "recipe.momentum" not in differing_fields(runs)
    assert run_labels(runs) == ["a: half, short", "b: alexnet, caffe"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"log_every": 5}, dict.fromkeys("abcde", 1)],
    ids=["no difference", "only a difference that does not change training", "too many differences"],
)
def test_labels_are_names_if_no_or_too_many_fields_differ(tmp_path: Path, settings: dict[str, int]) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", **settings)  # type: ignore[arg-type]
    assert run_labels(read_runs([a, b])) == ["a", "b"]


def test_a_fork_is_labelled_with_its_origin(tmp_path: Path) -> None:
    forked = write_run(tmp_path / "b")
    description = json.loads((forked / "run.json").read_text())
    description["ancestry"] = [{"path": "/runs/long/a", "step": 1030, "checkpoint_digest": "d" * 64, "differences": []}]
    (forked / "run.json").write_text(json.dumps(description))
    runs = read_runs([write_run(tmp_path / "a"), forked])
    (row,) = [line.split(None, 2) for line in comparison_lines(runs) if line.startswith("ancestry")]
    assert row[1:] == ["none", "a after step 1,030"]
    assert run_labels(runs) == ["a: ancestry none", "b: ancestry a after step 1,030"]


def test_runs_in_folders_of_the_same_name_are_labelled_with_their_paths(tmp_path: Path) -> None:
    a, b, c = write_run(tmp_path / "x" / "a"), write_run(tmp_path / "y" / "a"), write_run(tmp_path / "c", seed=1)
    assert run_labels(read_runs([a, b, c])) == [f"{a}: seed 0", f"{b}: seed 0", "c: seed 1"]


def test_a_run_with_one_line_is_a_dot_in_the_figure(tmp_path: Path, drawn: list[Any]) -> None:
    a, b = write_run(tmp_path / "a", errors=(0.5,)), write_run(tmp_path / "b", seed=1, errors=(0.5, 0.25))
    draw_comparison(read_runs([a, b]), tmp_path / "out.png")
    for axes in drawn[0].axes:
        for line in axes.lines:
            assert len(line.get_xdata()) != 1 or (line.get_marker() in ("o", "x") and line.get_alpha() == 1)


def test_runs_with_five_classes_or_fewer_have_no_top_5_error(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a", errors=(0.5,)), write_run(tmp_path / "b", seed=1)])
    texts = {}
    for classes in (5, 6):
        of_classes = [replace(run, fields={**run.fields, "classes": classes}) for run in runs]
        texts[classes] = "\n".join(comparison_lines(of_classes))
    assert "top-1 error" in texts[5] and "top-5" not in texts[5] and "top-5 error" in texts[6]
    mixed = read_runs([tmp_path / "a", write_run(tmp_path / "c", seed=1, errors=(0.5,))])
    few, many = (replace(run, fields={**run.fields, "classes": n}) for run, n in zip(mixed, (5, 6), strict=True))
    rows = [line.split() for line in comparison_lines([few, many]) if line.startswith("  top-5 error")]
    assert [row[2] for row in rows] == ["none"] * 2 and [row[3] for row in rows] == ["25.00%"] * 2


def test_json_and_table_have_the_last_and_the_best_validation(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", errors=(0.9, 0.5, 0.625)), write_run(tmp_path / "b", seed=1)
    runs = read_runs([a, b])
    first, second = comparison_json(runs)["runs"]
    assert (first["val"]["epoch"], first["val"]["top1_error"]) == (3, 0.625)
    assert (first["best"]["epoch"], first["best"]["top1_error"]) == (2, 0.5) and first["train"]["loss"] == 2.5
    assert second == {"run_dir": str(b), "label": "b: seed 1", "train": None, "val": None, "best": None}
    head, *rows = [text.split("  ") for text in comparison_lines(runs)]
    cells = {row[0].strip() or row[1]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert [cell.strip() for cell in head if cell.strip()] == [str(a), str(b)]
    assert cells["settings.seed"] == ["0", "1"] and cells["step"] == ["30", "none yet"]
    assert cells["last validation"] == ["epoch 3", "none yet"] and cells["best validation"] == ["epoch 2", "none yet"]


@pytest.mark.parametrize("count", [2, 12])
def test_the_figure_has_every_run_in_its_own_color(tmp_path: Path, count: int, drawn: list[Any]) -> None:
    errors = [(0.9, 0.5 + k / 100, 0.625) for k in range(count)]
    runs = read_runs([write_run(tmp_path / str(k), seed=k, errors=errors[k]) for k in range(count)])
    draw_comparison(runs, tmp_path / "out.png")
    (figure,) = drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{k}: seed {k}" for k in range(count)]
    loss, error = ([line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes)
    for k in range(count):
        assert [[epoch, 100 * share] for epoch, share in enumerate(errors[k], 1)] in error
        assert [[epoch, 4 * share] for epoch, share in enumerate(errors[k], 1)] in loss
    colors = {to_rgb(handle.get_color()) for handle in figure.legends[0].legend_handles}
    assert len(colors) == count
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).reshape(-1, 3)
    for color in colors:
        assert (np.abs(pixels - 255 * np.array(color)).max(1) < 2).any()


def test_a_folder_whose_name_begins_with_an_underscore_is_in_the_legend(
    tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a label begins with an underscore, matplotlib leaves the label out of the legend."""
    for name in ("_a", "b"):
        write_run(tmp_path / name, errors=(0.5, 0.4))
    monkeypatch.chdir(tmp_path)
    draw_comparison(read_runs([Path("_a"), Path("b")]), tmp_path / "curves.png")
    assert [text.get_text().strip() for text in drawn[0].legends[0].get_texts()] == ["_a", "b"]


def test_the_command_draws_and_prints_json_or_a_table(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", errors=(0.5,)), write_run(tmp_path / "b", replace(SHORT, lr=0.5), errors=(0.25,))
    out = tmp_path / "out.svg"
    result = CliRunner().invoke(train.cli.main, ["compare", str(a), str(b), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["differences"]["recipe.lr"] == [SHORT.lr, 0.5]
    assert "<svg" in out.read_text()
    result = CliRunner().invoke(train.cli.main, ["compare", str(a), str(b), "--out", str(tmp_path / "out.png")])
    assert result.exit_code == 0 and "recipe.lr" in result.stdout and (tmp_path / "out.png").stat().st_size > 5000


def test_mistakes_are_refused(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (tmp_path / "x").mkdir()
    for run_dirs, message in (([a], "needs two or more"), ([a, b, tmp_path / "x" / ".." / "a"], "named twice")):
        with pytest.raises(UserError, match=message):
            read_runs(run_dirs)
    with pytest.raises(UserError, match="not a run"):
        read_runs([a, tmp_path])
    with pytest.raises(UserError, match=r"a figure is .png or .svg"):
        draw_comparison(read_runs([a, b]), tmp_path / "out.gif")
    with pytest.raises(UserError, match="no"):
        draw_comparison(read_runs([a, b]), tmp_path / "no" / "out.png")
