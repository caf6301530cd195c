"""Fixtures for builds in parts: photographs that fill eight shards, and stores built from these photographs."""

from __future__ import annotations

from pathlib import Path

import pytest

from prep.build import parts
from prep.build.parts import PartResult
from prep.store.manifest import Store
from tests.helpers.building import build, make_pictures
from tests.prep.build.parts.part_builds import IMAGES, run_part


@pytest.fixture(scope="package")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("parts") / "photos", IMAGES, (60, 80), distinct=6)


@pytest.fixture(scope="package")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store that a build without parts makes from the same photographs."""
    store = build(photos, tmp_path_factory.mktemp("whole") / "store")
    assert len(store.split("train").shards) == 8
    return store


@pytest.fixture
def all_shards(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An unfinished build in two parts: all shards are finished, but the manifest is not written."""
    store = tmp_path / "all_shards"
    with monkeypatch.context() as patch:
        patch.setattr(parts, "_finish", lambda plan, store, part, policy: PartResult(0, None, {}))
        for number in (1, 2):
            run_part(photos, store, number, 2)
    assert not (store / "manifest.json").exists()
    return store
