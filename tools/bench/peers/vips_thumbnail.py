"""Does the same work as pillow_script.py, but with libvips' thumbnail instead of Pillow.

Each process of the pool has one thread, and the parent process fills one LMDB. The LMDB holds no labels, checksums or
moments.

    python -m tools.bench.peers.vips_thumbnail FOLDER OUT JOBS

The program needs pyvips (`pip install 'pyvips[binary]'`) and lmdb. Each process imports pyvips itself, because libvips
cannot be used after a fork.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from tools.bench.peers.build_turn import QUALITY, SIDE_PX, take_lmdb_turn

_vips: Any = None


def load_vips() -> None:
    """Import pyvips, and switch off the cache of libvips."""
    global _vips
    import pyvips  # type: ignore[import-not-found]

    pyvips.cache_set_max(0)
    _vips = pyvips


def make_jpeg(path: str) -> bytes:
    """Return the central square of a thumbnail, as a 4:2:0 JPEG file without metadata."""
    image = _vips.Image.thumbnail(path, SIDE_PX, height=SIDE_PX, crop="centre", no_rotate=True)
    content: bytes = image.colourspace("srgb").jpegsave_buffer(Q=QUALITY, subsample_mode="on", keep="none")
    return content


if __name__ == "__main__":
    os.environ["VIPS_CONCURRENCY"] = "1"
    if find_spec("pyvips") is None:
        raise SystemExit(
            "pyvips is not installed in this environment. Install pyvips with: pip install 'pyvips[binary]'"
        )
    take_lmdb_turn(f"pyvips {version('pyvips')}", make_jpeg, load_vips)
