"""A short script as a user might write it: a pool of processes rescales with Pillow, the parent process fills one LMDB.

The LMDB holds no labels, checksums or moments.

python -m tools.bench.peers.pillow_script FOLDER OUT JOBS BICUBIC|BOX|...
"""

from __future__ import annotations

import io
import sys
from functools import partial

import PIL
from PIL import Image

from tools.bench.peers.build_turn import QUALITY, SIDE_PX, take_lmdb_turn


def central_square(path: str, filter: str) -> Image.Image:
    """Return the photograph with its shorter side rescaled to SIDE_PX, cropped to the central square."""
    image = Image.open(path).convert("RGB")
    scale = SIDE_PX / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - SIDE_PX) // 2, (height - SIDE_PX) // 2
    image = image.resize((width, height), Image.Resampling[filter])
    return image.crop((left, top, left + SIDE_PX, top + SIDE_PX))


def make_jpeg(filter: str, path: str) -> bytes:
    """Return the central square as a JPEG file."""
    out = io.BytesIO()
    central_square(path, filter).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


if __name__ == "__main__":
    take_lmdb_turn(f"Pillow {PIL.__version__}", partial(make_jpeg, sys.argv[4]))
