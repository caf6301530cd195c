"""Augmentation: the formula for crop, flip, colour noise and mean subtraction, and the crops of each batch.

For a record whose central square is S (side_px × side_px × 3, RGB, 0..255), a training image is

    image[c, i, j] = (S[y + i, x + j', c] + shift[c] − mean[c, i, j]) / divisor        j' = j, or 223 − j if flipped

- y and x are drawn uniformly from 0..side_px − 224 inclusive. For side_px = 256 there are 33 × 33 positions. Section
  4.1 of the paper counts 32 × 32 positions and 2 flips. The released code, convdata_jpeg.py, draws from 33 × 33
  positions.
- An image is flipped with probability one half.
- shift = P·diag(σ)·z with z ~ N(0, I) is one RGB offset for all pixels of an image. The columns of P are the
  eigenvectors of the covariance matrix of the RGB values. Augmentation.colour gives σ.
- If a record is not square (`alexprep build-lmdb --keep-aspect`), S begins at row (height − side_px) // 2 and column
  (width − side_px) // 2 of the record.

An evaluation image has no shift. An evaluation image is divided by eval_divisor if eval_divisor is a number, and
otherwise by the divisor. The authors' code divides only training images, because only training images have colour
noise, which enlarges the values (convdata_jpeg.py:155-179). The recipe `released` therefore has an eval_divisor of 1.

The centre crop of an evaluation image begins at row and column (side_px − 224) // 2. The ten views are the crops at top
left, top right, centre, bottom left and bottom right, then the same five crops mirrored. convdata_jpeg.py uses the same
order. With views="square", S is the only crop, for a network that slides over S.

mean[c, i, j] is computed from M, the mean of the central squares of the training split:

    channel     the mean of M over all pixels: one value for each channel
    image       M[m + i, m + j, c] with m = (side_px − 224) // 2: the centre crop of M, which is the same for every
                crop and is never mirrored, as in convdata_jpeg.py. If the crop is all of S, m = 0
    aligned     M[y + i, x + j', c]: the part of M at the position of the crop. If the crop is mirrored, this part is
                mirrored too, as in Caffe's data_transformer.cpp
    none        0

pipeline.sampling draws y, x, flip and z. Three engines compute the formula: pipeline.engines.cpu_engine (C, on a CPU),
pipeline.engines.raw_gpu_engine (Triton, raw records on a GPU) and pipeline.engines.dali_engine (DALI, JPEG records on a
GPU, and on a CPU without the compiled kernel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.records import RecordBatch
from pipeline.sampling import Draws
from prep.console import UserError, WrongArgument, did_you_mean
from prep.images.central_square import central_offset
from prep.store.manifest import ColorStats, Store

CROP_PX = 224
MEANS = ("channel", "image", "aligned", "none")
COLOURS = ("stdev", "eigenvalue", "off")
LAYOUTS = ("NCHW", "NHWC")
SQUARE = "square"  # value of `views` that serves the complete central square as one crop


@dataclass(frozen=True)
class Augmentation:
    """Settings of the formula that the docstring of this module describes.

    A recipe (train/config) gives each setting and its source.
    """

    mean: str = "channel"  # mean to subtract, one of MEANS; the docstring of this module describes them
    # How σ, in grey levels, is computed from the eigenvalues λ of the covariance matrix of the RGB values. "stdev":
    # strength·√λ, with λ of pixels in 0..255 (the authors' code). "eigenvalue": 255·strength·λ, with λ of pixels in [0,
    # 1]. "off": 0.
    colour: str = "stdev"
    strength: float = 0.1  # standard deviation of α, the factor of the colour noise (section 4.1)
    divisor: float = 1.0  # every finished image is divided by this number; 1 + strength in the authors' code
    shared_by: int = 1  # number of consecutive images that share crop and flip; 32 in the authors' code (crop_chunk)
    eval_divisor: float | None = None  # divisor of evaluation images; None: same as `divisor`; 1 in the authors' code

    @property
    def divisor_in_evaluation(self) -> float:
        """The number by which evaluation images are divided."""
        return self.divisor if self.eval_divisor is None else self.eval_divisor

    def __post_init__(self) -> None:
        """Raises UserError for a value that is not allowed."""
        check_choice("mean", self.mean, MEANS)
        check_choice("colour", self.colour, COLOURS)
        if self.strength < 0 or min(self.divisor, self.divisor_in_evaluation) <= 0 or self.shared_by < 1:
            raise WrongArgument(
                f"strength {self.strength}, divisor {self.divisor}, shared_by {self.shared_by}, eval_divisor "
                f"{self.eval_divisor}: expected strength at least 0, divisors more than 0, shared_by at least 1."
            )


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise WrongArgument if `value` is not one of `allowed`."""
    if value not in allowed:
        raise WrongArgument(f"{name} {value!r}: expected one of {', '.join(allowed)}.{did_you_mean(value, allowed)}")


