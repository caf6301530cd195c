"""The formula of augment.py as a DALI graph: on a GPU, and on a CPU where pipeline.engines.kernels could not be compiled.

The graph is without chance or memory: draws enter it as numbers. After the decoder one operator does it all:
crop_mirror_normalize takes a mean for each sample, so the noise rides along as `mean − shift` and costs nothing. A mean
image costs one more pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import CROP_PX, Augmenter, Crops, eval_offsets
from pipeline.placement import Placement, dali
from pipeline.records import Record

Node = Any  # nvidia.dali.DataNode: DALI ships no types


class OutputFormat(NamedTuple):
    """What images are asked for."""

    views: int = 1  # of each record: 1 or 10
    layout: str = "NCHW"  # one of LAYOUTS
    divisor: float = 1.0
    dtype: torch.dtype = torch.float32
    crop_px: int = CROP_PX  # its side; the square's, where one view is the whole of it


def decode_crop(placement: Placement, size_px: int) -> Node:
    """uint8 HWC of encoded pictures: the square of `size_px` that begins at `start`. BatchInput with `encoded`'s numbers."""
    fn, types = dali().fn, dali().types
    return fn.decoders.image_slice(  # which stops below the square
        source("picture", types.UINT8, 1),
        device=placement.decoder_device,
        start=source("start", types.INT32, 1),
        shape=[size_px] * 2,
        axes=[0, 1],
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # a GPU's chroma as libjpeg-turbo's
        adjust_orientation=False,
    )


def decode_inputs(records: Sequence[Record], start: npt.NDArray[np.int32]) -> dict[str, Any]:
    """What `decoded` is fed with; int32 (N, 2) says where each square begins."""
    return {"picture": tensors(records), "start": start}


def tensors(records: Sequence[Record], layout: str = "") -> list[Any]:
    """Pictures as DALI takes them fastest; they are not copied."""
    return [dali().tensors.TensorCPU(record.payload, layout) for record in records]


def source(name: str, dtype: Any, dimensions: int, layout: str | None = None) -> Node:
    """A node that is fed from outside."""
    return dali().fn.external_source(name=name, dtype=dtype, ndim=dimensions, layout=layout, no_copy=True)


