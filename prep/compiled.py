"""Inner loops in C: a room's native.c, compiled at installation (tools/compile_native.py) where a compiler was there.

Nothing depends on them but speed: each room does the same without. A library's name holds a digest of its source, so
that one left from another version is never loaded, and what a compiler made of the source is tried on small numbers
before it is believed. ALEXNET_NATIVE=0 in the environment switches them all off.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

Kernel = TypeVar("Kernel")


def library_path(source: Path) -> Path:
    """Where the library compiled from the present text of `source` lies, or would."""
    return source.with_name(f"{source.stem}-{sha256(source.read_bytes()).hexdigest()[:16]}.so")


def load(path: Path, kernel: Callable[[ctypes.CDLL], Kernel], is_correct: Callable[[Kernel], bool]) -> Kernel | None:
    """`kernel(library)` of the library at `path`, whose calls let other threads run; None where it is not to be used.

    That is where it is not there, lacks a function (AttributeError), or computes something else than `is_correct` wants.
    """
    if os.environ.get("ALEXNET_NATIVE") == "0":
        return None
    try:
        made = kernel(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):
        return None
    return made if is_correct(made) else None
