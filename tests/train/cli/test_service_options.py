"""Tests of --service and --service-fallback that need no service. tests/train/service has the tests with a service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.alextrain import alextrain, json_lines, refusal
from tests.helpers.small_training import small_config
from train.config.identity import identity_of
from train.experiments.ablate import plan_runs
from train.report.compare import read_runs, run_labels
from train.runs.run import Run, write_description

WITH_SERVICE = {"service": "imagenet", "service_fallback": "local"}


@pytest.mark.parametrize("command", [["run"], ["ablate"], ["evaluate", "run"]])
def test_a_fallback_without_a_service_is_refused(store: Path, command: list[str]) -> None:
    line = refusal(*command, "--store", store, "--service-fallback", "local", code=2)
    assert line == "Error: --service-fallback local: no service is named. Pass --service NAME too.\n"


@pytest.mark.parametrize(
    ("options", "effect"),
    [([], "the run stops with an error"), (["--service-fallback", "local"], "this machine decodes")],
)
def test_a_dry_run_names_the_service_and_does_not_connect_to_it(
    store: Path, tmp_path: Path, options: list[str], effect: str
) -> None:
    words = ["run", "--store", store, "--run-dir", tmp_path / "run", "--gpus", "cpu", "--batch", "8", "--dry-run"]
    result = alextrain(*words, "--service", "imagenet@10.0.0.1:6379", *options)
    assert result.exit_code == 0, result.output
    text = f"service imagenet@10.0.0.1:6379 decodes the images; if the service is lost, {effect}\n"
    assert text in result.stderr
    assert "service" not in alextrain(*words).stderr


def test_the_service_is_no_part_of_the_identity(stores: dict[str, Path], tmp_path: Path) -> None:
    run = Run.open(small_config(stores["ppm"], tmp_path, **WITH_SERVICE))
    assert run.identity == identity_of(small_config(stores["ppm"], tmp_path), run.store)


def test_status_shows_the_service_and_compare_does_not_name_runs_by_it(stores: dict[str, Path], tmp_path: Path) -> None:
    for name, options in (("plain", {}), ("service", WITH_SERVICE)):
        (tmp_path / name).mkdir()
        write_description(Run.open(small_config(stores["ppm"], tmp_path / name, **options)))
    (status,) = json_lines("status", tmp_path / "service")
    assert status["service"] == "imagenet"
    assert "alexnet, recipe short, service imagenet\n" in alextrain("status", tmp_path / "service").stdout
    assert "alexnet, recipe short\n" in alextrain("status", tmp_path / "plain").stdout
    assert run_labels(read_runs([tmp_path / "plain", tmp_path / "service"])) == ["plain", "service"]


def test_all_runs_of_an_ablation_use_the_service(tmp_path: Path) -> None:
    runs = plan_runs(tmp_path, tmp_path, "short", gpus="cpu", **WITH_SERVICE)
    assert {(run.config.service, run.config.service_fallback) for run in runs} == {("imagenet", "local")}
