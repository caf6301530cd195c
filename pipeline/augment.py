"""Window, flip and colour noise: the formula of what the stream serves, and its DALI graph.

For a record whose central square is S (side_px × side_px × 3, RGB, 0..255), a training image is

    image[c, i, j] = (S[y + i, x + j'] [c] + shift[c] − mean[c, i, j]) / divisor        j' = j, or 223 − j if flipped

with y, x uniform over 0..side_px − 224 inclusive (33 × 33 windows at 256; the paper's section 4.1 counts 32 × 32 × 2,
the released code's convdata_jpeg.py draws from 33), flip with probability one half, and shift = P·diag(σ)·z, z ~ N(0,
I): one offset for each image, constant over its pixels. A picture stored whole (--keep-aspect) has its central square
at ((height − side_px) // 2, (width − side_px) // 2). Evaluation has no shift and no divisor: the centre window begins
at (side_px − 224) // 2; ten views are top left, top right, centre, bottom left, bottom right, then these mirrored (the
order of convdata_jpeg.py). mean[c, i, j] is, of the training split's mean image M over central squares,

    channel     its mean over all pixels, one number a channel
    image       M[m + i, m + j, c], m = (side_px − 224) // 2: the centre window, from every window, never mirrored, as
                convdata_jpeg.py does
    aligned     M[y + i, x + j', c]: the part of M that lies under the window, as Caffe's data_transformer.cpp does
    none        0

What chance decides comes from pipeline.order and enters the graph as numbers; the graph itself is without chance or
memory. After the decoder one operator does it all: crop_mirror_normalize takes a mean for each sample, so the noise
rides along as `mean − shift` and costs nothing. A mean image costs one more pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.order import Draws
from pipeline.placement import Placement, dali
from pipeline.records import Record
from prep.console import UserError
from prep.manifest import ColourStats, Store

WINDOW_PX = 224
MEANS = ("channel", "image", "aligned", "none")
COLOURS = ("stdev", "eigenvalue", "off")
LAYOUTS = ("NCHW", "NHWC")

Node = Any  # nvidia.dali.DataNode: DALI ships no types


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


def noise_matrix(stats: ColourStats, colour: str, strength: float) -> npt.NDArray[np.float64]:
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


class Augmenter:
    """The image part of a graph for one store, on one placement: its nodes, and the numbers that they are fed with."""

    def __init__(self, store: Store, placement: Placement, how: Augmentation, layout: str) -> None:
        """Raises StoreError where the store's statistics are missing, UserError where its pictures are too small."""
        self.side_px = store.settings.side_px
        if self.side_px < WINDOW_PX:
            raise UserError(
                f"{store.root} holds pictures of {self.side_px} px, the window is {WINDOW_PX} px. "
                "Build it with --side 256."
            )
        check_choice("layout", layout, LAYOUTS)
        self.settings, self.placement, self.how = store.settings, placement, how
        stats = store.colour()
        self.room_px = self.side_px - WINDOW_PX  # the largest offset of a window
        self.mean_rgb = np.array(stats.mean_rgb if how.mean == "channel" else (0, 0, 0))
        self.noise = noise_matrix(stats, how.colour, how.strength)
        self.mean_image = store.mean_image() if how.mean in ("image", "aligned") else None
        self.is_raw = store.settings.format == "ppm"
        self._fn, self._types = dali().fn, dali().types
        self._layout = layout[1:]

    # ---- numbers

    def random_inputs(self, records: Sequence[Record], draws: Draws) -> dict[str, Any]:
        """What `window` is fed with: one random window for each record."""
        return self._inputs(records, draws.offset, draws.flip, self.mean_rgb - draws.normal @ self.noise.T)

    def centre_inputs(self, records: Sequence[Record]) -> dict[str, Any]:
        """What `window` is fed with: the centre window of each record."""
        offset = np.full((len(records), 2), self.room_px // 2, np.int32)
        means = np.broadcast_to(self.mean_rgb, (len(records), 3))
        return self._inputs(records, offset, np.zeros(len(records), np.int32), means)

    def square_inputs(self, records: Sequence[Record]) -> dict[str, Any]:
        """What `ten_views` is fed with: each record's central square."""
        origins = self._origins(records)
        if not self.is_raw:
            return {"picture": self._tensors(records), "start": origins}
        side, squares = self.side_px, []
        for record, (y, x) in zip(records, origins.tolist(), strict=True):
            square = np.ascontiguousarray(record.picture[y : y + side, x : x + side])
            squares.append(record._replace(picture=square))
        return {"picture": self._tensors(squares)}

    def _inputs(
        self,
        records: Sequence[Record],
        offset: npt.NDArray[np.int32],
        flip: npt.NDArray[np.int32],
        means: npt.NDArray[np.float64],
    ) -> dict[str, Any]:
        start = self._origins(records) + offset
        inputs: dict[str, Any] = {
            "picture": self._tensors(records),
            "flip": flip,
            "mean": np.ascontiguousarray(means, np.float32),
        }
        if self.is_raw:
            sizes = np.array([record.picture.shape[:2] for record in records], np.int32)
            inputs["y"], inputs["x"] = _shares(start, sizes - WINDOW_PX)
        else:
            inputs["start"] = start
        if self.how.mean == "aligned":
            inputs["mean_y"], inputs["mean_x"] = _shares(offset, np.full_like(offset, self.room_px))
        return inputs

    def _origins(self, records: Sequence[Record]) -> npt.NDArray[np.int32]:
        """int32 (N, 2): row and column at which each central square begins."""
        if not self.settings.keep_aspect:
            return np.zeros((len(records), 2), np.int32)
        sizes = np.array([(record.height, record.width) for record in records], np.int32)
        return (sizes - self.side_px) // 2

    def _tensors(self, records: Sequence[Record]) -> list[Any]:
        """As DALI takes them fastest; the pictures are not copied."""
        layout = "HWC" if self.is_raw else ""
        return [dali().tensors.TensorCPU(record.picture, layout) for record in records]

    # ---- nodes

    def pictures(self, size_px: int) -> Node:
        """uint8 HWC: of a JPEG the square of `size_px` that is asked for, of a PPM all that is stored."""
        types = self._types
        if self.is_raw:
            return self.placement.place(self._source("picture", types.UINT8, 3, "HWC"))
        return self._fn.decoders.image_slice(  # which stops below the square
            self._source("picture", types.UINT8, 1),
            device=self.placement.decoder,
            start=self._source("start", types.INT32, 1),
            shape=[size_px] * 2,
            axes=[0, 1],
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # a GPU's chroma as libjpeg-turbo's
            adjust_orientation=False,
        )

    def window(self, divisor: float = 1.0) -> Node:
        """Images as the formula says, fed with random_inputs or centre_inputs."""
        fn, types = self._fn, self._types
        picture, where = self.pictures(WINDOW_PX), {}
        if self.is_raw:
            where = {"crop_pos_y": self._source("y", types.FLOAT, 0), "crop_pos_x": self._source("x", types.FLOAT, 0)}
            where["crop"] = (WINDOW_PX, WINDOW_PX)
        flip = self._source("flip", types.INT32, 0)
        image = self._normalised(picture, flip, self._source("mean", types.FLOAT, 1), divisor, **where)
        if self.how.mean == "aligned":
            assert self.mean_image is not None
            places = [self._source(name, types.FLOAT, 0) for name in ("mean_y", "mean_x")]
            whole = self.placement.constant(types, self.mean_image.astype(np.float32), "HWC")
            under = fn.crop_mirror_normalize(
                whole,
                crop=(WINDOW_PX, WINDOW_PX),
                crop_pos_y=places[0],
                crop_pos_x=places[1],
                mirror=flip,
                mean=[0.0] * 3,
                std=[divisor] * 3,
                dtype=types.FLOAT,
                output_layout=self._layout,
            )
            return image - under
        return self._minus_centre(image, divisor)

    def ten_views(self) -> Node:
        """(10, …) for each image, fed with square_inputs."""
        square = self.pictures(self.side_px)
        room, middle = self.room_px, self.room_px // 2
        views = []
        for flip in (0, 1):
            for y, x in ((0, 0), (0, room), (middle, middle), (room, 0), (room, room)):
                where = {"crop_pos_y": y / max(room, 1), "crop_pos_x": x / max(room, 1)}
                image = self._normalised(
                    square, flip, self.mean_rgb.tolist(), 1.0, crop=(WINDOW_PX, WINDOW_PX), **where
                )
                if self.how.mean == "aligned":
                    assert self.mean_image is not None
                    under = self.mean_image[y : y + WINDOW_PX, x : x + WINDOW_PX]
                    views.append(image - self._constant(under[:, ::-1] if flip else under))
                else:
                    views.append(self._minus_centre(image, 1.0))
        return self._fn.stack(*views)

    def _source(self, name: str, dtype: Any, dimensions: int, layout: str | None = None) -> Node:
        return self._fn.external_source(name=name, dtype=dtype, ndim=dimensions, layout=layout, no_copy=True)

    def _normalised(self, picture: Node, flip: Node, mean: Any, divisor: float, **where: Any) -> Node:
        return self._fn.crop_mirror_normalize(
            picture,
            mirror=flip,
            mean=mean,
            std=[divisor] * 3,
            dtype=self._types.FLOAT,
            output_layout=self._layout,
            **where,
        )

    def _minus_centre(self, image: Node, divisor: float) -> Node:
        if self.how.mean != "image":
            return image
        assert self.mean_image is not None
        middle = slice(self.room_px // 2, self.room_px // 2 + WINDOW_PX)
        return image - self._constant(self.mean_image[middle, middle] / divisor)

    def _constant(self, hwc: npt.NDArray[Any]) -> Node:
        values = hwc.transpose(2, 0, 1) if self._layout == "CHW" else hwc
        return self.placement.constant(self._types, np.ascontiguousarray(values, np.float32))


def _shares(
    offset: npt.NDArray[np.int32], room: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(y, x) as crop_pos wants them, shares of the room: DALI multiplies and rounds, so the px come back exactly."""
    shares = (offset / np.maximum(room, 1)).astype(np.float32)
    return np.ascontiguousarray(shares[:, 0]), np.ascontiguousarray(shares[:, 1])