def noise_matrix(stats: ColorStats, colour: str, strength: float) -> npt.NDArray[np.float64]:
    """Return the matrix A of the colour noise, float64 (3, 3): shift = A·z in grey levels, with z ~ N(0, I).

    Section 4.1 adds [p1, p2, p3][α1 λ1, α2 λ2, α3 λ3]ᵀ, with eigenvectors p, eigenvalues λ, and factors α of standard
    deviation 0.1. The paper does not state the scale of the pixels. The authors' code uses the standard deviations √λ
    of pixels in 0..255 instead of λ (convdata.py: color_pca). fb.resnet.torch and its successors use the eigenvalues of
    pixels in [0, 1]. The shifts of fb.resnet.torch are 2 to 17 times smaller than the shifts of the authors' code.
    `colour` is "stdev" (the authors' code), "eigenvalue" or "off".
    """
    vectors, stdevs = np.array(stats.eigenvectors), np.array(stats.stdevs)
    scale = float(stats.pixel_scale)
    sigma = {"stdev": stdevs, "eigenvalue": (stdevs / scale) ** 2 * scale, "off": 0.0 * stdevs}[colour]
    noise: npt.NDArray[np.float64] = vectors * (strength * sigma)
    return noise


class Crops(NamedTuple):
    """Crops of N records: V positions and V flips for each record, and one RGB shift for each record."""

    origin: npt.NDArray[np.int32]  # (N, 2): row and column at which the central square begins
    # (N, V, 2): row and column of the crop in the square, 0..side_px − 224; 0 if the crop is the complete square
    offset: npt.NDArray[np.int32]
    flip: npt.NDArray[np.int32]  # (N, V): 0 or 1
    shift: npt.NDArray[np.float32]  # (N, 3): colour noise, minus the channel means if `mean` is "channel"


def eval_offsets(views: int | str, max_offset_px: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return int32 offsets (V, 2) and flips (V,) for views=1 (centre crop), 10 (ten views) or SQUARE (whole square)."""
    middle, far = 0 if views == SQUARE else max_offset_px // 2, max_offset_px
    if views != 10:
        return np.full((1, 2), middle, np.int32), np.zeros(1, np.int32)
    five = np.array([(0, 0), (0, far), (middle, middle), (far, 0), (far, far)], np.int32)
    return np.tile(five, (2, 1)), np.repeat(np.arange(2, dtype=np.int32), 5)


class Augmenter:
    """Computes the Crops of batches from the means and the noise matrix of one store."""

    def __init__(
        self,
        store: Store,
        augmentation: Augmentation,
        from_windows: bool = False,
        mean_rgb: Sequence[float] | None = None,
    ) -> None:
        """If `from_windows`, the crops are made for the windows of pipeline.windows instead of whole records.

        `mean_rgb`, in grey levels, replaces the channel means of the store.

        Raises StoreError if the store lacks colour statistics, and UserError if its images are smaller than 224 px.
        """
        self.side_px = store.settings.side_px
        if self.side_px < CROP_PX:
            raise UserError(
                f"{store.root} has images of {self.side_px} px, which is less than a crop of {CROP_PX} px. "
                "Build the store with --side 256."
            )
        self.augmentation = augmentation
        self.from_windows = from_windows
        self.is_raw = from_windows or store.settings.format == "ppm"
        self.max_offset_px = self.side_px - CROP_PX  # the largest offset of a crop in the square
        stats = store.color_stats()
        self.mean_rgb = np.array(stats.mean_rgb if augmentation.mean == "channel" else (0, 0, 0))
        if mean_rgb is not None:
            self.mean_rgb = np.array(mean_rgb)
        self.noise = noise_matrix(stats, augmentation.colour, augmentation.strength)
        self.mean_image = store.mean_image() if augmentation.mean in ("image", "aligned") else None

    def random_crops(self, records: RecordBatch, draws: Draws) -> Crops:
        """Return crops of a training batch: one random crop of each record."""
        shift = draws.normal @ self.noise.T - self.mean_rgb
        offset = draws.offset[:, None]
        return Crops(self._origin(records, offset), offset, draws.flip[:, None], shift.astype(np.float32))

    def eval_crops(self, records: RecordBatch, views: int | str) -> Crops:
        """Return the centre crop of each record (views=1), its ten views (10) or its central square (SQUARE)."""
        offset, flip = eval_offsets(views, self.max_offset_px)
        count = len(records.numbers)
        offset = np.broadcast_to(offset, (count, *offset.shape))
        return Crops(
            self._origin(records, offset),
            offset,
            np.broadcast_to(flip, (count, *flip.shape)),
            np.broadcast_to(-self.mean_rgb, (count, 3)).astype(np.float32),
        )

    def _origin(self, records: RecordBatch, offset: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return (N, 2): row and column at which the central square begins in each record.

        For a window, row and column are 0 or negative, because a window lies within the central square.
        """
        if not self.from_windows:
            return central_offset(records.sizes, self.side_px)
        return -offset[:, 0] if offset.shape[1] == 1 else np.zeros_like(records.sizes)
