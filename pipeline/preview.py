"""A contact sheet of the stream, so that a person sees what it does: one photograph a row, augmented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.augment import WINDOW_PX, Augmentation, Augmenter
from pipeline.loader import dali_errors, reader, unbuilt_pipeline
from pipeline.placement import Placement
from prep.console import UserError
from prep.manifest import Store

AUGMENTED = 8
LOUD = 10.0  # the last column's colour noise, as a multiple

_GAP, _HEAD = 6, 34


def draw_preview(store: Store, out: Path, rows: int, seed: int, split: str = "train") -> None:
    """Draw `rows` photographs: as stored, eight random augmentations, and the eighth with colour noise ten times
    larger.

    Raises UserError where the file cannot be written, StoreError as the loaders do.
    """
    rows = min(rows, store.split(split).records)
    pictures = _pictures(store, rows, seed, split)
    titles = ["as stored", *(f"{k + 1}" for k in range(AUGMENTED)), f"{AUGMENTED}, {LOUD:.0f}x noise"]
    cell = WINDOW_PX + _GAP
    sheet = Image.new("RGB", (len(titles) * cell + _GAP, _HEAD + rows * cell), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for column, (title, images) in enumerate(zip(titles, pictures, strict=True)):
        pen.text((_GAP + column * cell + WINDOW_PX // 2, _HEAD // 2), title, fill="black", font=font, anchor="mm")
        for row, image in enumerate(images):
            if image.shape[0] != WINDOW_PX:
                picture = Image.fromarray(image).resize((WINDOW_PX, WINDOW_PX), Image.Resampling.LANCZOS)
            else:
                picture = Image.fromarray(image)
            sheet.paste(picture, (_GAP + column * cell, _HEAD + row * cell))
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {error}. Name a file such as preview.png in a folder that exists.") from None


def _pictures(store: Store, rows: int, seed: int, split: str) -> list[list[np.ndarray[Any, np.dtype[np.uint8]]]]:
    """One list for each column: uint8 (H, W, 3) for each row."""
    placement = Placement.of("cpu")
    augmenter = Augmenter(store, placement, Augmentation(mean="none"))
    seeds = (np.random.SeedSequence(seed).generate_state(3 * AUGMENTED) >> 1).reshape(AUGMENTED, 3).tolist()
    pipe = unbuilt_pipeline(rows, placement, seed, threads=1)
    with pipe:
        record, _ = reader(store, split, seed=0, shuffle=False, pad_last_batch=False)
        outputs = [augmenter.stored_square(record)]
        for three in seeds:
            draws = augmenter.draw(rows, (three[0], three[1], three[2]))
            outputs.append(augmenter.training_image(record, draws))
        outputs.append(augmenter.training_image(record, draws._replace(shift=draws.shift * LOUD)))
        pipe.set_outputs(*outputs)
    with dali_errors(store, split):
        pipe.build()
        stored, *augmented = pipe.run()
    columns = [[np.array(stored[row]) for row in range(rows)]]
    for output in augmented:
        images = output.as_array().transpose(0, 2, 3, 1)
        columns.append(list(np.clip(np.rint(images), 0, 255).astype(np.uint8)))
    return columns
