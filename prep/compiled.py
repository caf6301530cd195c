"""Loads compiled C kernels. At installation, tools/compile_native.py compiles every kernels.c.

The kernels are optional: without them, NumPy, PyTorch or DALI do the same work more slowly. The kernels are not used in
these cases:

- if no C compiler was available at installation,
- if kernels.c or one of its headers has changed since installation (the library's file name contains a digest of these
  files),
- if a self-test on small arrays gives a wrong result, for example because the compiler has a bug,
- if the environment has ALEXNET_NATIVE=0.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

Kernels = TypeVar("Kernels")


def library_path(source: Path) -> Path:
    """Return the path of the library that is compiled from the current text of `source` and of its headers.

    A header is a file beside `source` that `source` includes: `#include "NAME.h"`. The library need not exist yet.
    """
    text = source.read_bytes()
    headers = re.findall(rb'^#include "(\w+\.h)"', text, re.MULTILINE)
    text += b"".join(source.with_name(name.decode()).read_bytes() for name in headers)
    return source.with_name(f"{source.stem}-{sha256(text).hexdigest()[:16]}.so")


def load(path: Path, wrap: Callable[[ctypes.CDLL], Kernels], is_correct: Callable[[Kernels], bool]) -> Kernels | None:
    """Load the library at `path` and return `wrap(library)`, or None if the library cannot be used.

    The library cannot be used if its file or a function is missing (`wrap` raises AttributeError), or if the self-test
    `is_correct` returns False. The library is also not used if the environment has ALEXNET_NATIVE=0. Calls into the
    library release the global interpreter lock (GIL).
    """
    if os.environ.get("ALEXNET_NATIVE") == "0":
        return None
    try:
        kernels = wrap(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):
        return None
    return kernels if is_correct(kernels) else None
