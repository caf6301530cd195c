"""Demo data set in ILSVRC's layout: real handwritten digits drawn over real photographs.

The data set is made from two data sets of scikit-learn. Each of the 1,797 digits of load_digits (8×8 px, grey levels 0
to 16) is drawn large and bright over a background. The background is a darkened random part of one of the two
photographs of load_sample_images. As in ILSVRC, sizes and orientations vary, some files are greyscale or CMYK, and two
PNG files have names that end in .JPEG.

    OUT/train/n00000007/n00000007_0042.JPEG     a folder for each class
    OUT/val/PhotoDigits_val_00000001.JPEG       all validation images in one folder
    OUT/val.txt                                 each line has the name and the class of a validation image

    python -m tools.photo_digits OUT

With --hard the data set is about as hard as CIFAR-10 for a linear classifier (docs/measurements.md). With --hard, the
photographs are brighter, and the digits are darker and more colourful. The side of a digit is 0.6 to 1 times the side
of the central square, instead of 0.8 to 1 times. Digits are rotated by up to 15°. Each training digit is drawn four
times.
"""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from prep.console import UserError, count_noun, progress, say, usable_cores

CLASSES = 10
VAL_PICTURES = 297
SHORT_SIDE_PX = (200, 500)
LONGEST_ASPECT = 1.5
_SPECIAL_EVERY = 60  # of every 60 images, one is greyscale and one is CMYK


@dataclass(frozen=True)
class Difficulty:
    """Settings that decide how clearly a digit stands out from the photograph."""

    darken: float = 0.4  # factor by which the values of the photograph are multiplied
    tint: tuple[int, int] = (200, 255)  # range of the R, G and B values of the digit
    # Range of the digit's side (with its margin) divided by the image's shorter side.
    share: tuple[float, float] = (0.8, 1.0)
    tilt_degrees: float = 0.0  # largest rotation in degrees, in either direction
    copies: int = 1  # number of images of each training digit


EASY, HARD = Difficulty(), Difficulty(0.7, (100, 255), (0.6, 1.0), 15.0, 4)


def draw_digit(
    digit: npt.NDArray[np.float64],
    photographs: list[Image.Image],
    rng: np.random.Generator,
    difficulty: Difficulty = EASY,
) -> Image.Image:
    """Draw one digit, an array (8, 8) with values 0..16, over a part of a photograph.

    Returns an RGB image, landscape or portrait, whose shorter side has 200 to 500 px.
    """
    short = int(rng.integers(SHORT_SIDE_PX[0], SHORT_SIDE_PX[1] + 1))
    width, height = short, round(short * rng.uniform(1.0, LONGEST_ASPECT))
    if rng.random() < 0.5:
        width, height = height, width
    picture = _random_part(photographs[rng.integers(len(photographs))], width, height, rng)

    size = round(short * rng.uniform(*difficulty.share))  # side in px, with a soft margin of one digit pixel
    cells = np.pad((digit * (255 / 16)).astype(np.uint8), 1)
    mask = Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)
    if difficulty.tilt_degrees:
        angle = rng.uniform(-difficulty.tilt_degrees, difficulty.tilt_degrees)
        mask = mask.rotate(angle, Image.Resampling.BICUBIC)
    # `max_shift` keeps the digit inside the central square, because the store keeps only that square.
    max_shift = (short - size) // 2
    top = (height - size) // 2 + int(rng.integers(-max_shift, max_shift + 1))
    left = (width - size) // 2 + int(rng.integers(-max_shift, max_shift + 1))
    red, green, blue = (int(c) for c in rng.integers(difficulty.tint[0], difficulty.tint[1] + 1, size=3))
    picture.paste((red, green, blue), (left, top, left + size, top + size), mask)
    return picture


def _random_part(photograph: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Return a random part of a photograph, resized to (width, height). The part has the aspect ratio width:height."""
    columns, rows = photograph.size
    scale = rng.uniform(0.5, 1.0) * min(columns / width, rows / height)
    part_width, part_height = width * scale, height * scale
    left, top = rng.uniform(0, columns - part_width), rng.uniform(0, rows - part_height)
    box = (left, top, left + part_width, top + part_height)
    return photograph.resize((width, height), Image.Resampling.BILINEAR, box=box)


def make_dataset(out: Path, seed: int = 0, limit: int | None = None, difficulty: Difficulty = EASY) -> tuple[int, int]:
    """Write the data set to the new folder `out`, and return the numbers of training and validation images.

    `limit` is the number of digits to use; None: all digits. The folder is written under a temporary name and renamed
    at the end. An existing `out` is therefore complete. Raises UserError if `out` already exists.
    """
    if out.exists():
        raise UserError(f"{out} exists. Name a new folder, or delete this folder.")
    digits = load_digits()
    photographs = [
        Image.fromarray((photo * difficulty.darken).astype(np.uint8)) for photo in load_sample_images().images
    ]
    order = np.random.default_rng(seed).permutation(len(digits.images))[:limit].tolist()
    val_count = round(len(order) * VAL_PICTURES / len(digits.images))
    order += order[val_count:] * (difficulty.copies - 1)
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    for label in range(CLASSES):
        (temporary / "train" / f"n{label:08d}").mkdir(parents=True)
    (temporary / "val").mkdir()

    def draw(index: int) -> int:
        """Draw image `index` with its own random generator, so that the order of threads has no effect.

        Returns the label.
        """
        label = int(digits.target[order[index]])
        path = temporary / "train" / f"n{label:08d}" / f"n{label:08d}_{index:04d}.JPEG"
        if index < val_count:
            path = temporary / "val" / f"PhotoDigits_val_{index + 1:08d}.JPEG"
        rng = np.random.default_rng([seed, index])
        picture = draw_digit(digits.images[order[index]], photographs, rng, difficulty)
        _save(picture, path, index, quality=int(rng.integers(85, 96)))
        return label

    labels = []
    with progress("photo digits", len(order), "pictures") as report, ThreadPoolExecutor(usable_cores()) as pool:
        for label in pool.map(draw, range(len(order))):
            labels.append(label)
            report.advance()
    lines = [f"PhotoDigits_val_{k:08d}.JPEG n{label:08d}\n" for k, label in enumerate(labels[:val_count], 1)]
    (temporary / "val.txt").write_text("".join(lines))
    temporary.rename(out)
    return len(order) - val_count, val_count


def _save(picture: Image.Image, path: Path, index: int, quality: int) -> None:
    """Save an image as an RGB JPEG. A few images become greyscale or CMYK JPEGs, and two become PNGs."""
    if index % _SPECIAL_EVERY == 10:
        picture = picture.convert("L")
    elif index % _SPECIAL_EVERY == 40:
        picture = picture.convert("CMYK")
    if index == 7 or index == 777:
        picture.save(path, "PNG")
    else:
        picture.save(path, "JPEG", quality=quality)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of all random choices.")
@click.option(
    "--hard",
    is_flag=True,
    help="Make a data set that is about as hard as CIFAR-10, with four images of each training digit.",
)
def main(out: Path, seed: int, hard: bool) -> None:
    """Make the demo data set in the new folder OUT: digits drawn over photographs, in ILSVRC's layout."""
    try:
        train, val = make_dataset(out, seed, difficulty=HARD if hard else EASY)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    say(f"{out}: {count_noun(train, 'training picture')}, {count_noun(val, 'validation picture')}")


if __name__ == "__main__":
    main()
