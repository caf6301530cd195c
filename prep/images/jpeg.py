"""JPEG decoding and encoding with libjpeg-turbo (simplejpeg). No other module sets options of the decoder or encoder.

Decoding uses the accurate ("slow") integer DCT, and smooth ("fancy") upsampling of the colour channels. Pillow uses the
same DCT and upsampling, and so does DALI on a CPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import simplejpeg

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB


def decode_jpeg(content: bytes, reduced_to: tuple[int, int] | None = None) -> Pixels:
    """Decode a JPEG to RGB pixels, uint8 (H, W, 3). Decoding runs without Python's global interpreter lock (GIL).

    `reduced_to` is the (height, width) of the image divided by 2, 4 or 8 and rounded up. With `reduced_to`, libjpeg
    makes the smaller image directly from the coefficients, so that the whole image is never in memory.

    Raises ValueError for a file that libjpeg cannot decode or warns about. EXIF orientation is not applied.
    """
    min_height, min_width = reduced_to or (0, 0)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            content, "RGB", fastdct=False, fastupsample=False, min_height=min_height, min_width=min_width, strict=True
        )
    except ValueError:
        raise
    except Exception as error:  # simplejpeg raises KeyError for an unusual header
        raise ValueError(f"cannot be decoded: {error!r}") from None
    return pixels


def find_warning(content: bytes, color_space: str) -> str:
    """Return libjpeg-turbo's first warning about a JPEG that Pillow can decode; empty if there is no warning.

    For a file with an unusual sampling of the colour channels, the returned text says that the file cannot be checked.
    `color_space` is simplejpeg's name of a colour space to which libjpeg can convert the image: "GRAY", "RGB" or
    "CMYK".
    """
    fast = {"fastdct": True, "fastupsample": True}
    try:
        simplejpeg.decode_jpeg(content, color_space, strict=True, **fast)
    except Exception as warning:
        try:
            simplejpeg.decode_jpeg(content, color_space, strict=False, **fast)
        except Exception as error:
            return f"cannot be checked for damage: {error}"
        return str(warning)
    return ""


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Encode RGB pixels, uint8 (H, W, 3), as a baseline 4:2:0 JPEG of libjpeg quality `quality`, 1 to 100."""
    return bytes(simplejpeg.encode_jpeg(pixels, quality, "RGB", "420", fastdct=False))
