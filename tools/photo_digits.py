"""The demo's data set: real handwritten digits over real photographs, in ILSVRC's layout.

From what scikit-learn carries: the 1,797 digits of load_digits (8×8, 16 grey levels), each drawn large and bright
over a darkened part of one of the two photographs of load_sample_images. As ILSVRC does, it varies sizes and
orientations, and holds some greyscale and CMYK files and two PNGs with a JPEG's name.

    OUT/train/n00000007/n00000007_0042.JPEG     a folder for each class
    OUT/val/PhotoDigits_val_00000001.JPEG       flat
    OUT/val_ground_truth.txt                    one number a line, 1..10, in the order of the names

    python -m tools.photo_digits OUT

With --hard it is about as hard as CIFAR-10 to a linear classifier (docs/measurements.md): brighter photographs, darker
digits of any colour, of 0.6 to 1 of the square and tilted by up to 15°; each training digit is drawn four times.
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
_ODD_EVERY = 60  # of so many pictures one is greyscale, one CMYK; two in all are PNGs


@dataclass(frozen=True)
class Difficulty:
    """How digits stand out."""

    darken: float = 0.4  # of the photographs
    tint: tuple[int, int] = (200, 255)  # of the digit, each of R, G, B
    share: tuple[float, float] = (0.8, 1.0)  # of the shorter side, with the empty cell around the digit
    tilt_degrees: float = 0.0  # either way
    copies: int = 1  # of each training digit, each drawn anew


EASY, HARD = Difficulty(), Difficulty(0.7, (100, 255), (0.6, 1.0), 15.0, 4)


def digit_picture(
    digit: npt.NDArray[np.float64], photographs: list[Image.Image], rng: np.random.Generator, how: Difficulty = EASY
) -> Image.Image:
    """One 8×8 digit (0..16) over a part of a photograph; RGB, shorter side 200 to 500 px, either orientation."""
    short = int(rng.integers(SHORT_SIDE_PX[0], SHORT_SIDE_PX[1] + 1))
    width, height = short, round(short * rng.uniform(1.0, LONGEST_ASPECT))
    if rng.random() < 0.5:
        width, height = height, width
    picture = _part_of(photographs[rng.integers(len(photographs))], width, height, rng)

    size = round(short * rng.uniform(*how.share))  # of the digit and the empty cell around it, which softens its edges
    cells = np.pad((digit * (255 / 16)).astype(np.uint8), 1)
    mask = Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)
    if how.tilt_degrees:
        mask = mask.rotate(rng.uniform(-how.tilt_degrees, how.tilt_degrees), Image.Resampling.BICUBIC)
    room = (short - size) // 2  # inside the central square, so that no crop of it loses the digit
    top = (height - size) // 2 + int(rng.integers(-room, room + 1))
    left = (width - size) // 2 + int(rng.integers(-room, room + 1))
    red, green, blue = (int(c) for c in rng.integers(how.tint[0], how.tint[1] + 1, size=3))
    picture.paste((red, green, blue), (left, top, left + size, top + size), mask)
    return picture


def _part_of(photograph: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A random part of a photograph with the wanted shape, enlarged where it must be."""
    columns, rows = photograph.size
    share = rng.uniform(0.5, 1.0) * min(columns / width, rows / height)
    part_width, part_height = width * share, height * share
    left, top = rng.uniform(0, columns - part_width), rng.uniform(0, rows - part_height)
    box = (left, top, left + part_width, top + part_height)
    return photograph.resize((width, height), Image.Resampling.BILINEAR, box=box)


def make(out: Path, seed: int = 0, limit: int | None = None, how: Difficulty = EASY) -> tuple[int, int]:
    """Write the data set to a folder that does not exist yet; returns the numbers of training and validation pictures.

    `limit` takes only so many digits, for tests. Made under a temporary name and renamed, so a folder that is there is
    whole. Raises UserError where `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists. Name a new folder, or delete this one.")
    digits = load_digits()
    photographs = [Image.fromarray((photo * how.darken).astype(np.uint8)) for photo in load_sample_images().images]
    order = np.random.default_rng(seed).permutation(len(digits.images))[:limit].tolist()
    val_count = round(len(order) * VAL_PICTURES / len(digits.images))
    order += order[val_count:] * (how.copies - 1)
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    for label in range(CLASSES):
        (temporary / "train" / f"n{label:08d}").mkdir(parents=True)
    (temporary / "val").mkdir()

    def draw(count: int) -> int:
        """Picture `count`, from a generator of its own: the same whoever draws it; returns its label."""
        label = int(digits.target[order[count]])
        path = temporary / "train" / f"n{label:08d}" / f"n{label:08d}_{count:04d}.JPEG"
        if count < val_count:
            path = temporary / "val" / f"PhotoDigits_val_{count + 1:08d}.JPEG"
        rng = np.random.default_rng([seed, count])
        picture = digit_picture(digits.images[order[count]], photographs, rng, how)
        _save(picture, path, count, quality=int(rng.integers(85, 96)))
        return label

    labels = []
    with progress("photo digits", len(order), "pictures") as report, ThreadPoolExecutor(usable_cores()) as pool:
        for label in pool.map(draw, range(len(order))):
            labels.append(label)
            report.advance()
    truth = [f"{label + 1}\n" for label in labels[:val_count]]
    (temporary / "val_ground_truth.txt").write_text("".join(truth))
    temporary.rename(out)
    return len(order) - val_count, val_count


def _save(picture: Image.Image, path: Path, count: int, quality: int) -> None:
    """As ILSVRC does: nearly always an RGB JPEG."""
    if count % _ODD_EVERY == 10:
        picture = picture.convert("L")
    elif count % _ODD_EVERY == 40:
        picture = picture.convert("CMYK")
    if count == 7 or count == 777:
        picture.save(path, "PNG")
    else:
        picture.save(path, "JPEG", quality=quality)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--hard", is_flag=True, help="About as hard as CIFAR-10, four training pictures of each digit.")
def main(out: Path, seed: int, hard: bool) -> None:
    """Make the demo's data set, digits over photographs in ILSVRC's layout, in the new folder OUT."""
    try:
        train, val = make(out, seed, how=HARD if hard else EASY)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    say(f"{out}: {count_noun(train, 'training picture')}, {count_noun(val, 'validation picture')}")


if __name__ == "__main__":
    main()
