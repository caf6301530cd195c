"""Fixture: a run in two processes without a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.torchrun.job import TorchrunServer
from tests.train.replicas.small_runs import start_training


@pytest.fixture(scope="package")
def undisturbed_pair(
    torchrun: TorchrunServer, stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run in two processes without a fault, for comparison."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    job = start_training(torchrun, 2, stores["ppm"], run_dir)
    assert job.wait() == 0, job.stderr
    return run_dir
