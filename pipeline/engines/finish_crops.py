"""Crops, flips and normalizes uint8 squares on the device, and writes images in the layout and type of the loader.

A Triton kernel computes all steps in one pass over the pixels. If the kernel cannot be used, PyTorch operators compute
the same values in several passes.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import Augmenter, Crops
from pipeline.effects.batch import apply_effects, effect_steps, erase_boxes
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.device_stream import DeviceStream
from prep.console import say

_ELEMENTS = 1024  # number of elements that a program of the Triton kernel writes


class CropFinisher:
    """Computes the formula of pipeline.augment for V crops of each square."""

    def __init__(self, augmenter: Augmenter, output: OutputFormat, square_px: int, stream: DeviceStream) -> None:
        """Compile the Triton kernel and test it against PyTorch operators. `square_px` is the side of the squares."""
        self._square_px, self._side_px, self._views = square_px, output.crop_px, output.views
        self._layout, self._dtype = output.layout, output.dtype
        # (3,): factors of R, G and B, the same as those of kernels.c
        self._scale = stream.upload(torch.from_numpy((1 / (output.divisor * augmenter.std_rgb)).astype(np.float32)))
        self._max_offset_px = augmenter.side_px - output.crop_px
        self._is_aligned = augmenter.augmentation.mean == "aligned"
        self._mean = torch.empty(0, device=stream.device)  # the mean image (side, side, 3), or an empty tensor
        if augmenter.mean_image is not None:
            self._mean = stream.upload(torch.from_numpy(augmenter.mean_image.astype(np.float32)))
        stream.record().wait()
        self._use_triton = self._triton_works(stream)

    def shape(self, records: int) -> tuple[int, ...]:
        """Return the shape of the images of a batch: (N · V, 3, side, side) or (N · V, side, side, 3)."""
        side, images = self._side_px, records * self._views
        return (images, 3, side, side) if self._layout == "NCHW" else (images, side, side, 3)

    def parameters(self, crops: Crops) -> tuple[Tensor, Tensor]:
        """Return the parameters of each crop, int32 (N · V, 6), and the shift of each record, float32 (N, 3).

        The six parameters are row, column and flip of the crop, and row, column and flip of its part of the mean image.
        Row and column are the position of the upper left pixel before mirroring.
        """
        windows = np.zeros((*crops.flip.shape, 6), np.int32)
        if self._square_px > self._side_px:
            windows[:, :, 0:2] = crops.offset
        windows[:, :, 2] = crops.flip
        windows[:, :, 3:5] = crops.offset if self._is_aligned else self._max_offset_px // 2
        windows[:, :, 5] = crops.flip if self._is_aligned else 0
        return torch.from_numpy(windows.reshape(-1, 6)), torch.from_numpy(np.ascontiguousarray(crops.shift))

    def make_images(self, squares: Tensor, crops: Crops, stream: DeviceStream) -> Tensor:
        """Queue the computation of the images from `squares`, and return the images. Effects overwrite `squares`.

        Jitter, grey and blur come first (pipeline.effects.batch), then `finish`, then erase.
        """
        if crops.effects is not None:
            steps = effect_steps(crops.effects, stream.upload)
            stream.run(lambda: apply_effects(squares, steps))
        windows, shift = (stream.upload(values) for values in self.parameters(crops))
        images = stream.empty(self.shape(len(squares)), self._dtype)
        stream.run(lambda: self.finish(squares, windows, shift, images))
        if crops.effects is not None and crops.effects.box.any():
            box = stream.upload(torch.from_numpy(crops.effects.box))
            stream.run(lambda: erase_boxes(images, box, self._layout))
        return images

    def finish(self, squares: Tensor, windows: Tensor, shift: Tensor, out: Tensor) -> None:
        """Write the images of a batch. All tensors are contiguous.

        squares  uint8 (N, square_px, square_px, 3)
        windows  int32 (N · V, 6), from `parameters`
        shift    float32 (N, 3), from `parameters`
        out      the images, of the shape that `shape` returns
        """
        (self._with_triton if self._use_triton else self._with_operators)(squares, windows, shift, out)

    def _with_triton(self, squares: Tensor, windows: Tensor, shift: Tensor, out: Tensor) -> None:
        from pipeline.engines.finish_crops_triton import finish_elements

        elements = 3 * self._side_px**2
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            finish_elements[(len(windows), -(-elements // _ELEMENTS))](
                *(squares, windows, shift, self._mean, out, self._scale),
                SQUARE=self._square_px,
                SIDE=self._side_px,
                VIEWS=self._views,
                MEAN_SIDE=len(self._mean),
                CHANNELS_LAST=self._layout == "NHWC",
                ELEMENTS=_ELEMENTS,
            )

    def _with_operators(self, squares: Tensor, windows: Tensor, shift: Tensor, out: Tensor) -> None:
        steps = torch.arange(self._side_px, device=out.device)
        record = torch.arange(len(windows), device=out.device) // self._views
        rows, columns = _positions(windows[:, :3], steps)
        images = squares[record[:, None, None], rows, columns].to(torch.float32)  # (N · V, side, side, 3)
        images += shift[record][:, None, None]
        if len(self._mean):
            images -= self._mean[_positions(windows[:, 3:], steps)]
        images *= self._scale
        out.copy_(images.permute(0, 3, 1, 2) if self._layout == "NCHW" else images)

    def _triton_works(self, stream: DeviceStream) -> bool:
        """Return whether the Triton kernel gives the same bits as PyTorch operators for a batch of one record.

        This first launch also compiles the kernel for all later launches. A later compilation could disturb a CUDA
        graph that the training program is recording.
        """
        if not _can_try_triton(stream.device):
            return False
        try:
            random = np.random.default_rng(0)
            views, far = (1, self._views), self._max_offset_px + 1
            crops = Crops(
                np.zeros((1, 2), np.int32),
                random.integers(0, far, (*views, 2), dtype=np.int32),
                np.ones(views, np.int32),
                random.normal(0, 9, (1, 3)).astype(np.float32),
            )
            size = (1, self._square_px, self._square_px, 3)
            squares = stream.upload(torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8)))
            windows, shift = (stream.upload(values) for values in self.parameters(crops))
            actual, expected = (stream.empty(self.shape(1), self._dtype) for _ in range(2))
            stream.run(lambda: self._with_triton(squares, windows, shift, actual))
            stream.run(lambda: self._with_operators(squares, windows, shift, expected))
            done = stream.record()
            done.order(actual, expected)
            fault = None if torch.equal(actual, expected) else "a Triton kernel gives wrong results"
        except torch.OutOfMemoryError:
            raise
        # Any exception is caught, because failures of the compiler, the driver and the disk raise different types.
        except Exception as error:
            fault = f"a Triton kernel fails: {type(error).__name__}: {error}".splitlines()[0][:300]
        if fault is not None:
            say(f"{stream.device}: {fault}. The stream uses PyTorch operators instead, which take longer.")
        return fault is None


def _can_try_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _positions(windows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (M, side, 1) and columns (M, 1, side) of the pixels of M crops.

    `windows` (M, 3) has row, column and flip of each crop.
    """
    side = len(steps)
    rows = windows[:, :1] + steps
    columns = windows[:, 1:2] + torch.where(windows[:, 2:] != 0, side - 1 - steps, steps)
    return rows[:, :, None], columns[:, None]
