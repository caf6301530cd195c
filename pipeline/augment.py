"""Window, flip and colour noise: the formula of what the stream serves, and the numbers in it.

For a record whose central square is S (side_px × side_px × 3, RGB, 0..255), a training image is

    image[c, i, j] = (S[y + i, x + j'] [c] + shift[c] − mean[c, i, j]) / divisor        j' = j, or 223 − j if flipped

with y, x uniform over 0..side_px − 224 inclusive (33 × 33 windows at 256; the paper's section 4.1 counts 32 × 32 × 2,
the released code's convdata_jpeg.py draws from 33), flip with probability one half, and shift = P·diag(σ)·z, z ~ N(0,
I): one offset for each image, constant over its pixels. A picture stored whole (--keep-aspect) has its central square
at ((height − side_px) // 2, (width − side_px) // 2). Evaluation has no shift and no divisor: the centre window begins
at (side_px − 224) // 2; ten views are top left, top right, centre, bottom left, bottom right, then these mirrored (the
order of convdata_jpeg.py); and the whole of S is a window of side_px, for networks that slide over it: below, m is 0
then. mean[c, i, j] is, of the training split's mean image M over central squares,

    channel     its mean over all pixels, one number a channel
    image       M[m + i, m + j, c], m = (side_px − 224) // 2: the centre window, from every window, never mirrored, as
                convdata_jpeg.py does
    aligned     M[y + i, x + j', c]: the part of M that lies under the window, as Caffe's data_transformer.cpp does
    none        0

What chance decides comes from pipeline.sampling; what is done with the numbers is in pipeline.engines.cpu_engine (on a CPU, in C) and
pipeline.engines.dali_engine (by DALI: on a GPU, and where no C compiler was there).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.records import Record
from pipeline.sampling import Draws
from prep.console import UserError
from prep.store.manifest import ColorStats, Store

CROP_PX = 224
MEANS = ("channel", "image", "aligned", "none")
COLOURS = ("stdev", "eigenvalue", "off")
LAYOUTS = ("NCHW", "NHWC")
SQUARE = "square"  # in place of a number of views: the central square, whole


@dataclass(frozen=True)
class Augmentation:
    """The choices that the formula leaves open. Recipes name them with their sources."""

    mean: str = "channel"  # one of MEANS: see above
    colour: str = "stdev"  # σ = strength·√λ on 0..255 (the authors' code); "eigenvalue": strength·λ on [0, 1]; "off"
    strength: float = 0.1  # standard deviation of α (section 4.1)
    divisor: float = 1.0  # of the finished training image; the authors' code divides by 1 + strength
    shared_by: int = 1  # consecutive images with one window and flip: 32 in the authors' code (crop_chunk)

    def __post_init__(self) -> None:
        """Raise UserError for a choice that does not exist."""
        check_choice("mean", self.mean, MEANS)
        check_choice("colour", self.colour, COLOURS)
        if self.strength < 0 or self.divisor <= 0 or self.shared_by < 1:
            raise UserError(
                f"strength {self.strength}, divisor {self.divisor}, shared_by {self.shared_by}: expected at least 0, "
                "more than 0, and at least 1."
            )


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise UserError for a value that is not one of those allowed."""
    if value not in allowed:
        raise UserError(f"{name} {value!r}: expected one of {', '.join(allowed)}.")


def noise_matrix(stats: ColorStats, colour: str, strength: float) -> npt.NDArray[np.float64]:
    """float64 (3, 3) A with shift = A·z, z ~ N(0, I), in grey levels 0..255.

    Section 4.1 adds [p1, p2, p3][α1 λ1, α2 λ2, α3 λ3]ᵀ, α ~ N(0, 0.1), and calls λ eigenvalues without naming the
    scale of the pixels. The authors' code has standard deviations there, on 0..255 (convdata.py: color_pca);
    fb.resnet.torch and those after it have eigenvalues of pixels in [0, 1], which shifts 2 to 17 times less. Both
    readings are here.
    """
    vectors, stdevs = np.array(stats.eigenvectors), np.array(stats.stdevs)
    scale = float(stats.pixel_scale)
    sigma = {"stdev": stdevs, "eigenvalue": (stdevs / scale) ** 2 * scale, "off": 0.0 * stdevs}[colour]
    noise: npt.NDArray[np.float64] = vectors * (strength * sigma)
    return noise


class Crops(NamedTuple):
    """Where the windows of N records lie, V to each, and what is added to their pixels."""

    origin: npt.NDArray[np.int32]  # (N, 2): row and column at which the central square begins
    offset: npt.NDArray[np.int32]  # (N, V, 2): of the window in the square, 0..side_px − 224; of the whole square 0
    flip: npt.NDArray[np.int32]  # (N, V)
    shift: npt.NDArray[np.float32]  # (N, 3): colour noise minus the mean of the channels, where that is the mean


def eval_offsets(views: int | str, max_offset_px: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Offsets (V, 2) and flips (V,) of the centre window (1), of the ten views (10), or of the square (SQUARE)."""
    middle, far = 0 if views == SQUARE else max_offset_px // 2, max_offset_px
    if views != 10:
        return np.full((1, 2), middle, np.int32), np.zeros(1, np.int32)
    five = np.array([(0, 0), (0, far), (middle, middle), (far, 0), (far, far)], np.int32)
    return np.tile(five, (2, 1)), np.repeat(np.arange(2, dtype=np.int32), 5)


class Augmenter:
    """The numbers of the formula for one store."""

    def __init__(self, store: Store, augmentation: Augmentation) -> None:
        """Raises StoreError where the store's statistics are missing, UserError where its pictures are too small."""
        self.side_px = store.settings.side_px
        if self.side_px < CROP_PX:
            raise UserError(
                f"{store.root} holds pictures of {self.side_px} px, the window is {CROP_PX} px. "
                "Build it with --side 256."
            )
        self.augmentation = augmentation
        self.is_raw = store.settings.format == "ppm"
        self.max_offset_px = self.side_px - CROP_PX  # the largest offset of a window
        stats = store.color_stats()
        self.mean_rgb = np.array(stats.mean_rgb if augmentation.mean == "channel" else (0, 0, 0))
        self.noise = noise_matrix(stats, augmentation.colour, augmentation.strength)
        self.mean_image = store.mean_image() if augmentation.mean in ("image", "aligned") else None

    def random_crops(self, records: Sequence[Record], draws: Draws) -> Crops:
        """One random window of each record."""
        shift = draws.normal @ self.noise.T - self.mean_rgb
        return Crops(self._origin(records), draws.offset[:, None], draws.flip[:, None], shift.astype(np.float32))

    def eval_crops(self, records: Sequence[Record], views: int | str) -> Crops:
        """The centre window of each record, its ten views, or its square."""
        offset, flip = eval_offsets(views, self.max_offset_px)
        many = len(records)
        return Crops(
            self._origin(records),
            np.broadcast_to(offset, (many, *offset.shape)),
            np.broadcast_to(flip, (many, *flip.shape)),
            np.broadcast_to(-self.mean_rgb, (many, 3)).astype(np.float32),
        )

    def _origin(self, records: Sequence[Record]) -> npt.NDArray[np.int32]:
        sizes = np.array([(record.height, record.width) for record in records], np.int32)
        return (sizes - self.side_px) // 2
