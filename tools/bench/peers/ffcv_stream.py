"""FFCV's Loader over a .beton of the records.

    python -m tools.bench.peers.ffcv_stream FOLDER OUT THREADS RED,GREEN,BLUE jpg|raw last|first

jpg   The .beton holds the very bytes of the JPEG files: FFCV's own field would encode their pixels once more.
raw   It holds their pixels, decoded by Pillow, in FFCV's own field.

FFCV has no random crop of a fixed size. Its RandomResizedCropRGBImageDecoder cuts one when the share of the area and
the ratio of the sides are pinned to those of the window, and then rescales 224 × 224 to 224 × 224, for which OpenCV
copies. So the windows are the same as everyone's, but all records must be squares of one size. It decodes the whole
record, as all do. RandomHorizontalFlip, NormalizeImage (a table of floats), ToTensor and ToTorchImage follow. An epoch
is made as long as ImageNet's by repeating the records, for FFCV allocates its batches anew in each.

last  Batches have channels last in memory, FFCV's default: NCHW by their strides only.
first Channels first in memory, as everyone else's: FFCV copies each batch for that, twice.

Needs an environment of its own: see tools.bench.peers.ffcv_writer.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found]
from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder  # type: ignore[import-not-found]
from ffcv.fields.rgb_image import IMAGE_MODES  # type: ignore[import-not-found]
from ffcv.loader import Loader, OrderOption  # type: ignore[import-not-found]
from ffcv.transforms import (  # type: ignore[import-not-found]
    NormalizeImage,
    RandomHorizontalFlip,
    Squeeze,
    ToTensor,
    ToTorchImage,
)
from ffcv.writer import DatasetWriter  # type: ignore[import-not-found]
from PIL import Image

from tools.bench.peers.stream_turn import BATCH, CROP_PX, Mean, Records, arguments, take_turns

_EPOCH_IMAGES = 1_281_167


class JpegField(RGBImageField):  # type: ignore[misc]
    """RGBImageField for a picture that is a JPEG file already."""

    def encode(self, destination: Any, image: tuple[bytes, int, int], malloc: Callable[[int], Any]) -> None:
        """Keep the bytes; `image` is the file, its width and its height."""
        content, destination["width"], destination["height"] = image
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["data_ptr"], storage = malloc(len(content))
        storage[:] = np.frombuffer(content, np.uint8)


class Files:
    """What goes into the .beton."""

    def __init__(self, records: Records, raw: bool) -> None:
        self.records, self.raw = records, raw

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.records[index]
        with Image.open(path) as image:
            if self.raw:
                return np.array(image.convert("RGB")), label
            return (Path(path).read_bytes(), image.width, image.height), label


def side_px(records: Records) -> int:
    """The side of the squares that all records are."""
    sizes = set()
    for path, _ in records:
        with Image.open(path) as image:
            sizes.add(image.size)
    if len(sizes) != 1 or len(set(*sizes)) != 1:
        raise SystemExit("FFCV cuts windows of a fixed size only out of squares that are all of one size")
    side, _ = sizes.pop()
    return int(side)


def batches(beton: Path, records: Records, threads: int, mean: Mean, channels_last: bool) -> Iterator[Any]:
    """Epoch after epoch."""
    share, side = (CROP_PX / side_px(records)) ** 2, (CROP_PX, CROP_PX)
    image = [
        RandomResizedCropRGBImageDecoder(side, scale=(share, share), ratio=(1.0, 1.0)),
        RandomHorizontalFlip(),
        NormalizeImage(mean, np.ones(3, np.float32), np.float32),
        ToTensor(),
        ToTorchImage(channels_last),
    ]
    loader = Loader(
        str(beton),
        batch_size=BATCH,
        num_workers=threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        indices=np.arange(_EPOCH_IMAGES, dtype=np.uint64) % np.uint64(len(records)),
        pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]},
        custom_fields={"image": RGBImageField},
    )
    while True:
        for images, _ in loader:
            yield images


def main() -> None:
    """Turns."""
    records, out, threads, mean, (mode, channels) = arguments()
    out.mkdir()
    beton = out / "train.beton"
    field = RGBImageField(write_mode="raw") if mode == "raw" else JpegField()
    writer = DatasetWriter(str(beton), {"image": field, "label": IntField()}, num_workers=threads)
    writer.from_indexed_dataset(Files(records, mode == "raw"))
    take_turns(f"FFCV {version('ffcv')}", batches(beton, records, threads, mean, channels == "last"), threads)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)  # imports have set one already
    main()
