"""The same photographs give the same fingerprint in every layout, and a build of every layout can be resumed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from prep.build import plan
from prep.inputs.reader import ListOptions
from prep.inputs.sources import find_splits, list_source
from tests.helpers.building import Stopped, StoppingRunner
from tests.prep.inputs.formats.sample_data import (
    CLASSES,
    LAYOUTS,
    Pictures,
    build_all,
    class_folders,
    make_pictures,
    web_dataset_json,
)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return make_pictures()


@pytest.fixture(scope="module")
def by_folder(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the training split that is built from class folders."""
    root = tmp_path_factory.mktemp("by_folder")
    return build_all(class_folders(pictures, root / "photos"), root / "store").split("train").fingerprint


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_fingerprint_of_class_folders(
    name: str, pictures: Pictures, by_folder: str, tmp_path: Path
) -> None:
    source = LAYOUTS[name](pictures, tmp_path / "source")
    where = find_splits(source, None)["train"]
    assert where.layout == name.partition(",")[0]
    store = build_all(source, tmp_path / "store")
    assert store.classes == CLASSES
    assert store.split("train").fingerprint == by_folder
    # A second build of the same source into the finished store gives the same fingerprint.
    assert build_all(source, tmp_path / "store").fingerprint == store.fingerprint
    listed = list_source(where, "train")
    reader = pickle.loads(pickle.dumps(listed.reader))
    assert {item.path.decode(): reader.read(item) for item in listed.inputs} == pictures
    for item in listed.inputs:
        assert reader.head(item, 3) == b"\xff\xd8\xff"
    assert sorted(store.splits) == (["train", "val"] if "tiny" in name else ["train"])


@pytest.mark.parametrize("name", ["class-tars", "zip, deflate", "tiny-imagenet", "webdataset", "parquet", "csv"])
def test_an_interrupted_build_is_resumed(
    name: str, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_MIN_SHARD_RECORDS", 2)
    source = LAYOUTS[name](pictures, tmp_path / "source")
    whole = build_all(source, tmp_path / "whole", splits=("train",))
    with pytest.raises(Stopped):
        build_all(source, tmp_path / "store", splits=("train",), runner=StoppingRunner())
    shard = tmp_path / "store" / "train" / "00000" / "data.mdb"
    before = shard.stat().st_mtime_ns
    assert build_all(source, tmp_path / "store", splits=("train",)).fingerprint == whole.fingerprint
    assert shard.stat().st_mtime_ns == before
    assert not (tmp_path / "store" / "train" / ".build").exists()


def test_numbers_as_labels_get_names_from_a_class_file(pictures: Pictures, by_folder: str, tmp_path: Path) -> None:
    """The keys of this data set have no folders, and the labels are positions. --classes names the classes."""
    source = web_dataset_json(pictures, tmp_path / "source")
    assert build_all(source, tmp_path / "numbers").classes == ("0", "1")
    (tmp_path / "classes.txt").write_text("n01 tench\nn02 goldfish\n")
    store = build_all(source, tmp_path / "store", ListOptions(class_file=tmp_path / "classes.txt"))
    assert store.classes == CLASSES
    assert store.split("train").fingerprint == by_folder
