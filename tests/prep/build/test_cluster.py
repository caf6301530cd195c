"""Tests of builds on a Ray cluster of several nodes, all on this machine.

Some tests kill nodes, workers or the driver, which is the process of the command. Every store must equal the store of a
build without a cluster.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prep import cluster_runner
from prep.build.plan import tool_versions
from prep.build.split import build_split
from prep.cluster import connected
from prep.cluster_nodes import worker_nodes
from prep.cluster_runner import ClusterRunner
from prep.console import Progress, UserError
from prep.store.manifest import Store
from prep.workers import Counts, TaskProgress, WorkerDied
from tests.helpers.building import DEADLINE_S, PPM, SKIP, STRICT, BuildCommand, is_alive, make_pictures, process_group
from tests.helpers.project import own_namespaces
from tests.prep.build.parts.part_builds import (
    IMAGES,
    WORDS,
    ActingProgress,
    CrashingReader,
    MarkingReader,
    SlowReader,
    add_node,
    alexprep,
    assert_same,
    source_with,
    start_cluster,
    tree,
)
from tests.prep.test_workers import die, fail, square

_PRELOAD = "prep.build.shard_task"


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Any, ModuleType]]:
    """The pair (cluster, module ray). The process of the tests is connected to the cluster."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cluster = start_cluster()
    try:
        with connected(cluster.address) as ray:
            yield cluster, ray
    finally:
        cluster.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def runner(nodes: tuple[Any, ModuleType]) -> Iterator[ClusterRunner]:
    with ClusterRunner(nodes[0].address, None, _PRELOAD) as started:
        assert started.jobs == 2
        yield started


# The runner


def test_results_and_counts_are_those_of_the_local_pool(runner: ClusterRunner) -> None:
    seen: list[Counts] = []
    results = dict(runner.map(square, range(9), seen.append))
    assert {task: value for task, (value, _) in results.items()} == {task: task**2 for task in range(9)}
    assert seen[-1] == Counts(9, 4, 10 * sum(range(9)))
    assert len({pid for _, pid in results.values()}) <= 2


def test_a_crashed_worker_process_is_reported_with_its_input_and_exit_code(runner: ClusterRunner) -> None:
    tasks = [(2, signal.SIGKILL, 5), (-1, 0, 5), (3, 0, 5), (0, signal.SIGSEGV, 1)]
    results = dict(runner.map(die, tasks, lambda counts: None))
    died = [WorkerDied(2, -signal.SIGKILL), 5, WorkerDied(3, 3), WorkerDied(0, -signal.SIGSEGV)]
    assert [results[task] for task in tasks] == died


def test_errors_of_tasks_are_raised_by_the_driver(runner: ClusterRunner) -> None:
    with pytest.raises(UserError, match=r"^expected$"):
        list(runner.map(fail, [None, UserError("expected")], lambda counts: None))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in fail.*KeyError: 'cause'"):
        list(runner.map(fail, [KeyError("cause")], lambda counts: None))


def kill_parent(task: tuple[Path, int], task_progress: TaskProgress) -> int:
    """Kill the Ray worker in the first `times` runs of the task. Ray does the same on a node that lacks memory."""
    folder, times = task
    runs = len(list(folder.iterdir())) + 1
    (folder / str(runs)).touch()
    if runs <= times:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return runs


def test_a_lost_task_is_submitted_again_and_no_input_is_reported_as_the_cause(
    runner: ClusterRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "once").mkdir()
    assert [result for _, result in runner.map(kill_parent, [(tmp_path / "once", 2)], lambda counts: None)] == [3]
    monkeypatch.setattr(cluster_runner, "_LOST_LIMIT", 2)
    (tmp_path / "always").mkdir()
    with pytest.raises(UserError, match=r"^A task was lost 2 times on the cluster.*worker died.*fewer --jobs"):
        list(runner.map(kill_parent, [(tmp_path / "always", 99)], lambda counts: None))
    assert len(list((tmp_path / "always").iterdir())) == 2


def note_pid(task: Path, task_progress: TaskProgress) -> None:
    (task / str(os.getpid())).touch()
    time.sleep(60)


def test_no_worker_process_goes_on_after_the_results_are_closed(runner: ClusterRunner, tmp_path: Path) -> None:
    def stop_when_both_run(counts: Counts) -> None:
        if len(list(tmp_path.iterdir())) == 2:
            raise InterruptedError

    with (
        pytest.raises(InterruptedError),
        closing(runner.map(note_pid, [tmp_path] * 3, stop_when_both_run)) as results,
    ):
        list(results)
    assert [path.name for path in tmp_path.iterdir() if is_alive(int(path.name))] == []


