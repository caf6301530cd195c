"""Tests that files of revision 595f19d can be opened: stores, stream states, run folders, checkpoints, predictions.

tests/fixtures/made_by_595f19d/README.md explains how the files were made. A test that changes a file works on a copy of
the file.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import prep.cli
import train.cli
from pipeline.augment import Augmentation
from pipeline.loader import Batch, train_loader
from prep.console import UserError
from train.config.architecture import ALEXNET, Widths
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.fork import fork
from train.trainer.loop import fit

FIXTURE = Path(__file__).parent / "fixtures" / "made_by_595f19d"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
STREAMS = json.loads((FIXTURE / "streams.json").read_text())
SMALL = replace(ALEXNET, widths=Widths(8, 8, 8, 8, 8, 16, 16))  # the network of the older run


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the unpacked archive. A test that writes files must use the fixture `older` instead."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(FIXTURE / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def older(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with copies of the run folder, the JPEG store, the predictions and the photograph."""
    for name in ("run", "store-jpeg"):
        shutil.copytree(unpacked / name, tmp_path / name)
    for name in ("predictions.npz", "photograph.png"):
        shutil.copyfile(unpacked / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def alexprep(arguments: str) -> Any:
    """Return the JSON object that `alexprep ARGUMENTS --json` prints."""
    return json_answer(prep.cli.main, arguments)


def alextrain(arguments: str) -> Any:
    """Return the JSON object that `alextrain ARGUMENTS --json` prints."""
    return json_answer(train.cli.main, arguments)


def json_answer(main: Any, arguments: str) -> Any:
    result = CliRunner().invoke(main, [*arguments.split(), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def open_older_run(folder: Path, epochs: int = 2, **settings: Any) -> Run:
    """Open the older run with the settings with which it was trained, except those that `settings` replaces."""
    given = {"model": SMALL, "run_dir": folder / "run", "epochs": epochs, "log_every": 1, "threads": 1, **settings}
    return Run.open(RunConfig(folder / "store-jpeg", SHORT, 4, **given))


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ---- store


@pytest.mark.parametrize("kind", ["jpeg", "ppm"])
def test_a_store_verifies_clean_and_has_the_same_fingerprints(unpacked: Path, kind: str) -> None:
    store = unpacked / f"store-{kind}"
    answer = alexprep(f"verify --store {store}")
    assert answer["ok"] and answer["faults"] == [], answer
    about = alexprep(f"inspect --store {store}")
    assert {name: split["fingerprint"] for name, split in about["splits"].items()} == EXPECTED["fingerprints"][kind]
    assert {name: split["records"] for name, split in about["splits"].items()} == {"train": 12, "val": 6}


def test_color_statistics_of_a_store_are_read(unpacked: Path) -> None:
    answer = alexprep(f"pca-stats --store {unpacked / 'store-ppm'}")
    recorded = json.loads((unpacked / "store-ppm" / "train" / "colour.json").read_text())
    assert {name: answer[name] for name in recorded} == recorded


# ---- stream


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_state_continues_with_the_recorded_batch(unpacked: Path, name: str) -> None:
    state, kind = STREAMS[name]["state"], name.split(",")[0]
    augmentation = Augmentation(**state["augmentation"])
    with train_loader(unpacked / f"store-{kind}", 4, seed=7, augmentation=augmentation, threads=1) as loader:
        loader.load_state_dict(state)
        batch: Batch = next(iter(loader))
        assert loader.state_dict() == {**state, "step": 2}
    means = batch.images.mean((2, 3), dtype=torch.float64).tolist()
    np.testing.assert_allclose(means, STREAMS[name]["channel_means"], atol=1e-4)  # gray levels
    if augmentation.colour == "off":
        served = sha256(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest()
        assert served == STREAMS[name]["sha256"]


# ---- checkpoint and run


def test_a_checkpoint_loads_with_the_same_parameters_and_velocity(unpacked: Path) -> None:
    state = checkpoint.load(unpacked / "run", "last")
    assert state.step == EXPECTED["step"] == 6
    assert tensors_hash(state.parameters) == EXPECTED["parameters"]
    assert tensors_hash(state.velocity) == EXPECTED["velocity"]
    assert checkpoint.load(unpacked / "run", "best").step == 3


def test_a_run_continues_with_the_parameters_and_metrics_of_the_older_version(older: Path) -> None:
    """The test removes the last checkpoint and trains steps 4 to 6 again. Revision 595f19d saved the expected results.

    On the CPU that made the files, new and expected results are equal, bit for bit. On other CPUs, they are nearly
    equal.
    """
    then, lines = checkpoint.load(older / "run", "last"), read_lines(older / "run")
    checkpoint.path_of(older / "run", 6).unlink()
    now = checkpoint.load(fit(open_older_run(older)), "last")
    assert now.step == 6 and now.parameters.keys() == then.parameters.keys()
    for name, parameter in now.parameters.items():
        torch.testing.assert_close(parameter, then.parameters[name], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(now.velocity[name], then.velocity[name], rtol=1e-2, atol=1e-5)
    assert now.schedule == then.schedule and now.stream == then.stream and now.identity == then.identity
    again = read_lines(older / "run")
    assert [line.keys() for line in again] == [line.keys() for line in lines]
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in lines], rel=1e-3)


def test_a_finished_run_trains_further(older: Path) -> None:
    fit(open_older_run(older, epochs=3))
    state = checkpoint.load(older / "run", "last")
    assert state.step == 9
    assert [line["step"] for line in read_lines(older / "run") if line["kind"] == "train"] == list(range(1, 10))


def test_another_seed_in_the_folder_of_the_run_is_refused(older: Path) -> None:
    with pytest.raises(UserError, match="seed"):
        fit(open_older_run(older, epochs=3, seed=1))


def test_a_run_is_forked(older: Path) -> None:
    forked = fork(open_older_run(older, epochs=3, seed=1), older / "forked")
    fit(forked)
    state = checkpoint.load(older / "forked", "last")
    assert state.step == 9
    assert [parent["step"] for parent in state.ancestry] == [6]


# ---- commands


def test_status_of_a_run_is_read(older: Path) -> None:
    answer = alextrain("status run")
    assert answer["state"] == "finished" and answer["finished"] and not answer["alive"]
    assert (answer["step"], answer["steps"], answer["host"], answer["model"]) == (6, 6, "a-host", "alexnet")
    assert answer["checkpoint"]["step"] == 6 and answer["best"]["top1_error"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("views", [1, 10])
def test_evaluate_gives_the_errors_that_were_recorded(older: Path, views: int) -> None:
    recorded = [json.loads(line) for line in (older / "run" / "evaluations.jsonl").read_text().splitlines()]
    (then,) = [line for line in recorded if line["views"] == views]
    now = alextrain(f"evaluate run --store store-jpeg --gpus cpu --views {views}")
    assert now["loss"] == pytest.approx(then["loss"], rel=1e-3)
    assert {name: now[name] for name in ("top1_error", "top5_error", "images", "step")} == {
        name: then[name] for name in ("top1_error", "top5_error", "images", "step")
    }


def test_saved_predictions_are_evaluated_alone_and_averaged_with_the_run(older: Path) -> None:
    saved = alextrain("evaluate predictions.npz")
    assert (saved["images"], saved["views"], saved["step"], saved["split"]) == (6, 10, 6, "val")
    both = alextrain("evaluate predictions.npz run --store store-jpeg --gpus cpu --out both.npz")
    assert both["loss"] == pytest.approx(saved["loss"], rel=1e-3)
    with np.load("predictions.npz") as then, np.load("both.npz") as now:
        assert sorted(then) == sorted(now)
        assert then["probabilities"] == pytest.approx(now["probabilities"], rel=1e-3)


def test_compare_shows_no_difference_from_a_newer_run(older: Path) -> None:
    fit(open_older_run(older, run_dir=older / "newer"))
    answer = alextrain("compare run newer --out compared.png")
    first, second = answer["runs"]
    for kind in ("train", "val", "best"):
        assert (first[kind]["step"], first[kind]["top1_error"]) == (second[kind]["step"], second[kind]["top1_error"])
    # Only the environments differ: the older run was trained with Python 3.11 and a CPU build of torch.
    assert [name for name in answer["differences"] if not name.startswith("environment.")] == []
    assert Path("compared.png").stat().st_size > 0


def test_predict_names_classes_without_the_store(older: Path) -> None:
    shutil.rmtree("store-jpeg")
    answer = alextrain("predict run photograph.png --gpus cpu --top 3")
    then = {"n00000002": 0.33703, "n00000003": 0.33213, "n00000001": 0.33084}  # predictions of revision 595f19d
    assert {guess["class"]: guess["probability"] for guess in answer["guesses"]} == pytest.approx(then, rel=1e-3)


def test_search_uses_the_existing_index(older: Path) -> None:
    index = older / "run" / "index-fc7-00000006.npz"
    written = index.stat().st_mtime_ns
    answer = alextrain("search run photograph.png --store store-jpeg --gpus cpu --count 2")
    assert index.stat().st_mtime_ns == written and list((older / "run").glob("*.npz")) == [index]
    # Distances that revision 595f19d computed.
    distances = {picture["source"]: picture["distance"] for picture in answer["nearest"]}
    assert distances == pytest.approx({"n00000001/train_06.png": 0.27885, "n00000002/train_01.png": 0.33745}, rel=1e-3)


def test_report_is_written(older: Path) -> None:
    alextrain("report run --store store-jpeg --gpus cpu")
    assert "n00000001" in (older / "run" / "report.html").read_text()


def test_export_has_the_weights_of_the_checkpoint(older: Path) -> None:
    from safetensors.torch import load_file

    alextrain("export run --to safetensors --out weights.safetensors")
    state = checkpoint.load(older / "run", "last")
    exported = load_file("weights.safetensors")
    assert sum(tensor.numel() for tensor in exported.values()) == sum(t.numel() for t in state.parameters.values())
