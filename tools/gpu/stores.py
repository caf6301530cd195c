"""Stores for tools.gpu_check, made from synthetic photographs: a store of JPEG records and a store of PPM records.

The photographs come from tools.photo_digits and are not darkened. Each training photograph is in the stores several
times, under several names, so that an epoch has dozens of steps of 512 images. The stream reads and decodes each of
these records separately.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from prep.console import UserError, say
from prep.store.manifest import Store
from tools.photo_digits import Difficulty, make_dataset

FORMATS = ("jpeg", "ppm")
# Number of records of each photograph. The 1,500 training photographs give 24,000 records: 46 steps of 512 images.
COPIES = 16
_ROOT = Path(__file__).parents[2]


def make_stores(folder: Path, copies: int = COPIES, photographs: int | None = None) -> dict[str, Path]:
    """Make two stores in `folder`, and return {format: path of the store}.

    Stores that an earlier call has finished are not rebuilt.

    copies       number of records of each photograph
    photographs  number of photographs to make, at most 1,797; None: 1,797

    The photographs are deleted at the end.
    """
    stores = {format: folder / format for format in FORMATS}
    missing = [format for format in FORMATS if not (stores[format] / "manifest.json").exists()]
    if not missing:
        return stores
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".photographs-") as work:
        source = Path(work) / "photographs"
        make_dataset(source, limit=photographs, difficulty=Difficulty(darken=1.0))
        repeat_files(source / "train", copies)
        for format in missing:
            say(f"building {stores[format]}")
            shutil.rmtree(stores[format], ignore_errors=True)
            build_store(source / "train", stores[format], format)
    for path in stores.values():
        Store.open(path).split("train")
    return stores


def build_store(source: Path, store: Path, format: str) -> None:
    """Build a store of the class folders in `source` with `alexprep build-lmdb`. Raises UserError if the build fails.

    `alexprep` runs in a subprocess. If the calling process built the store, each of its worker processes would import
    torch and the main module of the calling program.
    """
    command = [sys.executable, "-m", "prep", "build-lmdb", str(source.absolute()), "--split", "train"]
    command += ["--store", str(store.absolute()), "--format", format]
    command.append("--allow-empty-classes")  # a few photographs may not show all ten digits
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"alexprep build-lmdb: exit code {result.returncode}. {result.stderr.strip()[-300:]}")


def repeat_files(folder: Path, copies: int) -> None:
    """Add hard links to each file in the class folders of `folder`, so that each file has `copies` names."""
    for path in sorted(folder.glob("*/*")):
        for number in range(1, copies):
            os.link(path, path.with_name(f"{path.stem}-{number}{path.suffix}"))
