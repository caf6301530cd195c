"""Tests of tools.service_demo: background trainers, the choice of the killed node, the comparison, and Ctrl-C.

The complete demo takes minutes on a busy machine, so its test has the marker `soak`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from prep.console import UserError
from tests.helpers.project import ROOT
from tests.helpers.small_training import assert_same_result, small_config
from tools import service_demo
from tools.demo_processes import running, wait_for_trainers, wait_until
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.loop import fit

DEADLINE_S = 600.0  # longest time of each wait, long enough for a busy machine
STATUS: dict[str, Any] = {
    "workers": [{"node": "aa"}, {"node": "bb"}],
    "starting": 0,
    "consumers": [{}, {}],
    "images_made": 1_064,
    "retries": 1,
}


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run folders of a demo. For each seed, the two run folders are copies of one trained run."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in service_demo.SEEDS:
        run_dir = folder / f"service-{seed}"
        fit(Run.open(small_config(store, run_dir, seed=seed, stream_seed=service_demo.STREAM_SEED, epochs=1)))
        shutil.copytree(run_dir, folder / f"alone-{seed}")
    return folder


@pytest.fixture
def trained(runs: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for a demo. During the test, the demo copies the run folders of `runs` instead of training."""

    def copy(store: Path, folder: Path, *others: Any) -> dict[str, Any]:
        for run_dir in runs.iterdir():
            shutil.copytree(run_dir, folder / run_dir.name, dirs_exist_ok=True)
        return {"end": STATUS}

    monkeypatch.setattr(service_demo, "make_store", lambda folder: store)
    monkeypatch.setattr(service_demo, "train_with_service", copy)
    monkeypatch.setattr(service_demo, "train_alone", lambda store, folder, steps: None)
    return tmp_path / "demo"


def demo(*options: object) -> Result:
    return CliRunner().invoke(service_demo.main, [*map(str, options)])


def alter_weight(run_dir: Path) -> None:
    """Change one bit of one weight in the newest checkpoint of a run."""
    state = checkpoint.load_latest(run_dir)
    assert state is not None
    weight = state.parameters["conv3.weight"]
    changed = weight.clone().contiguous()
    changed.view(-1).view(torch.int32)[5] ^= 1
    checkpoint.write(run_dir, replace(state, parameters={**state.parameters, "conv3.weight": changed}))


def test_equal_runs_give_exit_code_0(trained: Path, runs: Path) -> None:
    result = demo("--folder", trained)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + 2 * 5 + 2 and all(line.endswith("  equal") for line in lines[1:-2])
    # Each run had 3 training batches of 8 images, and a validation with 12 images.
    assert lines[-2:] == [
        "10 results: all equal.",
        "Each of the two runs received 36 images. The service decoded 1,064: 36 once for both runs, and 1,028 that "
        "were read ahead, or decoded again because they had been lost or dropped.",
    ]


def test_one_different_bit_of_a_weight_gives_exit_code_1(
    trained: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_demo, "train_alone", lambda store, folder, steps: alter_weight(folder / "service-2"))
    result = demo("--folder", trained)
    assert result.exit_code == 1
    different = [line.split() for line in result.stdout.splitlines() if line.endswith("DIFFERENT")]
    assert [line[:2] for line in different] == [["2", "weights"]] and different[0][-3] != different[0][-2]
    assert "10 results: 1 different." in result.stdout

    shutil.rmtree(trained)
    as_json = json.loads(demo("--folder", trained, "--json").stdout)
    rows = as_json["results"]
    assert as_json["equal"] is False and [row["equal"] for row in rows].count(False) == 1
    assert len({row["service"] for row in rows}) > 5


def test_other_batches_and_missing_results_are_different(trained: Path, runs: Path) -> None:
    """Runs with different seeds differ in all results. The name of a result contains the step of the checkpoint."""
    service_demo.train_with_service(Path(), trained)
    shutil.rmtree(trained / "alone-1")
    shutil.copytree(trained / "alone-2", trained / "alone-1")
    rows = [row for row in service_demo.compare_runs(trained) if row["seed"] == 1]
    assert len(rows) == 5 and not any(row["equal"] for row in rows)
    state = checkpoint.load_latest(trained / "alone-2")
    assert state is not None
    checkpoint.write(trained / "alone-2", replace(state, step=state.step + 1))
    rows = [row for row in service_demo.compare_runs(trained) if row["seed"] == 2]
    assert [row["alone"] is None for row in rows].count(True) == 2 and "missing" in service_demo.table(rows)


