"""Augmentation: the formula of a training image and of an evaluation image, and the crops of each batch.

The computation of an image has six steps, in this order:

1. Window: a part of a record becomes size_px × size_px pixels, uint8 RGB.
2. Effects: jitter, grey and blur change the pixels of training images (pipeline/effects/). The result is uint8.
3. Flip: a training image is mirrored left to right with probability `flip`.
4. Colour: one RGB offset, the colour noise, is added to all pixels of a training image.
5. Mean and scale: the mean is subtracted, and the image is divided by the divisor and by `std`.
6. Erase: in some training images, all pixels of a box become 0.

S (side_px × side_px × 3, RGB, 0..255) is the central square of a record. Before the box is erased, a training image is

    image[c, i, j] = (W[i, j', c] + shift[c] − mean[c, i, j]) / (divisor · std[c])
    j' = j, or size_px − 1 − j if flipped

W is the window after jitter, grey and blur. The setting `window` chooses the window:

    random      S[y + i, x + j]. y and x are drawn uniformly from 0..side_px − size_px inclusive. For side_px = 256 and
                size_px = 224 there are 33 × 33 positions. Section 4.1 of the paper counts 32 × 32 positions and 2
                flips, but the released code, convdata_jpeg.py, draws from 33 × 33 positions
    centre      S[y + i, x + j] with y = x = (side_px − size_px) // 2
    resized     a random region of the complete record, resized to size_px × size_px. pipeline.sampling.choose_regions
                draws the region as torchvision's RandomResizedCrop.get_params does, with the settings `scale` and
                `ratio`. The resizing is Pillow's antialiased bilinear filter (pipeline/engines/resample.h): a pass
                along the rows, then a pass along the columns. Each pass rounds to bytes

- shift = P·diag(σ)·z with z ~ N(0, I) is one RGB offset for all pixels of an image. The columns of P are the
  eigenvectors of the covariance matrix of the RGB values. Augmentation.colour selects the formula of σ.
- std is 1 if Augmentation.std is None.
- If a record is not square (`alexprep build-lmdb --keep-aspect`), S begins at row (height − side_px) // 2 and column
  (width − side_px) // 2 of the record.

An evaluation image has no shift, and its window is never a resized region. An evaluation image is divided by
eval_divisor if eval_divisor is a number, and otherwise by the divisor. The authors' code divides only training images,
because only training images have colour noise, which enlarges the values (convdata_jpeg.py:155-179). The recipe
`released` therefore has an eval_divisor of 1.

The centre crop of an evaluation image begins at row and column (side_px − size_px) // 2. The ten views are the crops at
top left, top right, centre, bottom left and bottom right, then the same five crops mirrored. convdata_jpeg.py uses the
same order. With views="square", S is the only crop, for a network that slides over S.

If Augmentation.mean is a tuple of three grey levels, mean[c, i, j] is the grey level of channel c. Otherwise, mean[c,
i, j] is computed from M, the mean of the central squares of the training split:

    channel     the mean of M over all pixels: one value for each channel
    image       M[m + i, m + j, c] with m = (side_px − size_px) // 2: the centre crop of M, which is the same for every
                window and is never mirrored, as in convdata_jpeg.py. With views="square", m = 0
    aligned     M[y + i, x + j', c]: the part of M at the position of the crop. If the crop is mirrored, this part is
                mirrored too, as in Caffe's data_transformer.cpp. A resized region has no aligned part
    none        0

pipeline.sampling draws the random numbers. Four engines in pipeline.engines compute the formula: cpu_engine (C, on a
CPU), raw_gpu_engine (Triton, raw records on a GPU), dali_engine (DALI, JPEG records on a GPU) and dali_window_engine
(DALI and Triton, JPEG records with effects on a GPU). On a CPU whose C kernel cannot read the records, raw_gpu_engine
computes images with resized regions or effects, and dali_engine computes other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.effects.parameters import Effects, effect_parameters
from pipeline.records import RecordBatch
from pipeline.sampling import Draws, choose_regions
from pipeline.settings.augmentation import COLOURS, CROP_PX, MEANS, Augmentation, check_choice
from prep.console import UserError
from prep.images.central_square import central_offset
from prep.store.manifest import ColorStats, Store

__all__ = [
    "COLOURS",
    "CROP_PX",
    "LAYOUTS",
    "MEANS",
    "SQUARE",
    "Augmentation",
    "Augmenter",
    "Crops",
    "check_choice",
    "eval_offsets",
    "noise_matrix",
]

LAYOUTS = ("NCHW", "NHWC")
SQUARE = "square"  # value of `views` that serves the complete central square as one crop


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
    """Crops of N records: V crops of each record, each with a position and flip, and one RGB shift for each record."""

    # (N, 2): row and column at which the central square begins in the record; 0 for resized regions
    origin: npt.NDArray[np.int32]
    # (N, V, 2): row and column of each crop in the central square, 0..side_px − size_px; 0 if the crop is the complete
    # square. For a resized region: its row and column in the record
    offset: npt.NDArray[np.int32]
    flip: npt.NDArray[np.int32]  # (N, V): 0 or 1
    shift: npt.NDArray[np.float32]  # (N, 3): colour noise, minus the channel means if the mean is one value per channel
    # (N, V, 2): height and width of the regions that are resized; None: the crops are not resized
    extent: npt.NDArray[np.int32] | None = None
    effects: Effects | None = None  # effects of the N · V images; None: no effects


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

        `mean_rgb`, in grey levels, replaces the mean of the augmentation.

        Raises StoreError if the store lacks colour statistics, and UserError if its images are smaller than size_px.
        """
        self.side_px, self.size_px = store.settings.side_px, augmentation.size_px
        if self.side_px < self.size_px:
            raise UserError(
                f"{store.root} has images of {self.side_px} px, which is less than a crop of {self.size_px} px. "
                f"Build the store with --side {max(self.size_px, 256)}, or choose a size_px of at most {self.side_px}."
            )
        self.augmentation = augmentation
        self.from_windows = from_windows
        self.is_raw = from_windows or store.settings.format == "ppm"
        self.max_offset_px = self.side_px - self.size_px  # the largest row or column of a crop in the central square
        stats = store.color_stats()
        if mean_rgb is None and not isinstance(augmentation.mean, str):
            mean_rgb = augmentation.mean
        elif mean_rgb is None:
            mean_rgb = stats.mean_rgb if augmentation.mean == "channel" else (0, 0, 0)
        self.mean_rgb = np.array(mean_rgb)
        self.std_rgb = np.array(augmentation.std or (1, 1, 1), np.float64)  # (3,), in grey levels
        self.noise = noise_matrix(stats, augmentation.colour, augmentation.strength)
        self.mean_image = store.mean_image() if augmentation.mean in ("image", "aligned") else None

    def random_crops(
        self,
        records: RecordBatch,
        draws: Draws,
        regions: npt.NDArray[np.float64] | None = None,
        effect_numbers: npt.NDArray[np.float64] | None = None,
    ) -> Crops:
        """Return crops of a training batch: one random crop of each record.

        `regions` are the random numbers of pipeline.sampling.draw_regions, or None if the windows are not resized
        regions. `effect_numbers` are the random numbers of draw_effects, or None if no image can have effects.
        """
        shift = (draws.normal @ self.noise.T - self.mean_rgb).astype(np.float32)
        flip, offset = draws.flip[:, None], draws.offset[:, None]
        effects = None
        if effect_numbers is not None:
            effects = effect_parameters(effect_numbers, self.augmentation, self.augmentation.size_px)
        if regions is None or self.from_windows:
            return Crops(self._origin(records, offset), offset, flip, shift, effects=effects)
        boxes = choose_regions(regions, records.sizes, self.augmentation.ratio)[:, None]
        return Crops(np.zeros_like(records.sizes), boxes[:, :, :2], flip, shift, boxes[:, :, 2:], effects)

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
