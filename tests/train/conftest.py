"""Fixtures: runs of a small network that are trained once for all tests, and a limit on the size of files.

The limit on the size of files simulates a full disk. A test that writes into `uninterrupted_run` or `small_run` must
use a copy of the folder.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.small_training import SMALL_ALEXNET, small_config
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.runs.run import Run
from train.trainer.loop import fit


@pytest.fixture(scope="session")
def uninterrupted_run(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `small_config` on the store of JPEG records. The run was trained without an interruption."""
    return fit(Run.open(small_config(stores["jpeg"], tmp_path_factory.mktemp("uninterrupted") / "run")))


@pytest.fixture(scope="session")
def small_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps of 10 images on `store`."""
    run_dir = tmp_path_factory.mktemp("small") / "run"
    config = RunConfig(store, SHORT, 10, model=SMALL_ALEXNET, run_dir=run_dir, epochs=2, log_every=1, threads=1)
    return fit(Run.open(config))


@pytest.fixture
def trained_run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of `small_run`, into which a test may write."""
    return Path(shutil.copytree(small_run, tmp_path / "trained"))


LimitFileSize = Callable[[int | None], None]


@pytest.fixture
def limit_file_size() -> Iterator[LimitFileSize]:
    """After limit_file_size(n), a write that extends a file beyond n bytes fails with EFBIG.

    limit_file_size(None) removes the limit.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size_bytes: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size_bytes is None else (size_bytes, before[1]))

    yield limit
    limit(None)
