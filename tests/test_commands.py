"""Every command as a user meets it: help with an example, one clear line for a mistake, JSON for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import pipeline.cli
import prep.cli
import train.cli
from pipeline.diagnostics.preview import AUGMENTED
from train.config.recipes import RECIPES
from train.runs.run import Run

GROUPS = {"alexprep": prep.cli.main, "alexstream": pipeline.cli.main, "alextrain": train.cli.main}
COMMANDS = [(group, name) for group, main in GROUPS.items() for name in main.commands]


def run(group: str, *words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(GROUPS[group], list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(("group", "name"), COMMANDS)
def test_every_command_has_help_with_an_example(group: str, name: str) -> None:
    for words in ([name, "--help"], [name, "-h"]):
        code, out, _ = run(group, *words)
        assert code == 0 and "Example:" in out and f"{group} {name}" in out
    for parameter in GROUPS[group].commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{group} {name} {parameter.name}"


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_help_and_a_version(group: str) -> None:
    code, out, _ = run(group, "--help")
    assert code == 0 and "Example:" in out
    assert all(name in out for name in GROUPS[group].commands)
    assert run(group, "--version")[0] == 0


def test_options_offer_the_choices_that_the_code_accepts() -> None:
    from prep.inputs.labels import LABEL_ORDERS
    from prep.store.manifest import FILTERS, FORMATS, SPLITS

    for command in (prep.cli.main.commands["build-lmdb"], prep.cli.main.commands["import-caffe"]):
        choices = {p.name: p.type.choices for p in command.params if isinstance(p.type, click.Choice)}
        assert tuple(choices["format"]) == FORMATS and tuple(choices["filter"]) == FILTERS
        assert tuple(choices["split"]) == SPLITS
        assert tuple(choices.get("label_order", LABEL_ORDERS)) == LABEL_ORDERS
    from train.config.choices import ACTIVATIONS, SCHEDULES
    from train.config.overrides import apply_overrides
    from train.model.alexnet import ACTIVATION_FUNCTIONS

    assert tuple(ACTIVATION_FUNCTIONS) == ACTIVATIONS
    for word in SCHEDULES:
        assert apply_overrides(RECIPES["released"], [f"schedule={word}"]).name == f"released, schedule={word}"


def test_predict_refuses_dense_views_which_it_does_not_compute() -> None:
    refused = CliRunner().invoke(train.cli.main, ["predict", "run", "cat.jpg", "--views", "dense"])
    assert refused.exit_code == 2 and "'dense' is not one of '1', '10'" in refused.stderr


MISTAKES = [
    (["alexprep", "build-lmdb", "nowhere"], "nowhere: no such folder"),
    (["alexprep", "build-lmdb", "empty"], "empty: the folder is empty"),
    (["alexprep", "pca-stats", "--store", "nowhere"], "nowhere: no such store"),
    (["alexprep", "build-lmdb", "a-file"], "a-file: "),
    (["alexprep", "build-lmdb", "PHOTOS", "--store", "old"], "built with store version 99"),
    (["alexprep", "build-lmdb", "PHOTOS", "--split", "val", "--labels", "no.txt", "--store", "store"], "no.txt"),
    (["alexprep", "verify", "--store", "nowhere"], "nowhere: no such store"),
    (["alexprep", "verify", "--store", "empty"], "no manifest.json"),
    (["alexprep", "verify", "--store", "old"], "built with store version 99"),
    (["alexprep", "inspect", "--store", "nowhere"], "nowhere: no such store"),
    (["alexprep", "inspect", "--store", "STORE", "--key", "99"], "no key 00000099"),
    (["alexprep", "inspect", "--store", "STORE", "--out", "out.png"], "--key"),
    (["alexprep", "export-files", "out", "--store", "nowhere"], "nowhere: no such store"),
    (["alexprep", "export-files", "a-file/out", "--store", "STORE"], "a-file/out"),
    (["alexprep", "import-caffe", "nowhere", "--store", "store"], "nowhere"),
    (["alexprep", "import-caffe", "empty", "--store", "store"], "empty"),
    (["alexstream", "preview", "out.png", "--store", "nowhere"], "nowhere: no such store"),
    (["alexstream", "bench", "--store", "old"], "built with store version 99; this program reads version 1"),
    (["alextrain", "run", "--store", "old"], "built with store version 99; this program reads version 1"),
    (["alextrain", "run", "--store", "empty"], "no manifest.json"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "0,1,2"], "--gpus 0,1,2: AlexNet has two columns"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "7,8"], "--gpus 7,8: there is no GPU 7"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "one"], "--gpus one: expected two GPUs (0,1)"),
    (["alextrain", "run", "--store", "STORE", "--gpus", "cpu", "--batch", "999"], "--batch 999"),
    (["alextrain", "evaluate", "nowhere", "--store", "STORE"], "nowhere: no such run"),
    (["alextrain", "evaluate", "empty", "--store", "STORE"], "empty: no checkpoint"),
    (["alextrain", "evaluate", "empty", "--store", "STORE", "--split", "test"], "Name another --split."),
    (
        ["alextrain", "run", "--store", "STORE", "--gpus", "cpu", "--batch", "8", "--run-dir", "a-file"],
        "--run-dir a-file",
    ),
    (["alexprep", "build-lmdb", "PHOTOS", "--store", "a-file"], "a-file"),
    (["alexprep", "build-lmdb", "PHOTOS", "--store", "a-file/x"], "a-file/x"),
    (["alextrain", "figures", "nowhere"], "nowhere: no such run"),
    (["alextrain", "status", "no where"], "no such run. Train one with: alextrain run --run-dir 'no where'"),
    (["alextrain", "report", "empty"], "empty: no checkpoint"),
    (["alextrain", "predict", "nowhere", "a-file"], "nowhere: no such run"),
    (["alextrain", "features", "empty", "--store", "nowhere", "--out", "f.npy"], "nowhere: no such store"),
    (["alextrain", "search", "empty", "a-file"], "empty: no checkpoint"),
    (["alextrain", "evaluate", "a.npz", "b.npz", "--weights", "1"], "--weights 1: expected 2 numbers"),
    (["alextrain", "summary", "--gpus", "0,1,2"], "AlexNet has two columns"),
    (["alextrain", "recipe", "--set", "lr=fast"], "--set lr=fast: expected a number"),
    (["alextrain", "run", "--store", "STORE", "--set", "lrr=1"], "there is no lrr. Did you mean lr"),
    (["alextrain", "run", "--store", "STORE", "--model", "half", "--gpus", "0,1"], "this network has one column"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value)[:50])
def test_a_mistake_gets_one_clear_line(
    words: list[str],
    message: str,
    store: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("empty").mkdir()
    Path("old").mkdir()
    Path("old/manifest.json").write_text(json.dumps({"kind": "alexnet-store", "schema": 99}))
    words = [{"STORE": str(store), "PHOTOS": str(photo_folder)}.get(word, word) for word in words]
    code, out, err = run(*words)
    assert code == 1 and out == ""
    *said, error = [line for line in err.splitlines() if line]
    assert error.startswith("Error: ") and message in error and "Traceback" not in err
    assert not said or words[:2] == ["alextrain", "run"]  # which says its plan first
    assert not Path("run").exists() and not Path("out.png").exists() and not Path("store").exists()


def test_the_default_of_gpus_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.config.devices import describe_devices, parse_devices

    for there, wanted in ((0, ("cpu", "cpu")), (1, ("cuda:0", "cuda:0")), (8, ("cuda:0", "cuda:1"))):
        monkeypatch.setattr("torch.cuda.device_count", lambda there=there: there)
        assert parse_devices(None) == wanted
    assert parse_devices(None, columns=1) == ("cuda:0", "cuda:0")
    assert describe_devices(("cuda:0", "cuda:0"), columns=1) == "one column on cuda:0"
    assert parse_devices("3,1") == ("cuda:3", "cuda:1") and parse_devices("5") == ("cuda:5", "cuda:5")
    assert describe_devices(("cuda:0", "cuda:1")) == "column 0 on cuda:0, column 1 on cuda:1"


def test_summary_as_text_and_json() -> None:
    code, out, _ = run("alextrain", "summary")
    assert code == 0 and "60,965,224" in out and "column 1 (GPU 1)" in out
    table = json.loads(run("alextrain", "summary", "--json", "--classes", "10")[1])
    assert table["parameters"] == 60_965_224 - 990 * 4097
    assert sum(row["multiply_adds"] for row in table["layers"]) == table["multiply_adds"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_prints_every_number_with_its_source(name: str) -> None:
    code, out, _ = run("alextrain", "recipe", name)
    assert code == 0
    lines = out.splitlines()
    first = next(line for line in lines if line.startswith("  batch_size"))
    begin = first.index(RECIPES[name].sources["batch_size"][:9])
    told = " ".join(line[begin:] for line in lines)
    for field, source in RECIPES[name].sources.items():
        assert source in " ".join(told.split()), field
        assert any(line.startswith((f"  {field} ", f"  {field}.")) for line in lines), field
    assert max(map(len, lines)) <= 120
    assert json.loads(run("alextrain", "recipe", name, "--json")[1])["lr"] == RECIPES[name].lr


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["--no-lrn"], {"lrn": None, "within_map": None}),
        (["--no-dropout"], {"dropout": 0.0}),
        (["--no-crossing"], {"crossing": False}),
        (["--activation", "tanh"], {"activation": "tanh"}),
        (["--pool", "2"], {"pool_px": 2}),
        (["--schedule", "plateau"], {"schedule": asdict(RECIPES["paper"].schedule)}),
        (["--set", "lr=0.02", "--set", "momentum=0.8"], {"lr": 0.02, "momentum": 0.8}),
        (
            ["--no-colour"],
            {"augmentation": {**asdict(RECIPES["released"].augmentation), "colour": "off", "divisor": 1.0}},
        ),
    ],
)
def test_shorthands_change_what_they_say_and_nothing_else(words: list[str], changed: dict) -> None:
    code, out, _ = run("alextrain", "recipe", "released", "--json", *words)
    before, after = json.loads(json.dumps(asdict(RECIPES["released"]))), json.loads(out)
    assert code == 0 and {**before, **changed} == {**after, "name": "released", "sources": before["sources"]}
    assert after["name"].startswith("released, ")
    assert {name for name in after["sources"] if "command line" in after["sources"][name]} == set(changed)


def test_bench_says_the_rate_and_its_share_of_the_bound(stores: dict[str, Path]) -> None:
    for kind in ("jpeg", "ppm"):
        words = ["--store", str(stores[kind]), "--seconds", "0.2", "--batch", "8", "--threads", "1"]
        code, out, _ = run("alexstream", "bench", "--json", *words)
        said = json.loads(out)
        assert code == 0 and said["images_per_s"] > 0 and said["bound_images_per_s"] > 0
        assert said["format"] == kind and said["threads"] == 1 and said["batch"] == 8 and said["device"] == "cpu"
        assert 0 < said["share_of_bound"] < 100


def test_preview_shows_stored_pictures_augmentations_and_louder_noise(stores: dict[str, Path], tmp_path: Path) -> None:
    sheets = {}
    for kind in ("jpeg", "ppm", "ppm-whole"):
        out = tmp_path / f"{kind}.png"
        assert run("alexstream", "preview", str(out), "--store", str(stores[kind]), "--rows", "3")[0] == 0
        sheets[kind] = np.asarray(Image.open(out)).astype(float)
    cell = 224 + 6
    assert sheets["jpeg"].shape == (34 + 3 * cell, 6 + (AUGMENTED + 2) * cell, 3)
    assert np.abs(sheets["jpeg"] - sheets["ppm"]).mean() < 3  # the same draws of the same pictures
    for row in range(3):
        cells = [
            sheets["ppm"][34 + row * cell :][:224, 6 + column * cell :][:, :224] for column in range(AUGMENTED + 2)
        ]
        assert all(np.abs(a - b).mean() > 0.5 for a, b in pairwise(cells[1:]))
        eighth, louder = cells[AUGMENTED], cells[AUGMENTED + 1]
        inside = ((louder > 1) & (louder < 254)).all(2)
        if inside.sum() > 500:  # where nothing is clipped the two differ by one colour: the same window and flip
            assert (louder - eighth)[inside].std(0).max() < 1.5


def test_preview_into_a_folder_that_is_not_there(store: Path, tmp_path: Path) -> None:
    code, _, err = run("alexstream", "preview", str(tmp_path / "no" / "out.png"), "--store", str(store))
    assert code == 1 and err.count("\n") == 1 and "there is no folder" in err


def test_dry_run_says_the_plan_and_writes_nothing(store: Path, tmp_path: Path) -> None:
    words = ["--store", str(store), "--run-dir", str(tmp_path / "run"), "--gpus", "cpu", "--batch", "8", "--dry-run"]
    code, out, err = run("alextrain", "run", *words, "--epochs", "4", "--json")
    assert code == 0 and json.loads(out)["dry_run"] is True
    assert "both columns on cpu" in err and "3 steps an epoch, 12 steps in all" in err
    assert not (tmp_path / "run").exists()


def test_the_default_recipe_learns_and_the_letter_of_the_paper_is_warned_of(store: Path, tmp_path: Path) -> None:
    words = ["--store", str(store), "--run-dir", str(tmp_path / "run"), "--gpus", "cpu", "--batch", "8", "--dry-run"]
    said = {recipe: run("alextrain", "run", *words, "--recipe", recipe)[2] for recipe in RECIPES}
    assert {recipe for recipe, lines in said.items() if "almost blind" in lines} == {"paper"}
    assert run("alextrain", "run", *words)[2] == said["released"]
    tamed = ["--recipe", "paper", "--set", "init_std.conv3=0.03"]
    assert "almost blind" not in run("alextrain", "run", *words, *tamed)[2]


def test_the_whole_network_trains_resumes_evaluates_and_draws(store: Path, tmp_path: Path) -> None:
    """The commands one after the other, at the paper's full width, on the CPU."""
    run_dir = tmp_path / "run"
    words = ["--store", str(store), "--run-dir", str(run_dir), "--gpus", "cpu", "--batch", "10"]
    code, out, err = run("alextrain", "run", *words, "--recipe", "released", "--steps", "1", "--json")
    assert code == 0 and json.loads(out)["train"]["step"] == 1
    code, out, err = run("alextrain", "run", *words, "--recipe", "released", "--epochs", "1", "--json")
    assert code == 0 and "resumes after step 1" in err
    assert json.loads(out)["val"]["images"] == 12 and json.loads(out)["train"]["step"] == 3
    code, _, err = run("alextrain", "run", *words, "--recipe", "paper", "--epochs", "1")
    assert code == 1 and "another recipe (released, here paper)" in err
    code, out, _ = run("alextrain", "evaluate", str(run_dir), "--store", str(store), "--json")
    said = json.loads(out)
    assert code == 0 and {"top1_error", "top5_error", "loss", "images"} <= set(said)
    assert said["images"] == 12 and said["views"] == 10
    assert run("alextrain", "figures", str(run_dir), "--split", "test")[0] == 0  # which the store lacks: no photographs
    for name in ("learning-curve.png", "kernels.png"):
        assert np.asarray(Image.open(run_dir / name)).std() > 5


