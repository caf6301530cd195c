"""libvips' thumbnail in a pool of processes with one thread each, one LMDB. No labels, checksums or moments.

    python -m tools.bench.peers.vips_thumbnail FOLDER OUT JOBS

Needs pyvips (`pip install 'pyvips[binary]'`) and lmdb. Each process imports pyvips itself: libvips must not be forked.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from tools.bench.peers.build_turn import QUALITY, SIDE_PX, lmdb_turn

_vips: Any = None


def begin() -> None:
    """Load libvips."""
    global _vips
    import pyvips  # type: ignore[import-not-found]

    pyvips.cache_set_max(0)
    _vips = pyvips


def jpeg(path: str) -> bytes:
    """The central square of a thumbnail, as a 4:2:0 file without metadata."""
    image = _vips.Image.thumbnail(path, SIDE_PX, height=SIDE_PX, crop="centre", no_rotate=True)
    content: bytes = image.colourspace("srgb").jpegsave_buffer(Q=QUALITY, subsample_mode="on", keep="none")
    return content


if __name__ == "__main__":
    os.environ["VIPS_CONCURRENCY"] = "1"
    if find_spec("pyvips") is None:
        raise SystemExit("pyvips is not installed in this environment")
    lmdb_turn(f"pyvips {version('pyvips')}", jpeg, begin)