class DaliEngine:
    """Windows by DALI: `nodes`, what they are fed with, and what becomes of their output."""

    def __init__(self, augmenter: Augmenter, placement: Placement, form: OutputFormat) -> None:
        self._augmenter, self._placement, self._views = augmenter, placement, form.views
        self._layout, self._divisor, self._dtype = form.layout[1:], form.divisor, form.dtype
        self._crop_px, self._max_offset_px = form.crop_px, augmenter.side_px - form.crop_px
        self._fn, self._types = dali().fn, dali().types

    def define_graph(self) -> Node:
        """Images as the formula says: one or ten of each picture."""
        return self._window() if self._views == 1 else self._ten_views()

    def graph_inputs(self, records: Sequence[Record], crops: Crops) -> dict[str, Any]:
        """What the nodes are fed with, by name: one for each picture."""
        start = crops.origin if self._views > 1 else crops.origin + crops.offset[:, 0]
        if self._augmenter.is_raw:
            if self._views > 1:
                return {"picture": tensors(self._squares(records, start), "HWC")}
            sizes = np.array([record.payload.shape[:2] for record in records], np.int32)
            y, x = _shares(start, sizes - self._crop_px)
            fed = {"picture": tensors(records, "HWC"), "y": y, "x": x}
        else:
            fed = decode_inputs(records, start)
        if self._views == 1:
            fed |= {"flip": np.ascontiguousarray(crops.flip[:, 0]), "mean": np.ascontiguousarray(-crops.shift)}
            if self._augmenter.augmentation.mean == "aligned":
                offset = crops.offset[:, 0]
                fed["mean_y"], fed["mean_x"] = _shares(offset, np.full_like(offset, self._max_offset_px))
        return fed

    def finish(self, outputs: tuple[Any, ...], records: Sequence[Record], crops: Crops) -> torch.Tensor:
        """DALI's output as a tensor: a view of memory that is its own for as long as a tensor of it lives.

        torch halves: DALI has no bfloat16, and on a CPU takes four times as long for float16 as for float32.
        """
        images: torch.Tensor = self._placement.tensor_from_dali(outputs[0])
        return images.to(self._dtype)

    def close(self) -> None:
        """Nothing is held but nodes."""

    def _squares(self, records: Sequence[Record], start: npt.NDArray[np.int32]) -> list[Record]:
        side = self._augmenter.side_px
        squares = []
        for record, (y, x) in zip(records, start.tolist(), strict=True):
            squares.append(record._replace(payload=np.ascontiguousarray(record.payload[y : y + side, x : x + side])))
        return squares

    def _pictures(self, size_px: int) -> Node:
        """uint8 HWC: of a JPEG the square of `size_px` that is asked for, of a PPM all that is fed."""
        if self._augmenter.is_raw:
            return self._placement.to_device(source("picture", self._types.UINT8, 3, "HWC"))
        return decode_crop(self._placement, size_px)

    def _window(self) -> Node:
        fn, types = self._fn, self._types
        picture, where = self._pictures(self._crop_px), {}
        if self._augmenter.is_raw:
            where = {"crop_pos_y": source("y", types.FLOAT, 0), "crop_pos_x": source("x", types.FLOAT, 0)}
            where["crop"] = (self._crop_px, self._crop_px)
        flip = source("flip", types.INT32, 0)
        image = self._normalized(picture, flip, source("mean", types.FLOAT, 1), **where)
        if self._augmenter.augmentation.mean == "aligned":
            assert self._augmenter.mean_image is not None
            places = [source(name, types.FLOAT, 0) for name in ("mean_y", "mean_x")]
            whole = self._placement.constant(types, self._augmenter.mean_image.astype(np.float32), "HWC")
            under = fn.crop_mirror_normalize(
                whole,
                crop=(self._crop_px, self._crop_px),
                crop_pos_y=places[0],
                crop_pos_x=places[1],
                mirror=flip,
                mean=[0.0] * 3,
                std=[self._divisor] * 3,
                dtype=types.FLOAT,
                output_layout=self._layout,
            )
            return image - under
        return self._minus_centre(image)

    def _ten_views(self) -> Node:
        """(10, …) for each picture, out of its square; the windows are the same for all."""
        square, views = self._pictures(self._augmenter.side_px), []
        room = self._max_offset_px
        offsets, flips = eval_offsets(self._views, room)
        for (y, x), flip in zip(offsets.tolist(), flips.tolist(), strict=True):
            where = {"crop_pos_y": y / max(room, 1), "crop_pos_x": x / max(room, 1)}
            mean = self._augmenter.mean_rgb.tolist()
            image = self._normalized(square, flip, mean, crop=(CROP_PX, CROP_PX), **where)
            if self._augmenter.augmentation.mean == "aligned":
                assert self._augmenter.mean_image is not None
                under = self._augmenter.mean_image[y : y + CROP_PX, x : x + CROP_PX]
                views.append(image - self._constant(under[:, ::-1] if flip else under))
            else:
                views.append(self._minus_centre(image))
        return self._fn.stack(*views)

    def _normalized(self, picture: Node, flip: Node, mean: Any, **where: Any) -> Node:
        return self._fn.crop_mirror_normalize(
            picture,
            mirror=flip,
            mean=mean,
            std=[self._divisor] * 3,
            dtype=self._types.FLOAT,
            output_layout=self._layout,
            **where,
        )

    def _minus_centre(self, image: Node) -> Node:
        if self._augmenter.augmentation.mean != "image":
            return image
        assert self._augmenter.mean_image is not None
        under = slice(self._max_offset_px // 2, self._max_offset_px // 2 + self._crop_px)
        return image - self._constant(self._augmenter.mean_image[under, under] / self._divisor)

    def _constant(self, hwc: npt.NDArray[Any]) -> Node:
        values = hwc.transpose(2, 0, 1) if self._layout == "CHW" else hwc
        return self._placement.constant(self._types, np.ascontiguousarray(values, np.float32))


def _shares(
    offset: npt.NDArray[np.int32], room: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(y, x) as crop_pos wants them, shares of the room: DALI multiplies and rounds, so the px come back exactly."""
    shares = (offset / np.maximum(room, 1)).astype(np.float32)
    return np.ascontiguousarray(shares[:, 0]), np.ascontiguousarray(shares[:, 1])