def test_evaluation_on_a_store_of_other_classes_is_refused(store: Path, photo_folder: Path, tmp_path: Path) -> None:
    import shutil

    from train.config.architecture import ALEXNET, Widths
    from train.config.recipes import SHORT
    from train.config.run_config import RunConfig
    from train.trainer.loop import fit

    small = replace(ALEXNET, widths=Widths(4, 4, 4, 4, 4, 4, 4))
    run_dir = fit(Run.open(RunConfig(store, SHORT, 8, model=small, run_dir=tmp_path / "run", steps=1)))
    shutil.copytree(photo_folder / "train", tmp_path / "other")
    (tmp_path / "other" / "n00000011").rename(tmp_path / "other" / "n00000044")
    other = str(tmp_path / "store")
    assert run("alexprep", "build-lmdb", str(tmp_path / "other"), "--store", other, "--jobs", "1")[0] == 0
    code, _, err = run("alextrain", "evaluate", str(run_dir), "--store", other, "--split", "train")
    assert code == 1 and "not the same" in err and "n00000011" in err


def test_dali_that_is_not_installed_is_said_in_one_line(store: Path) -> None:
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[:2] == ['nvidia', 'dali']:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from pipeline.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    words = ["bench", "--store", str(store)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "NVIDIA DALI is not installed" in done.stderr and "alexnet[cuda13]" in done.stderr