@pytest.mark.soak
def test_a_short_trainer_ends_and_a_long_trainer_is_stopped(store: Path, tmp_path: Path) -> None:
    """A short trainer runs to its end. A long trainer gets SIGTERM at the end of the `with` block."""
    options = ["--store", str(store), "--gpus", "cpu", "--model", "half", "--recipe", "short", "--batch", "8"]
    with running([(tmp_path / "short", [*options, "--steps", "1"]), (tmp_path / "long", options)]) as trainers:
        wait_until(lambda: trainers[0].ended() and trainers[1].step >= 1, "first step", DEADLINE_S)
        assert trainers[0].step == 1 and not trainers[1].ended()
        with pytest.raises(UserError, match="later: waited for 0 s"):
            wait_until(lambda: trainers[1].ended(), "later", 0.3)
    assert trainers[1].process.poll() is not None
    status = json.loads((tmp_path / "long" / "status.json").read_text())
    assert status["state"] == "stopped" and "SIGTERM" in status["said"]


def test_a_trainer_that_fails_ends_the_wait_with_its_last_line(store: Path, tmp_path: Path) -> None:
    with running([(tmp_path / "run-1", ["--store", str(tmp_path / "absent")])]) as trainers:
        with pytest.raises(UserError, match=r"run-1: alextrain run ended with exit code 1: .*absent"):
            wait_for_trainers(trainers)


def test_the_seed_chooses_a_step_in_the_middle_and_a_node_without_the_coordinator() -> None:
    choices = [service_demo.choose_kill(seed, 24, ["a", "b"], "head") for seed in range(200)]
    assert {node for node, _ in choices} == {"a", "b"} and {step for _, step in choices} == set(range(8, 17))
    assert choices == [service_demo.choose_kill(seed, 24, ["a", "b"], "head") for seed in range(200)]
    assert {service_demo.choose_kill(seed, 3, ["a", "b"], "a")[0] for seed in range(50)} == {"b"}


def test_the_status_names_nodes_and_counts() -> None:
    names = {"aa": "node 1", "bb": "node 2"}
    assert service_demo.status_text(STATUS, names) == (
        "2 workers on node 1 and node 2, 0 starting; 2 consumers; 1,064 images decoded; 1 batch made again"
    )
    assert service_demo.status_text({**STATUS, "workers": [], "starting": 2}, names).startswith(
        "0 workers, 2 starting;"
    )


def test_a_folder_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    result = demo("--folder", tmp_path)
    assert result.exit_code == 1 and f"--folder {tmp_path}: exists. Name a new folder" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_help_loads_neither_ray_nor_torch() -> None:
    script = (
        "import sys\nfrom tools.service_demo import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit(str({'ray', 'torch', 'numpy', 'sklearn', 'nvidia'} & set(sys.modules)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == "set()" and "python -m tools.service_demo --seed 3" in ended.stdout


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short path, because the paths of Ray's sockets may have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of all processes whose command line contains `folder`."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            lines.append(line)
    return lines


def start_demo(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start the demo in its own session. All of its files are in `folder`."""
    command = [sys.executable, "-m", "tools.service_demo", *options]
    environment = {**os.environ, "TMPDIR": str(folder)}
    # If this process ignores SIGINT, the demo would also ignore it. The default handler is therefore set first.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("gcs_server", id="while nodes start", marks=pytest.mark.soak),
        pytest.param("alextrain run", id="while runs train", marks=pytest.mark.soak),
    ],
)
def test_ctrl_c_leaves_no_process_and_no_file(short_folder: Path, program: str) -> None:
    """The test sends SIGINT as soon as a process whose command line contains `program` is running."""
    with start_demo(short_folder) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not any(program in line for line in processes_of(short_folder)):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert "Interrupted. The trainers and the cluster are stopped." in errors and "Traceback" not in errors
    deadline = time.monotonic() + 30
    while (left := processes_of(short_folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left and not list(short_folder.iterdir())


@pytest.mark.soak
def test_runs_on_a_service_whose_node_is_killed_have_the_weights_of_runs_without_a_service(short_folder: Path) -> None:
    with start_demo(short_folder, "--folder", str(short_folder / "demo"), "--steps", "12", "--json") as process:
        try:
            output, errors = process.communicate(timeout=1800)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    result = json.loads(output)
    assert result["equal"] and len(result["results"]) == 10 and all(row["equal"] for row in result["results"])
    assert len(result["before"]["workers"]) == 2 and len(result["after"]["workers"]) == 1
    assert 4 <= result["killed"]["chosen_step"] <= 8 and max(result["killed"]["steps"]) >= 4
    # Each run received 12 batches of 8 images, and validated once with 20 images. Most images were decoded once for
    # both runs.
    assert result["images_of_a_run"] == 12 * 8 + 20
    assert 12 * 8 + 20 <= result["end"]["images_made"] < 2 * (12 * 8 + 20)
    for seed in service_demo.SEEDS:
        folders = [short_folder / "demo" / f"{name}-{seed}" for name in service_demo.RUNS]
        assert_same_result(*folders)
    assert not processes_of(short_folder)