def test_a_head_node_that_is_gone_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(__import__("socket").create_server(("127.0.0.1", 0))) as server:
        head = cluster_runner._HeadNode(f"127.0.0.1:{server.getsockname()[1]}", "auto")
        monkeypatch.setattr(cluster_runner, "_HEAD_EVERY_S", -1.0)
        monkeypatch.setattr(cluster_runner, "_HEAD_LOST_S", 0.3)
        time.sleep(0.4)
        head.check()
    head.check()
    time.sleep(0.4)
    with pytest.raises(UserError, match=r"^cluster auto: the head node 127\.0\.0\.1 has not answered for"):
        head.check()


# Builds


def test_the_store_equals_that_of_a_build_without_a_cluster(
    runner: ClusterRunner, nodes: tuple[Any, ModuleType], photos: Path, whole: Store, tmp_path: Path
) -> None:
    progress = ActingProgress()
    build_split(source_with(SlowReader(photos)), tmp_path / "store", PPM, runner, progress)
    assert_same(tmp_path / "store", whole)
    steps = [done for done in progress.all_done if 0 < done < IMAGES]
    # A shard has 56 or 57 inputs. A count such as 30 therefore includes inputs of unfinished shards.
    assert len(set(steps)) > 4 and any(done % 56 for done in steps)
    words = ("--store", tmp_path / "store", "--cluster", nodes[0].address)
    verified = alexprep("verify", *words)
    assert verified.exit_code == 0 and "450 records of train agree" in verified.stdout, verified.output
    stats = alexprep("pca-stats", "--recompute", *words)
    assert stats.exit_code == 0 and "differ from these by at most 0.0000" in stats.stdout, stats.output


def test_import_caffe_on_a_cluster_gives_the_same_store(
    nodes: tuple[Any, ModuleType], whole: Store, tmp_path: Path
) -> None:
    """The input of import-caffe is a shard of another store. Every shard is an LMDB of Caffe Datums."""
    words = ("import-caffe", whole.root / "train" / "00000", *WORDS, "--json", "--store")
    results = [alexprep(*words, tmp_path / "pool"), alexprep(*words, tmp_path / "ray", "--cluster", nodes[0].address)]
    assert [result.exit_code for result in results] == [0, 0], results[1].output
    here, there = (json.loads(result.stdout) for result in results)
    assert here["fingerprint"] == there["fingerprint"] and there["records"] == 56


