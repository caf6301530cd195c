"""conv1 as a convolution over blocks of 4 × 4 pixels.

On a GPU, conv1 over blocks is several times as fast as conv1 over pixels. conv1 has windows of 11 × 11 px at a stride
of 4 px, and three channels. Padded with zeros to 12 × 12 px, a window covers 3 × 3 blocks of 4 × 4 px. An image of
blocks has 3 · 4 · 4 = 48 channels, as in torch.nn.functional.pixel_unshuffle. The index of a channel is 16 · (colour
channel) + 4 · (row within the block) + (column within the block). Over blocks, conv1 is a 3 × 3 convolution of stride
1. The weights stay a parameter of shape (maps, 3, 11, 11). `block_weights` rearranges the weights in each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_PX = 4  # side of a block, which is also conv1's stride
_WINDOW_PX = 11  # side of conv1's windows
_POSITIONS = 64  # number of blocks that a program of the Triton kernel writes


def block_weights(weight: Tensor) -> Tensor:
    """Return conv1's weights (maps, 3, 11, 11) as weights (maps, 48, 3, 3) of a convolution over blocks."""
    maps = len(weight)
    padded = F.pad(weight, (0, 1, 0, 1)).reshape(maps, 3, 3, _BLOCK_PX, 3, _BLOCK_PX)
    blocks = padded.permute(0, 1, 3, 5, 2, 4).reshape(maps, 3 * _BLOCK_PX**2, 3, 3)
    return blocks.contiguous(memory_format=torch.channels_last)


def image_blocks(images: Tensor, padding: Sequence[int], divisor: float, dtype: torch.dtype) -> Tensor:
    """Convert images (N, 3, H, W) to blocks (N, 48, rows, columns) of `dtype`, channels last, with a Triton kernel.

    padding  zero padding in px: (left, right, top, bottom)
    divisor  number by which every pixel is divided

    With r × c windows of conv1 in a padded image, `rows` is r + 2 and `columns` is c + 2. The result has no gradient.
    """
    from train.model.gpu.conv1_blocks_triton import write_blocks

    left, right, top, bottom = padding
    rows, columns = (
        (side - _WINDOW_PX) // _BLOCK_PX + 3
        for side in (images.shape[2] + top + bottom, images.shape[3] + left + right)
    )
    blocks = torch.empty(
        (len(images), 3 * _BLOCK_PX**2, rows, columns),
        dtype=dtype,
        device=images.device,
        memory_format=torch.channels_last,
    )
    positions = blocks.shape[0] * rows * columns
    with torch.cuda.device_of(images):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        write_blocks[(-(-positions // _POSITIONS),)](
            *(images, blocks, positions, rows, columns, *images.shape[2:], left, top, divisor, *images.stride()),
            POSITIONS=_POSITIONS,
        )
    return blocks
