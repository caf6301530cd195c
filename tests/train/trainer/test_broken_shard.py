"""If a data.mdb is truncated during training, the run ends with exit code 74, and can be resumed from a checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.loader import TrainLoader
from prep.store.lmdb_file import ShardBroken
from tests.helpers.small_training import small_config
from train.runs.checkpoint import checkpoint_paths
from train.runs.run import Run
from train.trainer.loop import fit


def test_a_run_whose_shard_is_cut_keeps_its_checkpoints_and_can_go_on(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test truncates the shard before the batch of step 4. Batches that were prefetched may still be served."""
    store = Path(shutil.copytree(stores["jpeg"], tmp_path / "store"))
    file = store / "train" / "00000" / "data.mdb"
    content, get = file.read_bytes(), TrainLoader._get

    def cut_before_step_4(loader: TrainLoader, number: int) -> Any:
        if number == 3:
            os.truncate(file, 8192)
        return get(loader, number)

    run_dir = tmp_path / "run"
    monkeypatch.setattr(TrainLoader, "_get", cut_before_step_4)
    with pytest.raises(ShardBroken, match=r"train/00000: data\.mdb was changed or became unreadable") as broken:
        fit(Run.open(small_config(store, run_dir, epochs=7)))
    assert broken.value.exit_code == 74 and checkpoint_paths(run_dir)
    monkeypatch.setattr(TrainLoader, "_get", get)
    file.write_bytes(content)
    fit(Run.open(small_config(store, run_dir, epochs=7)))
    assert checkpoint_paths(run_dir)[-1].name == "checkpoint-00000021.pt"
