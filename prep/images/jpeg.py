"""JPEG decoding and encoding with libjpeg-turbo (simplejpeg). No other module sets options of the decoder or encoder.

Decoding uses the accurate ("slow") integer DCT and smooth ("fancy") upsampling of the colour channels, as Pillow does
and as DALI does on a CPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB


def decode_jpeg(content: bytes) -> Pixels:
    """Decode a JPEG to RGB pixels, uint8 (H, W, 3). Decoding releases the GIL.

    Raises ValueError for a file that libjpeg cannot decode or warns about. EXIF orientation is not applied.
    """
    pixels: Pixels = simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False, strict=True)
    return pixels


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Encode RGB pixels, uint8 (H, W, 3), as a baseline 4:2:0 JPEG of libjpeg quality `quality`, 1 to 100."""
    return bytes(simplejpeg.encode_jpeg(pixels, quality, "RGB", "420", fastdct=False))
