"""Writes checkpoint files with any content and a correct digest. Everyone who knows the format can write such files."""

from __future__ import annotations

import io
import zipfile
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tests.helpers.small_training import tiny_checkpoint
from train.formats.archive_digest import append_digest


def tiny_content() -> dict[str, Any]:
    """Return the content of a valid checkpoint file."""
    state = tiny_checkpoint(1)
    content = {field.name: getattr(state, field.name) for field in fields(state) if field.name != "digest"}
    return deepcopy({"format": 2, **content, "ancestry": []})


def write_signed(path: Path, content: object) -> Path:
    """Write `content` with torch.save, and add the digest."""
    with open(path, "w+b") as file:
        torch.save(content, file)
        append_digest(file)
    return path


def write_signed_pickle(path: Path, pickle_bytes: bytes, **records: bytes) -> Path:
    """Write an archive with data.pkl (`pickle_bytes`), byteorder, version and the files `records`. Add the digest."""
    with open(path, "w+b") as file:
        with zipfile.ZipFile(file, "w") as archive:
            entries = {"data.pkl": pickle_bytes, "byteorder": b"little", "version": b"3\n", **records}
            for name, content in entries.items():
                archive.writestr(f"archive/{name}", content)
        append_digest(file)
    return path


def entries_of(content: object) -> dict[str, bytes]:
    """Write `content` with torch.save. Returns {path below the top folder of the archive: bytes of this file}."""
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
