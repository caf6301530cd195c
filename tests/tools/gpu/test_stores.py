"""The GPU check makes a store of JPEG records and a store of PPM records, and uses existing stores again."""

from __future__ import annotations

from pathlib import Path

import pytest

import tools.gpu.stores as stores
from prep.console import UserError
from prep.store.manifest import Store


def test_two_stores_are_made_with_copies_of_each_photograph_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stores.make_stores(tmp_path / "stores", copies=3, photographs=12)
    assert list(made) == ["jpeg", "ppm"]
    for format, path in made.items():
        store = Store.open(path)
        assert store.settings.format == format and store.settings.side_px == 256
        assert list(store.splits) == ["train"] and store.split("train").records == 3 * 10
    assert sorted(path.name for path in (tmp_path / "stores").iterdir()) == ["jpeg", "ppm"]
    monkeypatch.setattr(stores, "make_dataset", None)
    assert stores.make_stores(tmp_path / "stores") == made


def test_a_build_that_fails_is_an_error_with_its_message(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="alexprep build-lmdb: exit code 1"):
        stores.build_store(tmp_path / "empty", tmp_path / "store", "ppm")
