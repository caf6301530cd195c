"""Stream of FFCV: FFCV's Loader reads a .beton file with the records.

    python -m tools.bench.peers.ffcv_stream FOLDER OUT THREADS RED,GREEN,BLUE jpg|raw last|first [resized]

jpg   The .beton holds the unchanged bytes of the JPEG files. (FFCV's RGBImageField would encode the images again.)
raw   The .beton holds the pixels of the images, decoded by Pillow, in FFCV's RGBImageField.

last  Batches have the shape NCHW and the memory order NHWC (channels last), which is FFCV's default.
first Batches have the shape and the memory order NCHW, like the batches of all other contestants. FFCV copies each
      batch twice to reorder it.

FFCV has no random crop of a fixed size. RandomResizedCropRGBImageDecoder makes a random crop of 224 × 224 px if the
area and the aspect ratio are fixed to the values of 224 × 224 pixels. The decoder then rescales 224 × 224 px to 224 ×
224 px, which OpenCV does by copying. The crops have the same distribution as the crops of all other contestants, but
all records must be squares of one size. With `resized`, the same decoder makes random regions from records of any size,
and OpenCV's area filter resizes the regions. FFCV always decodes the full record. After the crop, FFCV runs
RandomHorizontalFlip, NormalizeImage (a table of floats), ToTensor and ToTorchImage. FFCV allocates new batches in each
epoch, which takes time. The records are therefore repeated until an epoch is as long as an epoch of ImageNet.

The program needs a separate Python environment, as tools.bench.peers.ffcv_writer describes.
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

from tools.bench.peers.stream_turn import (
    BATCH,
    CROP_PX,
    RATIO,
    SCALE,
    STD_RGB,
    Mean,
    Records,
    parse_arguments,
    take_turns,
)

_EPOCH_IMAGES = 1_281_167


class JpegField(RGBImageField):  # type: ignore[misc]
    """An RGBImageField for images that are already JPEG files."""

    def encode(self, destination: Any, image: tuple[bytes, int, int], malloc: Callable[[int], Any]) -> None:
        """Write the bytes unchanged. `image` is (bytes of the file, width, height)."""
        content, destination["width"], destination["height"] = image
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["data_ptr"], storage = malloc(len(content))
        storage[:] = np.frombuffer(content, np.uint8)


class RecordDataset:
    """Data set from which FFCV writes the .beton file: pairs of image and label.

    An image is an array of pixels, or a triple (bytes of the file, width, height).
    """

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
    """Return the side of the images in pixels. Exits with a message if the images are not squares of one size."""
    sizes = set()
    for path, _ in records:
        with Image.open(path) as image:
            sizes.add(image.size)
    if len(sizes) != 1 or len(set(*sizes)) != 1:
        raise SystemExit("FFCV makes crops of a fixed size only from squares that all have the same size")
    side, _ = sizes.pop()
    return int(side)


def endless_batches(
    beton: Path, records: Records, threads: int, mean: Mean, channels_last: bool, is_resized: bool
) -> Iterator[Any]:
    """Yield batches of images, epoch after epoch."""
    scale, ratio, std = SCALE, RATIO, np.array(STD_RGB, np.float32)
    if not is_resized:
        area_share = (CROP_PX / side_px(records)) ** 2
        scale, ratio, std = (area_share, area_share), (1.0, 1.0), np.ones(3, np.float32)
    image = [
        RandomResizedCropRGBImageDecoder((CROP_PX, CROP_PX), scale=scale, ratio=ratio),
        RandomHorizontalFlip(),
        NormalizeImage(mean, std, np.float32),
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
    """Run the stream. Each line on standard input starts a timed run (see stream_turn.py)."""
    records, out, threads, mean, (mode, channels, *window) = parse_arguments()
    out.mkdir()
    beton = out / "train.beton"
    field = RGBImageField(write_mode="raw") if mode == "raw" else JpegField()
    writer = DatasetWriter(str(beton), {"image": field, "label": IntField()}, num_workers=threads)
    writer.from_indexed_dataset(RecordDataset(records, mode == "raw"))
    batches = endless_batches(beton, records, threads, mean, channels == "last", bool(window))
    take_turns(f"FFCV {version('ffcv')}", batches, threads)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)  # imported libraries set another start method
    main()
