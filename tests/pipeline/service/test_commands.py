"""Tests of `alexstream serve`, `status` and `stop` in a running cluster, and of the text that they print."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from pipeline.cli import main
from pipeline.cli.service_text import progress_line, ready_line, state_lines
from pipeline.loader import train_loader
from pipeline.service import control
from tests.pipeline.service.conftest import TestCluster


class Commands:
    """Runs `alexstream` commands in this process, which is connected to the cluster."""

    def __init__(self, cluster: TestCluster, store: Path) -> None:
        self.cluster, self.store = cluster, store

    def run(self, command: str, *options: str) -> Result:
        result = CliRunner().invoke(main, [command, *options, "--cluster", self.cluster.address])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    def serve(self, name: str, *options: str) -> Result:
        return self.run("serve", "--store", str(self.store), "--name", name, *options)

    def fails(self, command: str, *options: str) -> str:
        """Run a command that must fail with exit code 1 and one line, and return this line."""
        result = self.run(command, *options)
        assert result.exit_code == 1 and result.output.count("\n") == 1, result.output
        return result.output

    def names(self) -> list[str]:
        return [json.loads(line)["name"] for line in self.run("status", "--json").stdout.splitlines()]


@pytest.fixture
def alexstream(cluster: TestCluster, store: Path) -> Iterator[Commands]:
    commands = Commands(cluster, store)
    yield commands
    for name in commands.names():
        commands.run("stop", "--name", name)


def test_a_service_is_started_used_shown_and_stopped(alexstream: Commands) -> None:
    started = alexstream.serve("photos", "--workers", "2:3", "--ahead", "4", "--json")
    assert started.exit_code == 0, started.output
    state = json.loads(started.stdout)
    assert len(state["workers"]) == 2
    assert (state["min_workers"], state["max_workers"], state["threads"], state["ahead"]) == (2, 3, 1, 4)

    where = f"photos@{alexstream.cluster.address}"
    with (
        train_loader(alexstream.store, 5, seed=3, service=where) as shared,
        train_loader(alexstream.store, 5, seed=3) as local,
    ):
        pairs = list(zip(shared, local, strict=True))
        shown = json.loads(alexstream.run("status", "--name", "photos", "--json").stdout)
        text = alexstream.run("status").stdout
    assert len(pairs) == 6
    for ours, expected in pairs:
        assert torch.equal(ours.images, expected.images) and torch.equal(ours.labels, expected.labels)
    assert shown["images_made"] >= 30 and [consumer["seed"] for consumer in shown["consumers"]] == [3]
    assert f"photos: {alexstream.store}" in text and "train with seed 3, batch" in text

    stopped = alexstream.run("stop", "--name", "photos")
    assert stopped.exit_code == 0 and "Stopped service photos." in stopped.output
    missing = alexstream.fails("status", "--name", "photos")
    assert "has no such service (services of the cluster: none). Start the service with: alexstream serve" in missing
    assert "has no such service" in alexstream.fails("stop", "--name", "photos")


def test_status_without_a_name_shows_all_services_of_the_cluster(alexstream: Commands) -> None:
    nothing = alexstream.run("status")
    assert nothing.exit_code == 0 and "has no services. Start a service with: alexstream serve" in nothing.output
    for name in ("second", "first"):
        assert alexstream.serve(name, "--workers", "0:1").exit_code == 0
    assert alexstream.names() == ["first", "second"]


@pytest.mark.soak
def test_the_largest_number_of_workers_is_what_fits_on_the_nodes(alexstream: Commands) -> None:
    """The nodes have two and three cores. Each node has room for one worker with two cores."""
    assert json.loads(alexstream.serve("narrow", "--json").stdout)["max_workers"] == 5
    assert json.loads(alexstream.serve("wide", "--threads", "2", "--json").stdout)["max_workers"] == 2


@pytest.mark.soak
def test_a_name_that_is_taken_is_refused_and_its_service_goes_on(alexstream: Commands) -> None:
    assert alexstream.serve("taken").exit_code == 0
    before = alexstream.run("status", "--name", "taken", "--json").stdout
    error = alexstream.fails("serve", "--store", str(alexstream.store), "--name", "taken")
    assert (
        "service taken: the cluster already has a service of this name. Stop the service with: alexstream stop" in error
    )
    after = alexstream.run("status", "--name", "taken", "--json").stdout
    assert json.loads(after)["workers"] == json.loads(before)["workers"]


def test_workers_that_fit_on_no_node_are_refused_unless_the_service_may_have_none(alexstream: Commands) -> None:
    error = alexstream.fails("serve", "--store", str(alexstream.store), "--threads", "9")
    assert (
        "a worker needs a node with 9 cores, but the largest node of" in error
        and "has 3. Choose --threads 3 or" in error
    )
    assert alexstream.names() == []
    assert alexstream.serve("later", "--threads", "9", "--workers", "0:2").exit_code == 0


@pytest.mark.soak
def test_a_store_that_differs_on_all_nodes_ends_the_start_with_the_reason(
    alexstream: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_config = control.make_config

    def of_another_store(*settings: Any, **more: Any) -> Any:
        return replace(make_config(*settings, **more), fingerprints={"train": "0123456789abcdef0123"})

    monkeypatch.setattr(control, "make_config", of_another_store)
    error = alexstream.fails("serve", "--store", str(alexstream.store), "--name", "other")
    assert f"service other: no node can serve {alexstream.store}." in error
    assert "split train has fingerprint" in error and "the service expects 0123456789abcdef" in error
    assert alexstream.names() == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--store", "nowhere"], 1, "nowhere: no such store"),
        (["--name", "a@b"], 2, "'a@b': expected letters, digits, dots, hyphens and underscores"),
        (["--workers", "few"], 2, "'few': expected MIN:MAX or one number"),
        (["--workers", "3:2"], 1, "workers 3:2: expected MIN:MAX"),
        (["--cluster", "ray://head:10001"], 2, "Ray Client is not supported"),
        (["--cluster", "head"], 2, "cluster 'head': expected local, auto or HOST:PORT"),
    ],
)
def test_wrong_options_are_refused_before_a_cluster_starts(
    store: Path, options: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After the next line, `import ray` fails. A command that tried to start Ray would print an error about the import.
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(main, ["serve", "--store", str(store), *options])
    assert result.exit_code == code and message in result.output


@pytest.mark.parametrize("command", ["serve", "status", "stop"])
def test_without_ray_the_commands_say_how_to_install_it(
    store: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("ALEXNET_STORE", str(store))
    result = CliRunner().invoke(main, [command])
    assert result.exit_code == 1
    assert result.output.endswith(
        "Error: Ray is not installed. Install Ray with: pip install 'ray[default]>=2.60,<3'\n"
    )


def example_state(**changes: Any) -> dict[str, Any]:
    """Return an example of the state that a coordinator returns."""
    worker = {"host": "left", "node": "ab12", "pid": 7, "blocks": 1}
    consumer = {"name": "gpu/9/12ab", "split": "train", "seed": 3, "position": 1234, "shares": True}
    state: dict[str, Any] = {
        "name": "photos",
        "store": "/data/store",
        "up_s": 200.0,
        "min_workers": 2,
        "max_workers": 8,
        "threads": 4,
        "workers": [worker, worker | {"host": "right"}, worker],
        "starting": 1,
        "unused_nodes": [{"node": "cd34", "host": "bare", "why": "/data/store: no such store."}],
        "last_fault": "a worker could not start: ModuleNotFoundError",
        "consumers": [consumer, consumer | {"split": "val", "seed": None, "shares": False}],
        "queue": 1,
        "kept_bytes": 19_300_000,
        "images_made": 12_800,
        "retries": 2,
    }
    return state | changes


def test_the_state_as_text() -> None:
    assert state_lines(example_state()) == [
        "photos: /data/store, up 3 min 20 s",
        "  workers    3 ready, 1 starting (2 to 8, each 4 threads)",
        "             left: 2 workers",
        "             right: 1 worker",
        "  not used   bare: /data/store: no such store.",
        "  fault      a worker could not start: ModuleNotFoundError",
        "  consumers  2",
        "             gpu/9/12ab: train with seed 3, batch 1,234",
        "             gpu/9/12ab: val, batch 1,234, reads alone",
        "  batches    1 batch in the queue, 19.3 MB kept for consumers; 12,800 images made, 2 retries",
    ]
    assert progress_line(example_state(), 2560.4) == (
        "2,560 images/s, 3 workers, 2 consumers, queue 1, 19.3 MB kept, 12,800 images made"
    )


def test_a_service_without_enough_workers_is_not_called_ready() -> None:
    assert ready_line(example_state(), "Stop it.") == "Service photos is ready. Stop it."
    assert ready_line(example_state(workers=[]), "Stop it.") == (
        "Service photos waits for 2 workers: each needs a node with 4 free cores and the store. See: alexstream "
        "status. Stop it."
    )


def test_the_object_store_of_a_local_cluster_holds_the_batches_of_two_streams(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = 10**12
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**8}[name])
    assert control.object_store_bytes(16) == 2 * (16 + 4) * 512 * (224 * 224 * 3 + 8)
    assert control.object_store_bytes(1024) == 0.3 * 4096 * 10**8
    free = 2 * 10**9
    assert control.object_store_bytes(16) == 0.9 * free
    assert capsys.readouterr().err == ""
    free = 64_000_000
    assert control.object_store_bytes(16) > 80_000_000
    assert "/dev/shm has 64.0 MB free, expected 80.0 MB or more" in capsys.readouterr().err
