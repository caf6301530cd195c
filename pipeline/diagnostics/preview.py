"""A contact sheet of the stream, so that a person sees what it does: one photograph a row, augmented."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.augment import CROP_PX, Augmentation, Augmenter
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.engine import choose_engine
from pipeline.placement import Placement
from pipeline.prefetch import BatchInput, Prefetcher
from pipeline.records import Record, Records
from pipeline.sampling import draw_params
from prep.console import UserError
from prep.images.central_square import central_square
from prep.images.jpeg import decode_jpeg
from prep.store.manifest import Store

AUGMENTED = 8
LOUD = 10.0  # the last column's colour noise, as a multiple

_GAP, _HEAD = 6, 34


def save_preview(store: Store, out: Path, rows: int, seed: int, split: str = "train") -> None:
    """Draw `rows` photographs: as stored, eight random augmentations, and the eighth with colour noise ten times
    larger.

    Raises UserError where the file cannot be written, StoreError as the loaders do.
    """
    rows = min(rows, store.split(split).records)
    pictures = _pictures(store, rows, seed, split)
    titles = ["as stored", *(f"{k + 1}" for k in range(AUGMENTED)), f"{AUGMENTED}, {LOUD:.0f}x noise"]
    cell = CROP_PX + _GAP
    sheet = Image.new("RGB", (len(titles) * cell + _GAP, _HEAD + rows * cell), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for column, (title, images) in enumerate(zip(titles, pictures, strict=True)):
        pen.text((_GAP + column * cell + CROP_PX // 2, _HEAD // 2), title, fill="black", font=font, anchor="mm")
        for row, image in enumerate(images):
            if image.shape[0] != CROP_PX:
                picture = Image.fromarray(image).resize((CROP_PX, CROP_PX), Image.Resampling.LANCZOS)
            else:
                picture = Image.fromarray(image)
            sheet.paste(picture, (_GAP + column * cell, _HEAD + row * cell))
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {error}. Name a file such as preview.png in a folder that exists.") from None


def save_image_grid(pictures: np.ndarray[Any, np.dtype[np.uint8]], out: Path) -> None:
    """Draw pictures uint8 (N, height, width, 3) side by side, 16 in a row, at half their size.

    Raises OSError where the file cannot be written.
    """
    count, height, width, _ = pictures.shape
    across = min(count, 16)
    sheet = Image.new("RGB", (across * (width // 2), -(-count // across) * (height // 2)), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, across)
        small = Image.fromarray(picture).resize((width // 2, height // 2), Image.Resampling.BOX)
        sheet.paste(small, (column * (width // 2), row * (height // 2)))
    sheet.save(out)


def _pictures(store: Store, rows: int, seed: int, split: str) -> list[list[np.ndarray[Any, np.dtype[np.uint8]]]]:
    """One list for each column: uint8 (H, W, 3) for each row."""
    placement = Placement.parse("cpu")
    augmenter = Augmenter(store, Augmentation(mean="none"))
    engine = choose_engine(augmenter, placement, OutputFormat(layout="NHWC"), threads=1)
    prefetcher = Prefetcher(engine, placement, Records(store, split), rows, threads=1)

    def job(column: int) -> BatchInput:
        draws = draw_params(seed, 0, min(column, AUGMENTED - 1), rows, augmenter.max_offset_px)
        if column == AUGMENTED:
            draws = draws._replace(normal=draws.normal * LOUD)
        return prefetcher.read_batch(np.arange(rows), lambda records: augmenter.random_crops(records, draws))

    columns = [[_stored(record, store.settings.side_px) for record in job(0).records]]
    prefetcher.start(partial(job, column) for column in range(AUGMENTED + 1))
    while (served := prefetcher.next()) is not None:
        columns.append(list(np.clip(np.rint(served.images.numpy()), 0, 255).astype(np.uint8)))
    prefetcher.close()
    return columns


def _stored(record: Record, side_px: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The central square of a record, as it is stored."""
    picture = record.payload
    if picture.ndim == 1:
        picture = decode_jpeg(picture.tobytes())
    return central_square(picture, side_px).copy()
