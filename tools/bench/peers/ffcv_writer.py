"""Write a .beton file with FFCV's DatasetWriter, from a data set like torchvision's ImageFolder.

The writer computes no checksums or moments, and does not sync its output.

    python -m tools.bench.peers.ffcv_writer FOLDER OUT JOBS jpg|raw|own

jpg   Pillow decodes, rescales the shorter side to 256 px with its bicubic filter, and crops the central square. FFCV's
      RGBImageField writes the square as a JPEG of quality 90.
raw   Like jpg, but the square is written as pixels.
own   Pillow only decodes. FFCV rescales the longer side to 341 px (OpenCV's INTER_AREA) and writes a JPEG of quality
      90. Most photographs become images of 256 × 341 px, which have more pixels than the square.

The program needs a separate Python environment, because FFCV needs an older NumPy. Install libopencv-dev,
libturbojpeg0-dev and pkg-config on the system; then run `pip install 'numpy<2.3' torch setuptools pillow` and `pip
install --no-build-isolation ffcv`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import cv2  # type: ignore[import-not-found]
import PIL
from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found]
from ffcv.writer import DatasetWriter  # type: ignore[import-not-found]
from PIL import Image

from tools.bench.peers.build_turn import QUALITY, parse_arguments, take_turn
from tools.bench.peers.pillow_script import central_square

_LONGER_SIDE_PX = 341


class ImageFolder:
    """Images and labels of class folders. If `full_size` is False, images are cropped to the central square."""

    def __init__(self, paths: Sequence[str], full_size: bool) -> None:
        classes = sorted({Path(path).parent.name for path in paths})
        label_of = {name: index for index, name in enumerate(classes)}
        self.samples = [(path, label_of[Path(path).parent.name]) for path in paths]
        self.full_size = full_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return Image.open(path).convert("RGB") if self.full_size else central_square(path, "BICUBIC"), label


def main() -> None:
    """Write the .beton in one timed turn (see build_turn.py)."""
    paths, out, jobs, (mode,) = parse_arguments()
    ffcv_rescales = mode == "own"
    dataset = ImageFolder(paths, full_size=ffcv_rescales)
    field = RGBImageField(
        write_mode="raw" if mode == "raw" else "jpg",
        max_resolution=_LONGER_SIDE_PX if ffcv_rescales else None,
        jpeg_quality=QUALITY,
    )
    out.mkdir()
    writer = DatasetWriter(str(out / "train.beton"), {"image": field, "label": IntField()}, num_workers=jobs)

    def work() -> int:
        writer.from_indexed_dataset(dataset)
        return len(paths)

    take_turn(f"FFCV {version('ffcv')}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}", work)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)  # imported libraries set another start method
    main()
