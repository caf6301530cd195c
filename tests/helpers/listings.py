"""Folders with empty files, and the expected content of their listings, for tests of input formats."""

from __future__ import annotations

from pathlib import Path

from prep.inputs.reader import ListOptions, Source
from prep.inputs.sources import list_source


def touch(folder: Path, *names: str) -> Path:
    """Create empty files below `folder`; returns `folder`."""
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
