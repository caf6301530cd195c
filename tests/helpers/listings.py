"""Helpers for tests of input formats: folders of empty files, label files, ILSVRC devkits, and contents of listings."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

from prep.inputs.reader import ListOptions, Source
from prep.inputs.sources import list_source


def touch(folder: Path, *names: str) -> Path:
    """Create empty files below `folder`, and return `folder`."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def list_images(
    folder: Path, store_classes: tuple[str, ...] = (), split: str = "train", follow_links: bool = False
) -> Source:
    return list_source(folder, split, ListOptions(follow_links=follow_links), store_classes)


def paths_and_labels(source: Source) -> list[tuple[bytes, int]]:
    return [(item.path, item.label) for item in source.inputs]


def labels_of(source: Source) -> list[int]:
    return [item.label for item in source.inputs]


def label_file(folder: Path, text: str, name: str = "labels.txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(text.encode())
    return path


def list_labelled(
    folder: Path, labels: Path | None = None, order: str | None = None, store_classes: tuple[str, ...] = ()
) -> Source:
    """Return the listing of the split val in a folder without class folders.

    Classes of `store_classes` may have no images.
    """
    options = ListOptions(labels, order, allow_empty_classes=bool(store_classes))
    return list_source(folder, "val", options, store_classes)


def write_devkit(file: Path | io.BytesIO, numbered: dict[int, str]) -> None:
    """Write a meta.mat like the devkit's: an array `synsets` of structs with ILSVRC2012_ID, WNID and other fields."""
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(number, name, f"word of {name}", 0) for number, name in numbered.items()]
    savemat(file, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})


def devkit_archive(folder: Path, numbered: dict[int, str], ground_truth: str) -> Path:
    """Write a devkit ILSVRC2012_devkit_t12.tar.gz, and return its path.

    The archive has meta.mat, the ground truth of the split val, and a file with an unsafe path (../../readme.txt).
    """
    meta = io.BytesIO()
    write_devkit(meta, numbered)
    data = "ILSVRC2012_devkit_t12/data"
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, content in (
            ("../../readme.txt", b"x"),
            (f"{data}/ILSVRC2012_validation_ground_truth.txt", ground_truth.encode()),
            (f"{data}/meta.mat", meta.getvalue()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder / "ILSVRC2012_devkit_t12.tar.gz"
