"""Window, flip and colour noise as pieces of a DALI graph: the formula of what the stream serves.

For a record whose central square is S (side_px × side_px × 3, RGB, 0..255), a training image is

    image[c, i, j] = (S[y + i, x + j'] [c] + shift[c] − mean[c, i, j]) / divisor        j' = j, or 223 − j if flipped

with y, x uniform over 0..side_px − 224 inclusive (33 × 33 windows at 256; the paper's section 4.1 counts 32 × 32 × 2,
the released code's convdata_jpeg.py draws from 33), flip with probability one half, and shift = P·diag(σ)·z, z ~ N(0,
I): one offset for each image, constant over its pixels. Evaluation has no shift and no divisor.

All of that after the decoder is one operator: crop_mirror_normalize takes a mean for each sample, so the noise rides
along as `mean − shift` and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.placement import Placement, dali
from prep.console import UserError
from prep.manifest import ColourStats, Settings, Store

WINDOW_PX = 224
MEANS = ("channel", "image", "none")
COLOURS = ("stdev", "eigenvalue", "off")

Node = Any  # nvidia.dali.DataNode: DALI ships no types


@dataclass(frozen=True)
class Augmentation:
    """The choices that the formula leaves open. Recipes name them with their sources."""

    mean: str = (
        "channel"  # "image": centre window of the mean image, from every window (convdata_jpeg.py); "channel"; "none"
    )
    colour: str = "stdev"  # σ = strength·√λ on 0..255 (the authors' code); "eigenvalue": strength·λ on [0, 1]; "off"
    strength: float = 0.1  # standard deviation of α (section 4.1)
    divisor: float = 1.0  # of the finished training image; the authors' code divides by 1 + strength
    shared_by: int = 1  # consecutive images with one window and flip: 32 in the authors' code (crop_chunk)

    def __post_init__(self) -> None:
        """Raise UserError for a choice that does not exist."""
        for name, value, allowed in (("mean", self.mean, MEANS), ("colour", self.colour, COLOURS)):
            if value not in allowed:
                raise UserError(f"{name} {value!r}: expected one of {', '.join(allowed)}.")
        if self.strength < 0 or self.divisor <= 0 or self.shared_by < 1:
            raise UserError(
                f"strength {self.strength}, divisor {self.divisor}, shared_by {self.shared_by}: expected at least 0, "
                "more than 0, and at least 1."
            )


class Draws(NamedTuple):
    """What chance decided for each image, as graph nodes: for the oracle of the tests and for the preview."""

    offset: Node  # (2,) int32: y, x of the window in the central square
    flip: Node  # () int32: 0 or 1
    shift: Node  # (3,) float32: grey levels added to R, G, B


def noise_matrix(stats: ColourStats, colour: str, strength: float) -> npt.NDArray[np.float32]:
    """float32 (3, 3) A with shift = A·z, z ~ N(0, I), in grey levels 0..255.

    Section 4.1 adds [p1, p2, p3][α1 λ1, α2 λ2, α3 λ3]ᵀ, α ~ N(0, 0.1), and calls λ eigenvalues without naming the
    scale of the pixels. The authors' code has standard deviations there, on 0..255 (convdata.py: color_pca);
    fb.resnet.torch and those after it have eigenvalues of pixels in [0, 1], which shifts 2 to 17 times less. Both
    readings are here.
    """
    vectors, stdevs = np.array(stats.eigenvectors), np.array(stats.stdevs)
    scale = float(stats.pixel_scale)
    sigma = {"stdev": stdevs, "eigenvalue": (stdevs / scale) ** 2 * scale, "off": 0.0 * stdevs}[colour]
    return (vectors * (strength * sigma)).astype(np.float32)


class Augmenter:
    """Builds the image part of a graph for one store, on one placement."""

    def __init__(self, store: Store, placement: Placement, how: Augmentation) -> None:
        """Raises StoreError where the store's statistics are missing, UserError where its pictures are too small."""
        side = store.settings.side_px
        if side < WINDOW_PX:
            raise UserError(
                f"{store.root} holds pictures of {side} px, the window is {WINDOW_PX} px. Build it with --side 256."
            )
        self.settings: Settings = store.settings
        self.stats = store.colour()
        self.placement, self.how = placement, how
        self.room = side - WINDOW_PX  # the largest offset of a window
        self.fn, self.types = dali().fn, dali().types
        self.mean_rgb = np.array(self.stats.mean_rgb if how.mean == "channel" else (0, 0, 0), np.float32)
        centre = slice(self.room // 2, self.room // 2 + WINDOW_PX)
        self.mean_image = store.mean_image()[centre, centre].transpose(2, 0, 1) if how.mean == "image" else None

    def draw(self, batch_size: int, seeds: tuple[int, int, int]) -> Draws:
        """One draw for each image of a batch, from three seeds: of windows, flips and colours."""
        fn = self.fn
        offset = fn.random.uniform(
            values=[float(k) for k in range(self.room + 1)], shape=2, dtype=self.types.INT32, seed=seeds[0]
        )
        flip = fn.random.coin_flip(probability=0.5, seed=seeds[1])
        if self.how.shared_by > 1:
            leaders = [i - i % self.how.shared_by for i in range(batch_size)]
            offset, flip = fn.permute_batch(offset, indices=leaders), fn.permute_batch(flip, indices=leaders)
        matrix = noise_matrix(self.stats, self.how.colour, self.how.strength)
        noise = fn.random.normal(shape=3, seed=seeds[2])
        return Draws(offset, flip, fn.reductions.sum(self.types.Constant(matrix) * noise, axes=1))

    def training_image(self, record: Node, draws: Draws) -> Node:
        """float32 (3, 224, 224): the formula above, for an encoded record."""
        picture, y, x = self._window(record, draws.offset)
        return self._finish(picture, y, x, draws.flip, draws.shift, self.how.divisor)

    def centre_view(self, record: Node) -> Node:
        """float32 (3, 224, 224): the centre window."""
        middle = np.array([self.room // 2] * 2, np.int32)
        picture, y, x = self._window(record, self.types.Constant(middle))
        return self._finish(picture, y, x)

    def ten_views(self, record: Node) -> Node:
        """float32 (10, 3, 224, 224): top left, top right, centre, bottom left, bottom right, then these mirrored.

        The order of convdata_jpeg.py; the paper (section 4.1) names the ten without one.
        """
        square, top, left = self._square(record)
        far, middle = self.room, self.room // 2
        corners = ((0, 0), (0, far), (middle, middle), (far, 0), (far, far))
        views = [self._finish(square, top + y, left + x, flip) for flip in (0, 1) for y, x in corners]
        return self.fn.stack(*views)

    def stored_square(self, record: Node) -> Node:
        """uint8 (side_px, side_px, 3): the central square as it is stored."""
        square, top, left = self._square(record)
        return square[top:, left:, :] if top or left else square

    def _square(self, record: Node) -> tuple[Node, int, int]:
        """The decoded central square as HWC uint8, and the row and column of it where picture begins."""
        fn, side = self.fn, self.settings.side_px
        if self._is_raw:
            raw = fn.reinterpret(record, shape=[side + 1, side, 3], layout="HWC")
            return self.placement.place(raw), 1, 0
        if self.settings.keep_aspect:
            return self._decode_slice(record, self._origin(record), side), 0, 0
        return fn.decoders.image(record, device=self.placement.decoder, **self._exact), 0, 0

    def _window(self, record: Node, offset: Node) -> tuple[Node, Node, Node]:
        """A picture and the row and column of it at which the window begins, which may be all there is of it."""
        if self._is_raw:
            square, top, left = self._square(record)
            return square, offset[0] + top, offset[1] + left
        start = offset + self._origin(record) if self.settings.keep_aspect else offset
        return self._decode_slice(record, start, WINDOW_PX), None, None

    def _finish(
        self, picture: Node, y: Node, x: Node, flip: Node = 0, shift: Node = None, divisor: float = 1.0
    ) -> Node:
        """Cut (where y and x say), mirror, subtract, divide, float32 CHW: one fused operator, a second for a mean
        image.
        """
        fn, types = self.fn, self.types
        cut: dict[str, Any] = {}
        if y is not None:
            rows = self.settings.side_px + (1 if self._is_raw else 0)
            cut = {
                "crop": (WINDOW_PX, WINDOW_PX),
                "crop_pos_y": _fraction(fn, types, y, rows - WINDOW_PX),
                "crop_pos_x": _fraction(fn, types, x, self.room),
            }
        mean = self.mean_rgb.tolist() if shift is None else types.Constant(self.mean_rgb) - shift
        image = fn.crop_mirror_normalize(
            picture,
            mirror=flip,
            mean=mean,
            std=[divisor] * 3,
            dtype=types.FLOAT,
            output_layout="CHW",
            **cut,
        )
        if self.mean_image is None:
            return image
        return image - self.placement.constant(types, (self.mean_image / divisor).astype(np.float32))

    @property
    def _is_raw(self) -> bool:
        """Square PPM records: their bytes are pixels under one row of header, no decoder needed."""
        return self.settings.format == "ppm" and not self.settings.keep_aspect

    @property
    def _exact(self) -> dict[str, Any]:
        """Decoder options that make a GPU upsample chroma as libjpeg-turbo does on the CPU."""
        return {"output_type": self.types.RGB, "jpeg_fancy_upsampling": True, "adjust_orientation": False}

    def _decode_slice(self, record: Node, start: Node, size_px: int) -> Node:
        """Decode a square of a JPEG; the decoder stops below it."""
        fn = self.fn
        return fn.decoders.image_slice(
            record, device=self.placement.decoder, start=start, shape=[size_px] * 2, axes=[0, 1], **self._exact
        )

    def _origin(self, record: Node) -> Node:
        """(2,) int32: row and column at which the central square of a whole picture begins."""
        size = self.fn.cast(self.fn.peek_image_shape(record), dtype=self.types.INT32)[0:2]
        return (size - self.settings.side_px) // 2


def _fraction(fn: Any, types: Any, offset: Node, room: int) -> Node:
    """An offset in px as crop_pos wants it, a share of the room: DALI multiplies and rounds, so the px comes back
    exactly.
    """
    if isinstance(offset, int):
        return offset / max(room, 1)
    return fn.cast(offset, dtype=types.FLOAT) / float(max(room, 1))
