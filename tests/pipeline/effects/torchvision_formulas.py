"""torchvision's formulas of the effects, restated in NumPy for one uint8 image (side, side, 3).

The source is torchvision/transforms/_functional_tensor.py and transforms.py. The arithmetic is float32, as in
torchvision, apart from the blur, which is computed in float64.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
F = np.float32


def rgb_to_grayscale(image: Pixels) -> Pixels:
    red, green, blue = image.astype(F).transpose(2, 0, 1)
    grey = F(0.2989) * red + F(0.587) * green + F(0.114) * blue
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _blend(image: Pixels, other: npt.NDArray[np.generic] | np.float32, ratio: float) -> Pixels:
    return np.clip(F(ratio) * image + F(1 - ratio) * np.asarray(other, F), 0, 255).astype(np.uint8)


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    return _blend(image, np.zeros_like(image), factor)


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    return _blend(image, F(rgb_to_grayscale(image)[:, :, 0].mean(dtype=np.float64)), factor)


def adjust_saturation(image: Pixels, factor: float) -> Pixels:
    return _blend(image, rgb_to_grayscale(image), factor)


def adjust_hue(image: Pixels, factor: float) -> Pixels:
    """Apply _rgb2hsv, then h = (h + factor) mod 1, then _hsv2rgb."""
    pixels = image.astype(F) / F(255)
    red, green, blue = pixels.transpose(2, 0, 1)
    most, least = pixels.max(2), pixels.min(2)
    equal, chroma = most == least, most - least
    saturation = chroma / np.where(equal, F(1), most)
    divisor = np.where(equal, F(1), chroma)
    rc, gc, bc = (most - red) / divisor, (most - green) / divisor, (most - blue) / divisor
    hue = (most == red) * (bc - gc)
    hue += ((most == green) & (most != red)) * (F(2) + rc - bc)
    hue += ((most != green) & (most != red)) * (F(4) + gc - rc)
    hue = np.fmod(hue / F(6) + F(1), F(1))
    hue = (hue + F(factor)) % F(1)
    sextant = np.floor(hue * F(6))
    f = hue * F(6) - sextant
    p = np.clip(most * (1 - saturation), 0, 1)
    q = np.clip(most * (1 - saturation * f), 0, 1)
    t = np.clip(most * (1 - saturation * (1 - f)), 0, 1)
    index = sextant.astype(np.int64) % 6
    rgb = [
        np.choose(index, values)
        for values in ((most, q, p, p, t, most), (t, most, most, q, p, p), (p, p, t, most, most, q))
    ]
    return (np.stack(rgb, axis=2) * F(256 - 1e-3)).astype(np.uint8)


def gaussian_kernel(size: int, sigma: float) -> npt.NDArray[np.float64]:
    x = np.linspace(-(size - 1) / 2, (size - 1) / 2, size)
    density = np.exp(-0.5 * (x / sigma) ** 2)
    return density / density.sum()


def gaussian_blur(image: Pixels, size: int, sigma: float) -> Pixels:
    kernel, radius = gaussian_kernel(size, sigma), size // 2
    padded = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    rows = np.apply_along_axis(np.convolve, 1, padded, kernel, "valid")
    return np.rint(np.apply_along_axis(np.convolve, 0, rows, kernel, "valid")).astype(np.uint8)


def erasing_box(
    rng: np.random.Generator, side: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return row, column, height and width, as RandomErasing.get_params does. Height and width are 0 if no box fits."""
    for _ in range(10):
        area = side * side * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < side and width < side:
            return int(rng.integers(0, side - height + 1)), int(rng.integers(0, side - width + 1)), height, width
    return 0, 0, 0, 0
