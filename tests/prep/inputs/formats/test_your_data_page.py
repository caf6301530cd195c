"""The tests run every command and the Python example of docs/guides/your-data.md, on small data sets."""

from __future__ import annotations

import shlex
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest
from click.testing import CliRunner

import prep.cli.build
import prep.cli.merge
from prep.build import from_python
from prep.cli import main
from prep.store.datum import Datum
from prep.store.manifest import Store
from tests.helpers.building import InlineRunner
from tests.helpers.project import ROOT
from tests.prep.inputs.formats.sample_data import (
    CLASSES,
    Pictures,
    class_folders,
    class_tars,
    csv_file,
    make_pictures,
    parquet,
    put,
    tiny_imagenet,
    web_dataset_json,
    zip_of,
    zipped,
)

PAGE = (ROOT / "docs" / "guides" / "your-data.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    alexprep ")]
# Stores on the page that must have the same fingerprint: they have the same photographs, names and classes.
SAME = ("store", "ilsvrc-train", "class-tars", "from-zip", "from-tar", "from-shards", "from-parquet", "from-csv")


@contextmanager
def inline_runner(*args: Any, **options: Any) -> Iterator[InlineRunner]:
    yield InlineRunner()


def make_data(pictures: Pictures, root: Path) -> None:
    """Write every SOURCE that the page names."""
    photos = class_folders(pictures, root / "photos")
    class_tars(pictures, root / "ILSVRC2012_img_train")
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as tar:
        for path in sorted((root / "ILSVRC2012_img_train").iterdir()):
            tar.add(path, path.name)
    with tarfile.open(root / "photos.tar", "w") as tar:
        tar.add(photos, "photos")
    zip_of(zipfile.ZIP_DEFLATED)(pictures, root / "photos")
    zipped(tiny_imagenet)(pictures, root / "tiny-imagenet-200")
    parquet(pictures, root / "imagenet-1k")
    csv_file(pictures, root)
    (root / "shards").mkdir()
    web_dataset_json(pictures, root / "shards" / "photos-0000")
    kaggle, places = root / "imagenet-object-localization-challenge", root / "places365"
    truth, labels = ["ImageId,PredictionString\n"], []
    for number, (name, content) in enumerate(pictures.items(), 34):
        folder, _, file = name.partition("/")
        image = f"ILSVRC2012_val_{number:08d}"
        put(root / "pictures" / f"{image}.JPEG", content)
        put(kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "train" / name, content)
        put(kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"{image}.JPEG", content)
        letter = "ab"[CLASSES.index(folder)]
        put(places / "train" / letter / folder / file, content)
        put(places / "val" / letter / folder / f"{image}.jpg", content)
        put(root / "imagenetv2-matched-frequency-format-val" / str(CLASSES.index(folder)) / file, content)
        put(root / "more-photos" / folder / f"more_{file}", content)
        labels.append(f"{image}.JPEG {folder}\n")
        truth.append(f"{image},{folder} 1 2 3 4\n")
    put(kaggle / "LOC_val_solution.csv", "".join(truth).encode())
    shutil.make_archive(str(kaggle), "zip", kaggle)
    put(root / "labels.txt", "".join(labels).encode())
    put(root / "blacklist.txt", b"36\n")
    put(root / "imagenet100.txt", b"n02\n")
    put(root / "classes.txt", b"n01 tench\nn02 goldfish\n")
    with lmdb.open(str(root / "ilsvrc12_train_lmdb"), map_size=1 << 20) as env, env.begin(write=True) as txn:
        for number, (name, content) in enumerate(pictures.items()):
            datum = Datum(50, 60, content, CLASSES.index(name[:3]), b"")
            txn.put(f"{number:08d}_{name}".encode(), datum.encode())


def test_every_line_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(make_pictures(), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prep.cli.build, "make_runner", inline_runner)
    monkeypatch.setattr(prep.cli.merge, "make_runner", inline_runner)
    monkeypatch.setattr(from_python, "WorkerPool", inline_runner)
    assert len(COMMANDS) > 15
    for command in COMMANDS:
        result = CliRunner().invoke(main, shlex.split(command)[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"
    (code,) = (part.partition("```")[0] for part in PAGE.split("```python\n")[1:])
    exec(code, {})
    stores = {path.parent.name: Store.open(path.parent) for path in tmp_path.glob("*/manifest.json")}
    for name in (*SAME, "from-python"):
        assert stores[name].split("train").fingerprint == stores["store"].split("train").fingerprint, name
    assert set(stores["ilsvrc-train"].splits) == set(stores["kaggle"].splits) == set(stores["tiny"].splits)
    assert stores["kaggle-zip"].fingerprint == stores["kaggle"].fingerprint
    assert stores["places"].classes == ("a/n01", "b/n02")
    assert stores["imagenet100"].classes == ("n02",) and stores["imagenet100"].split("train").records == 3
    assert stores["without-blacklist"].split("train").records == 5
    assert stores["both"].split("train").records == 12
    assert stores["from-caffe"].classes == CLASSES
    shutil.rmtree(tmp_path)
