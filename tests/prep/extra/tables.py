"""A store with extra fields for tests: photographs in class folders, and one CSV file with all fields."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prep.build.split import build_split
from prep.console import Progress
from prep.extra.csv_values import parse_extra
from prep.extra.match import with_extra
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from tests.helpers.building import PPM, SKIP, InlineRunner, make_pictures

FIELDS = ("age", "weight", "box", "caption")
TYPES = {"age": "int", "weight": "float", "box": "vector", "caption": "text"}
TEXTS = ("", " two words ", 'a "quote", a comma', "line\nbreak", "Grüße 猫🐈")


def make_photos(folder: Path, count: int = 70) -> Path:
    """Make JPEGs in three class folders. The first JPEG of the class n2 is broken."""
    make_pictures(folder, count, (33, 40), 3)
    (folder / "n2" / "broken.JPEG").write_bytes(b"\xff\xd8\xff" + bytes(40))
    return folder


def write_table(path: Path, photos: Path, seed: int = 0, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Write a CSV file with all FIELDS for all photographs. Returns {path of the photograph: {field: value}}."""
    rng = np.random.default_rng(seed)
    names = sorted(f"{file.parent.name}/{file.name}" for file in photos.glob("*/*"))
    rng.shuffle(names)
    values: dict[str, dict[str, Any]] = {}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["path", "age", "weight", "box.0", "box.1", "box.2", "caption"])
        for number, name in enumerate(names):
            age = int(rng.integers(-(2**63), 2**63 - 1))
            weight, *box = rng.normal(0, 100, 4).tolist()
            caption = TEXTS[number % len(TEXTS)]
            writer.writerow([prefix + name, age, weight, *box, caption])
            # A CSV file has decimal digits, so the numbers are first rounded to float64, then to float32.
            values[name] = {
                "age": age,
                "weight": np.float32(weight),
                "box": np.array(box, np.float32),
                "caption": caption,
            }
    return values


def build_with(
    photos: Path, store: Path, extra: Sequence[str] = (), split: str = "train", runner: Any = None, policy: Any = SKIP
) -> Store:
    """Build a split in the process of the test. `extra` lists the values of the option --extra."""
    known = Store.open(store).classes if (store / "manifest.json").exists() else ()
    (source,) = with_extra([list_source(photos, split, store_classes=known)], parse_extra(tuple(extra)))
    return build_split(source, store, PPM, runner or InlineRunner(), Progress(1, "pictures"), policy)
