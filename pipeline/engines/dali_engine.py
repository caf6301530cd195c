"""Augmentation as a DALI graph: used for JPEG records on a GPU, and on a CPU if the C kernel cannot be used.

The graph has no random operators and no state: the random numbers are inputs of the graph. After the decoder, the
operator crop_mirror_normalize crops, flips and normalizes. The operator takes a separate mean for each image. The
colour noise is part of this mean (`mean − shift`), so the noise takes no extra time. Subtracting a mean image takes an
additional pass over the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import CROP_PX, Augmenter, Crops, eval_offsets
from pipeline.device import Placement, dali
from pipeline.engines.device_stream import DeviceStream
from pipeline.records import RecordBatch

Node = Any  # nvidia.dali.pipeline.DataNode

# Share of the JPEG files that the hardware decoder of a GPU decodes. CUDA kernels decode the other files. On an H200,
# complete images are decoded at 38,000 images/s with a share of 0.5. With DALI's default share of 0.65, the rate is
# 36,000 images/s (batches of 512).
_HW_DECODER_LOAD = 0.5


class OutputFormat(NamedTuple):
    """Shape and type of the images that an engine returns."""

    views: int = 1  # number of crops of each record: 1 or 10
    layout: str = "NCHW"  # one of pipeline.augment.LAYOUTS
    divisor: float = 1.0  # the pixels minus the mean are divided by this number
    dtype: torch.dtype = torch.float32
    crop_px: int = CROP_PX  # side of the crops; for views="square", side of the central square
    is_resized: bool = False  # True: the crops are regions that are resized to crop_px (Crops.extent)
    has_effects: bool = False  # True: the images can have effects (Crops.effects)


def decode_crop(placement: Placement, size_px: int, is_resized: bool = False) -> Node:
    """Decode a square of `size_px` from each JPEG file to uint8 HWC.

    If `is_resized`, a region of each file is decoded, and DALI's antialiased bilinear filter resizes the region to the
    square. The function decode_inputs returns the inputs of the decoder.
    """
    fn, types = dali().fn, dali().types
    on_gpu = {} if placement.device_id is None else {"hw_decoder_load": _HW_DECODER_LOAD}
    image = fn.decoders.image_slice(  # the decoder stops after the last row of the square
        external_source("jpeg", types.UINT8, 1),
        device=placement.decoder_device,
        start=external_source("start", types.INT32, 1),
        shape=external_source("extent", types.INT32, 1) if is_resized else [size_px] * 2,
        axes=[0, 1],
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,  # a GPU then interpolates the colour channels as libjpeg-turbo does
        adjust_orientation=False,
        **on_gpu,
    )
    return fn.resize(image, size=[size_px] * 2, interp_type=types.INTERP_LINEAR) if is_resized else image


def decode_inputs(records: RecordBatch, crops: Crops, views: int = 1) -> dict[str, Any]:
    """Return the inputs of decode_crop: for ten views, the central square of each record; for one view, its crop."""
    start = crops.origin if views > 1 else crops.origin + crops.offset[:, 0]
    extent = {} if crops.extent is None else {"extent": np.ascontiguousarray(crops.extent[:, 0])}
    return {"jpeg": tensor_list(records.payloads()), "start": np.ascontiguousarray(start), **extent}


def tensor_list(arrays: Sequence[npt.NDArray[np.uint8]], layout: str = "") -> Any:
    """Return arrays of different shapes as a DALI TensorListCPU, without copies.

    DALI reads this kind of input fastest.
    """
    tensors = dali().tensors
    return tensors.TensorListCPU([tensors.TensorCPU(array, layout) for array in arrays], layout)


def external_source(name: str, dtype: Any, dimensions: int, layout: str | None = None) -> Node:
    """Return an input of the graph.

    For each batch, the prefetcher passes the values of this input to DALI under `name`.
    """
    return dali().fn.external_source(name=name, dtype=dtype, ndim=dimensions, layout=layout, no_copy=True)


class DaliEngine:
    """Computes the formula of pipeline.augment in DALI: defines the graph, makes its inputs, converts its outputs."""

    uses_dali = True

    def __init__(self, augmenter: Augmenter, placement: Placement, output: OutputFormat, stream: DeviceStream) -> None:
        self.stream = stream
        self._augmenter, self._placement, self._views = augmenter, placement, output.views
        self._layout, self._dtype, self._is_resized = output.layout[1:], output.dtype, output.is_resized
        self._divisor = output.divisor * augmenter.std_rgb  # (3,)
        self._mean_divisor = self._divisor.astype(np.float32)  # version 0.1.0 divided the mean image in float32, too
        self._crop_px, self._max_offset_px = output.crop_px, augmenter.side_px - output.crop_px
        self._fn, self._types = dali().fn, dali().types

    def define_graph(self) -> Node:
        """Return the DALI node of the images: one crop or ten views of each record."""
        return self._single_crop() if self._views == 1 else self._ten_views()

    def graph_inputs(self, records: RecordBatch, crops: Crops) -> dict[str, Any]:
        """Return the values of the graph's inputs by their names. Each input has one value for each record."""
        start = crops.origin if self._views > 1 else crops.origin + crops.offset[:, 0]
        if self._augmenter.is_raw:
            if self._views > 1:
                return {"pixels": tensor_list(self._squares(records, start), "HWC")}
            y, x = _relative(start, records.sizes - self._crop_px)
            inputs = {"pixels": tensor_list(records.payloads(), "HWC"), "y": y, "x": x}
        else:
            inputs = decode_inputs(records, crops, self._views)
        if self._views == 1:
            inputs |= {"flip": np.ascontiguousarray(crops.flip[:, 0]), "mean": np.ascontiguousarray(-crops.shift)}
            if self._augmenter.augmentation.mean == "aligned":
                offset = crops.offset[:, 0]
                inputs["mean_y"], inputs["mean_x"] = _relative(offset, np.full_like(offset, self._max_offset_px))
        return inputs

    def start(self, records: RecordBatch, crops: Crops) -> Any:
        """This method is never called, because the prefetcher runs the graph."""
        raise NotImplementedError

    def finish(self, outputs: tuple[Any, ...], records: RecordBatch, crops: Crops) -> torch.Tensor:
        """Return the images as a tensor. The memory of the images is not reused while a tensor refers to it.

        On a CPU, float32 images share the memory of DALI's output. On a GPU, the images are copied. Without the copy,
        DALI could write a later batch into this memory while the consumer's stream still reads the images. Torch, not
        DALI, converts the images to half precision: DALI has no bfloat16, and on a CPU its float16 output takes four
        times as long as its float32 output.
        """
        if self.stream.at_once:
            shared: torch.Tensor = self._placement.tensor_from_dali(outputs[0])
            return shared.to(self._dtype)
        side = [self._crop_px] * 2
        views = [self._views] if self._views > 1 else []
        shape = [len(records.numbers), *views, *([3, *side] if self._layout == "CHW" else [*side, 3])]
        images = self.stream.empty(shape, self._dtype)
        self.stream.run(lambda: images.copy_(self._placement.tensor_from_dali(outputs[0])))
        return images

    def close(self) -> None:
        """Does nothing, because the engine has no threads and no memory to release."""

    def _squares(self, records: RecordBatch, start: npt.NDArray[np.int32]) -> list[npt.NDArray[np.uint8]]:
        """Return the central squares of raw records."""
        side, parts = self._augmenter.side_px, zip(records.payloads(), start.tolist(), strict=True)
        return [np.ascontiguousarray(pixels[y : y + side, x : x + side]) for pixels, (y, x) in parts]

    def _image(self, size_px: int) -> Node:
        """Return uint8 HWC pixels: a decoded square of `size_px` (JPEG records), or the input `pixels` (raw)."""
        if self._augmenter.is_raw:
            return self._placement.to_device(external_source("pixels", self._types.UINT8, 3, "HWC"))
        return decode_crop(self._placement, size_px, self._is_resized)

    def _single_crop(self) -> Node:
        types = self._types
        flip, mean = external_source("flip", types.INT32, 0), external_source("mean", types.FLOAT, 1)
        if self._augmenter.is_raw:
            position = external_source("y", types.FLOAT, 0), external_source("x", types.FLOAT, 0)
            image = self._normalize(self._image(self._crop_px), flip, mean, position)
        else:
            image = self._normalize(self._image(self._crop_px), flip, mean)
        if self._augmenter.augmentation.mean == "aligned":
            assert self._augmenter.mean_image is not None
            position = external_source("mean_y", types.FLOAT, 0), external_source("mean_x", types.FLOAT, 0)
            mean_image = self._placement.constant(types, self._augmenter.mean_image.astype(np.float32), "HWC")
            return image - self._normalize(mean_image, flip, [0.0] * 3, position)
        return self._subtract_centre(image)

    def _ten_views(self) -> Node:
        """Return the ten views (10, …) of each record, at the same positions in every central square."""
        square, views = self._image(self._augmenter.side_px), []
        offsets, flips = eval_offsets(self._views, self._max_offset_px)
        for (y, x), flip in zip(offsets.tolist(), flips.tolist(), strict=True):
            position = y / max(self._max_offset_px, 1), x / max(self._max_offset_px, 1)
            image = self._normalize(square, flip, self._augmenter.mean_rgb.tolist(), position)
            if self._augmenter.augmentation.mean == "aligned":
                assert self._augmenter.mean_image is not None
                mean = self._augmenter.mean_image[y : y + self._crop_px, x : x + self._crop_px] / self._mean_divisor
                views.append(image - self._constant(mean[:, ::-1] if flip else mean))
            else:
                views.append(self._subtract_centre(image))
        return self._fn.stack(*views)

    def _normalize(self, image: Node, flip: Any, mean: Any, position: tuple[Any, Any] | None = None) -> Node:
        """Crop `image`, mirror it if `flip` is 1, and normalize it.

        `position` is (y, x) in 0..1, or None if nothing is cropped.
        """
        crop = {}
        if position is not None:
            crop = {"crop": [self._crop_px] * 2, "crop_pos_y": position[0], "crop_pos_x": position[1]}
        return self._fn.crop_mirror_normalize(
            image,
            mirror=flip,
            mean=mean,
            std=self._divisor.tolist(),
            dtype=self._types.FLOAT,
            output_layout=self._layout,
            **crop,
        )

    def _subtract_centre(self, image: Node) -> Node:
        """Subtract the centre crop of the mean image if Augmentation.mean is "image"; otherwise return `image`."""
        if self._augmenter.augmentation.mean != "image":
            return image
        assert self._augmenter.mean_image is not None
        centre = slice(self._max_offset_px // 2, self._max_offset_px // 2 + self._crop_px)
        return image - self._constant(self._augmenter.mean_image[centre, centre] / self._mean_divisor)

    def _constant(self, hwc: npt.NDArray[Any]) -> Node:
        """Return a float32 (H, W, C) array in the layout of the output, as a DALI constant."""
        values = hwc.transpose(2, 0, 1) if self._layout == "CHW" else hwc
        return self._placement.constant(self._types, np.ascontiguousarray(values, np.float32))


def _relative(
    offset_px: npt.NDArray[np.int32], max_offset_px: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Convert offsets (N, 2) in px to (crop_pos_y, crop_pos_x), which are fractions 0..1 of the largest offset.

    DALI multiplies each fraction by the largest offset and rounds the product, which gives exactly the offset in px.
    """
    relative = (offset_px / np.maximum(max_offset_px, 1)).astype(np.float32)
    return np.ascontiguousarray(relative[:, 0]), np.ascontiguousarray(relative[:, 1])


def build_pipeline(define_graph: Callable[[], Any], batch_size: int, placement: Placement, threads: int) -> Any:
    """Build an `nvidia.dali.Pipeline` whose outputs are the nodes that `define_graph` returns."""
    pipe = dali().Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=placement.device_id,
        exec_dynamic=True,  # every batch gets its own memory
        prefetch_queue_depth=1,  # the Prefetcher, not DALI, schedules batches ahead
    )
    with pipe:
        pipe.set_outputs(define_graph())
    pipe.build()
    return pipe