def test_a_node_that_is_killed_during_a_build_is_replaced_by_the_other_nodes(
    nodes: tuple[Any, ModuleType],
    photos: Path,
    whole: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The node is killed while it builds a shard. Another node builds the shard again, and no input counts as bad.

    Ray must not print its messages about the node to standard output, where --json prints results.
    """
    cluster, marker = nodes[0], tmp_path / "marker"
    lost: list[str] = []
    real = cluster_runner._lost

    def count_lost(run: Any, failure: Exception) -> Any:
        lost.append(type(failure).__name__)
        return real(run, failure)

    monkeypatch.setattr(cluster_runner, "_lost", count_lost)
    doomed = add_node(cluster, num_cpus=2, env_vars={"ALEXNET_DOOMED": "1"})
    progress = ActingProgress(marker.exists, lambda: cluster.remove_node(doomed, allow_graceful=False))
    with ClusterRunner(cluster.address, 4, _PRELOAD) as runner:
        build_split(source_with(MarkingReader(photos, marker)), tmp_path / "store", PPM, runner, progress)
    assert progress.has_acted and lost and set(lost) <= {"NodeDiedError", "WorkerCrashedError"}
    assert capfd.readouterr().out == ""
    assert_same(tmp_path / "store", whole)


def test_a_file_that_kills_its_worker_process_twice_is_left_out_with_on_bad_skip(
    runner: ClusterRunner, photos: Path, tmp_path: Path
) -> None:
    source = source_with(CrashingReader(photos))
    with pytest.raises(UserError, match=r"^n\d/n\d_100\.JPEG: a worker process was killed \(SIGKILL\) at this"):
        build_split(source, tmp_path / "store", PPM, runner, Progress(IMAGES, "pictures"), STRICT)
    store = build_split(source, tmp_path / "store", PPM, runner, Progress(IMAGES, "pictures"), SKIP)
    assert store.split("train").account["bad"] == {"killed the process that read it, twice": 1}
    assert store.split("train").records == IMAGES - 1


@pytest.fixture
def large_photos(tmp_path: Path) -> Path:
    """A folder of 960 images. A build of this folder has 32 shards and takes some seconds."""
    return make_pictures(tmp_path / "large", 960, (400, 440), distinct=6)


def test_a_killed_driver_and_the_same_command_again_give_the_same_store(
    nodes: tuple[Any, ModuleType], large_photos: Path, tmp_path: Path
) -> None:
    """The second command starts at once, while tasks of the killed driver may still be running."""
    store, words = tmp_path / "store", ("--cluster", nodes[0].address)
    command = BuildCommand(large_photos, store, *words)
    command.wait_for_shards(2)
    command.kill()
    command.process.wait()
    kept = command.shard_summaries()
    again = BuildCommand(large_photos, store, *words)
    code, _, stderr = again.end()
    command.end()
    assert code == 0, stderr
    assert "resuming" in stderr and len(kept) >= 2
    plain = BuildCommand(large_photos, tmp_path / "whole")
    assert plain.end()[0] == 0
    assert_same(store, Store.open(tmp_path / "whole"))


def test_sigterm_stops_the_tasks_before_the_lock_is_released(
    nodes: tuple[Any, ModuleType], large_photos: Path, tmp_path: Path
) -> None:
    command = BuildCommand(large_photos, tmp_path / "store", "--cluster", nodes[0].address)
    command.wait_for_shards(1)
    command.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = command.end()
    before = tree(tmp_path / "store")
    assert (code, stdout) == (143, ""), stderr
    assert stderr.strip().splitlines()[-1] == "Interrupted. Run the same command again to continue from here."
    time.sleep(1)
    assert tree(tmp_path / "store") == before


# Checks before the start


@pytest.fixture(scope="module")
def other_machine(nodes: tuple[Any, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose content a third node sees differently, because the third node has its own mounts.

    On the third node, the folder `hidden` is empty, and the file `file` is longer. There, the file `pillow` takes the
    place of the METADATA of Pillow, so a test can change the version of Pillow.
    """
    folder = tmp_path_factory.mktemp("machine")
    installed = Path(str(distribution("pillow")._path)) / "METADATA"  # type: ignore[attr-defined]
    (folder / "hidden").mkdir()
    (folder / "hidden" / "photos").mkdir()
    (folder / "empty").mkdir()
    (folder / "pillow").write_bytes(installed.read_bytes())
    (folder / "file").write_bytes(b"four")
    (folder / "longer").write_bytes(b"seven77")
    mounts = [("empty", folder / "hidden"), ("longer", folder / "file"), ("pillow", installed)]
    script = "".join(f"mount --bind '{folder / name}' '{at}' && " for name, at in mounts)
    ray_command = f"'{sys.executable}' -m ray.scripts.scripts start --address {nodes[0].address} --num-cpus 1 --block"
    own_mounts = own_namespaces("--mount")
    process = subprocess.Popen(
        [*own_mounts, "sh", "-c", f"{script} exec {ray_command} --node-name other --object-store-memory 100000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while all(node["NodeName"] != "other" for node in worker_nodes(nodes[1])):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield folder
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        for pid in process_group(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_node_that_sees_other_files_or_has_other_software_is_named(
    runner: ClusterRunner, other_machine: Path, tmp_path: Path
) -> None:
    runner.check_machines(tmp_path, tmp_path, tool_versions)
    hidden = other_machine / "hidden" / "photos"
    with pytest.raises(
        UserError, match=r"node \S+ other \(.*does not see the same .*: No such file or directory on that node, a fold"
    ):
        runner.check_machines(tmp_path, hidden, tool_versions)
    with pytest.raises(UserError, match=r" other \(.*: a file of 7 bytes on that node, a file of 4 bytes on"):
        runner.check_machines(tmp_path, other_machine / "file", tool_versions)
    with pytest.raises(UserError, match=r" other \(.* does not see the folder .*hidden of this machine"):
        runner.check_machines(other_machine / "hidden", tmp_path, tool_versions)
    assert list(tmp_path.iterdir()) == [] and tree(other_machine / "hidden") == ["photos"]
    description = (other_machine / "pillow").read_text()
    present = tool_versions()["pillow"]
    (other_machine / "pillow").write_text(description.replace(f"Version: {present}", "Version: 1.2.3"))
    with pytest.raises(UserError, match=rf" other \(.* has pillow 1\.2\.3, this machine has {present}\."):
        runner.check_machines(tmp_path, tmp_path, tool_versions)
    (other_machine / "pillow").write_text(description)


def test_a_build_is_refused_before_it_begins_if_a_node_does_not_see_the_source(
    nodes: tuple[Any, ModuleType], other_machine: Path, photos: Path, tmp_path: Path
) -> None:
    (other_machine / "hidden" / "photos" / "n1").mkdir()
    picture = next(photos.glob("*/*"))
    (other_machine / "hidden" / "photos" / "n1" / "1.JPEG").write_bytes(picture.read_bytes())
    words = ("--store", tmp_path / "store", "--cluster", nodes[0].address)
    result = alexprep("build-lmdb", other_machine / "hidden" / "photos", *words)
    assert result.exit_code == 1 and "does not see" in result.stderr and result.stderr.count("\n") == 1
    assert tree(tmp_path / "store") == [".lock"]


def test_without_ray_the_error_has_the_command_that_installs_it(tmp_path: Path) -> None:
    script = "import sys; sys.modules['ray'] = None; from prep.cli import main; main()"
    words = ["build-lmdb", str(tmp_path), "--cluster", "local"]
    ended = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    expected = "Error: Ray is not installed. Install Ray with: pip install 'ray[default]>=2.60,<3'\n"
    assert (ended.returncode, ended.stderr) == (1, expected)
