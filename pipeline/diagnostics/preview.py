"""Image files that show many images: a table of random augmentations of stored images, or a grid of given images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import wrap

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipeline.augment import Augmentation, Augmenter
from pipeline.device import Placement
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.engine import choose_engine
from pipeline.prefetch import BatchInput, Prefetcher
from pipeline.records import Records
from pipeline.sampling import draw_step
from pipeline.still_image import Pixels, StoredImages
from prep.console import UserError, WrongArgument, escaped
from prep.store.manifest import Store

AUGMENTED = 8  # number of columns with random augmentations
NOISE_FACTOR = 10.0  # factor of the colour noise in the last column

_GAP_PX, _HEADER_PX = 6, 34
# Width of the column of class names in px and in characters, and the largest number of lines of a class name.
_CLASS_PX, _CLASS_CHARS, _CLASS_LINES = 170, 17, 9


def save_preview(store: Store, out: Path, rows: int, seed: int, split: str = "train", preset: str = "alexnet") -> None:
    """Draw the first `rows` images of a split, one in each row.

    A row shows the class, the stored image and eight random augmentations with the settings of `preset`. If the
    settings have colour noise, the row also shows the eighth augmentation again with ten times the colour noise.

    Raises WrongArgument if no image format has the extension of `out`, UserError if the file cannot be written, and
    StoreError for a damaged record.
    """
    Image.init()
    formats = {extension: format for extension, format in Image.EXTENSION.items() if format in Image.SAVE}
    if out.suffix.lower() not in formats:
        raise WrongArgument(f"{out}: a contact sheet is an image file. Name the file {out.with_suffix('.png').name}.")
    rows = min(rows, store.split(split).records)
    titles = [
        "as stored",
        *(f"{k + 1}" for k in range(AUGMENTED)),
        f"{AUGMENTED}, {NOISE_FACTOR:.0f}x noise",
    ]
    settings = replace(Augmentation.preset(preset), mean="none", std=None)
    if settings.colour == "off":
        titles.pop()
    size_px = settings.size_px
    cell_px = size_px + _GAP_PX
    sheet = Image.new("RGB", (_CLASS_PX + len(titles) * cell_px + _GAP_PX, _HEADER_PX + rows * cell_px), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    columns, names = _columns(store, rows, seed, split, settings)
    for row, name in enumerate(names):
        text = "\n".join(wrap(escaped(name), _CLASS_CHARS)[:_CLASS_LINES])
        position = _GAP_PX, _HEADER_PX + row * cell_px + size_px // 2
        pen.multiline_text(position, text, fill="black", font=font, anchor="lm")
    for column, (title, images) in enumerate(zip(titles, columns, strict=True)):
        left = _CLASS_PX + _GAP_PX + column * cell_px
        pen.text((left + size_px // 2, _HEADER_PX // 2), title, fill="black", font=font, anchor="mm")
        for row, pixels in enumerate(images):
            image = Image.fromarray(pixels)
            if pixels.shape[0] != size_px:
                image = image.resize((size_px, size_px), Image.Resampling.LANCZOS)
            sheet.paste(image, (left, _HEADER_PX + row * cell_px))
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {error}. Choose a file such as preview.png in a folder that exists.") from None


def save_image_grid(images: npt.NDArray[np.uint8], out: Path) -> None:
    """Save images, uint8 (N, height, width, 3), in one image file. Each image is reduced to half its width and height.

    A row has 16 images. Raises OSError if the file cannot be written.
    """
    count, height, width, _ = images.shape
    columns = min(count, 16)
    sheet = Image.new("RGB", (columns * (width // 2), -(-count // columns) * (height // 2)), "white")
    for index, pixels in enumerate(images):
        row, column = divmod(index, columns)
        half = Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BOX)
        sheet.paste(half, (column * (width // 2), row * (height // 2)))
    sheet.save(out)


def _columns(
    store: Store, rows: int, seed: int, split: str, settings: Augmentation
) -> tuple[list[list[Pixels]], list[str]]:
    """Return the columns of a preview, and the class name of each row.

    A column is a list of uint8 (H, W, 3) images, one for each row.
    """
    placement = Placement.parse("cpu")
    augmenter = Augmenter(store, settings)
    images = OutputFormat(
        layout="NHWC",
        crop_px=settings.size_px,
        is_resized=settings.window == "resized",
        has_effects=settings.has_effects,
    )
    engine = choose_engine(augmenter, placement, images, threads=1)

    def read_column(column: int) -> BatchInput:
        step = min(column, AUGMENTED - 1)
        draws, *others = draw_step(settings, seed, 0, step, rows, augmenter.max_offset_px)
        if column == AUGMENTED:
            draws = draws._replace(normal=draws.normal * NOISE_FACTOR)
        return prefetcher.read_batch(np.arange(rows), lambda records: augmenter.random_crops(records, draws, *others))

    with StoredImages(store, split) as stored:
        columns = [[stored[number] for number in range(rows)]]
        names = [store.classes[stored.label(number)] for number in range(rows)]
    with closing(Prefetcher(engine, placement, Records(store, split), rows, threads=1)) as prefetcher:
        prefetcher.start(partial(read_column, column) for column in range(AUGMENTED + (settings.colour != "off")))
        while (output := prefetcher.next()) is not None:
            columns.append(list(np.clip(np.rint(output.images.numpy()), 0, 255).astype(np.uint8)))
    return columns, names
