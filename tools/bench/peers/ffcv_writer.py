"""FFCV's DatasetWriter over a data set like torchvision's ImageFolder. No checksums or moments, nothing synced.

    python -m tools.bench.peers.ffcv_writer FOLDER OUT JOBS jpg|raw|own

jpg   Pillow decodes and rescales the shorter side to 256 px by its bicubic filter, the central square is cut, FFCV's
      RGBImageField writes it as a JPEG of quality 90.
raw   The same, written as pixels.
own   Pillow decodes only; FFCV rescales (OpenCV's INTER_AREA, the longer side to 341 px: 256 × 341 for most
      photographs, which is more than the square) and writes a JPEG of quality 90.

Needs an environment of its own, for FFCV wants an older NumPy: libopencv-dev, libturbojpeg0-dev and pkg-config of the
system; then `pip install 'numpy<2.3' torch setuptools pillow`, then `pip install --no-build-isolation ffcv`.
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

from tools.bench.peers.build_turn import QUALITY, arguments, take_turn
from tools.bench.peers.pillow_script import square

_LONGER_SIDE_PX = 341


class ImageFolder:
    """Pictures and labels of class folders; rescaled to the square unless `whole`."""

    def __init__(self, paths: Sequence[str], whole: bool) -> None:
        classes = sorted({Path(path).parent.name for path in paths})
        label = {name: index for index, name in enumerate(classes)}
        self.samples = [(path, label[Path(path).parent.name]) for path in paths]
        self.whole = whole

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return Image.open(path).convert("RGB") if self.whole else square(path, "BICUBIC"), label


def main() -> None:
    """One turn."""
    paths, out, jobs, (mode,) = arguments()
    whole = mode == "own"
    dataset = ImageFolder(paths, whole)
    field = RGBImageField(
        write_mode="raw" if mode == "raw" else "jpg",
        max_resolution=_LONGER_SIDE_PX if whole else None,
        jpeg_quality=QUALITY,
    )
    out.mkdir()
    writer = DatasetWriter(str(out / "train.beton"), {"image": field, "label": IntField()}, num_workers=jobs)

    def work() -> int:
        writer.from_indexed_dataset(dataset)
        return len(paths)

    take_turn(f"FFCV {version('ffcv')}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}", work)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)  # imports have set one already
    main()
