"""Plots the colours of a split: pixels and principal axes in RGB space, the spectrum, and the colour noise.

The colour noise of the paper (section 4.1) adds α·σ·v to every pixel of a training image, for each principal component.
v is the eigenvector of the component, and σ is the standard deviation of the component. α is drawn from a normal
distribution with standard deviation 0.1, so three standard deviations of α are 0.3. A shift by 0.3 σ along the second
or third component is hard to see in a photograph, so the plot also shows the mean colour with shifts of up to 3 σ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from prep.console import UserError, count_noun
from prep.files import write_atomic
from prep.images.central_square import central_square
from prep.images.codec import BadImage, decode_image
from prep.plot_style import figure_format, render_figure
from prep.store import lmdb_shard
from prep.store.datum import Datum, DatumError
from prep.store.manifest import ColorStats, Store, StoreError

MAX_RECORDS, MAX_PIXELS = 48, 4800  # largest number of records to read, and largest number of pixels to draw
ALPHA_STDEV = 0.1  # standard deviation of α (section 4.1)
STEPS = (-3, -2, -1, 0, 1, 2, 3)  # shifts of the photograph (in standard deviations of α) and of the mean colour (in σ)
AXIS_STDEVS = 2  # half length of a drawn principal axis, in standard deviations of the pixels along the axis
PHOTOGRAPH_PX = 256  # a photograph is reduced if its side is at least twice this length
ILSVRC = tuple(255 * value**0.5 for value in (0.2175, 0.0188, 0.0045))  # σ in grey levels, from fb.resnet.torch

Pixels = npt.NDArray[np.uint8]  # (..., 3) RGB


def plot_colors(store: Store, split: str, stats: ColorStats, out: Path) -> None:
    """Draw `stats` and a sample of the split's pixels into a .png or .svg file.

    The same data always give the same file, byte for byte. Reads at most MAX_RECORDS records. Raises UserError if
    matplotlib is missing, if the extension is unknown or if the file cannot be written; a file that existed before is
    then kept. Raises StoreError if a record is damaged; the error names the shard and the key of the record.
    """
    format = figure_format(out, "--plot")

    def draw(figure: Any) -> None:
        draw_figure(figure, split, stats, *take_sample(store, split, stats))

    content = render_figure(draw, (14, 7), format, font_size_pt=10.5)
    try:
        write_atomic(out, content)
    except OSError as error:
        raise UserError(f"--plot {out}: {error.strerror}. Name a file in a folder with write permission.") from None


def take_sample(store: Store, split: str, stats: ColorStats, seed: int = 0) -> tuple[Pixels, Pixels]:
    """Return a random sample of a split: pixels and one photograph.

    pixels       uint8 (N, 3), N ≤ MAX_PIXELS, an equal share from each of at most MAX_RECORDS records
    photograph   uint8 (S, S, 3), the central square of one of these records, reduced by an integer factor so that S
                 is less than 2·PHOTOGRAPH_PX. The record is the one whose colours come closest to the mean of the split
                 and to half the standard deviations of the split. In an image with so little contrast, small colour
                 shifts are visible, and few shifted values are clipped.

    Raises StoreError if a record is damaged; the error names the shard and the key of the record.
    """
    rng, share = np.random.default_rng(seed), MAX_PIXELS // min(MAX_RECORDS, store.split(split).records)
    pixels, photograph, smallest = [], np.empty(0, np.uint8), np.inf
    for image in _sample_images(store, split):
        flat = image.reshape(-1, 3)
        pixels.append(flat[rng.choice(len(flat), min(share, len(flat)), replace=False)])
        divergence = _divergence(pixels[-1], stats)
        if divergence < smallest:
            photograph, smallest = _reduced_square(image), divergence
    return np.concatenate(pixels), photograph


def _sample_images(store: Store, split: str) -> Iterator[Pixels]:
    """Yield at most MAX_RECORDS images, uint8 (H, W, 3).

    The images are those of the first records of some shards. Records are sorted by a hash of their paths, so the first
    records of a shard are a random sample of the split.
    """
    both = zip(store.shard_paths(split), store.split(split).shards, strict=True)
    shards = [(path, shard) for path, shard in both if shard.records]
    wanted = Counter(k * len(shards) // MAX_RECORDS for k in range(MAX_RECORDS))
    for k, (path, shard) in enumerate(shards):
        count = min(wanted[k], shard.records)
        records = list(islice(lmdb_shard.read(Path(path)), count))
        if len(records) < count:
            raise StoreError(f"{path}: {len(records)} records, expected {shard.records}. Build the store again.")
        for key, value in records:
            try:
                yield decode_image(Datum.decode(value).data).pixels
            except (DatumError, BadImage) as error:
                key_text = key.decode(errors="replace")
                raise StoreError(f"{path}, key {key_text}: {error}. Build the store again.") from None


def _divergence(pixels: Pixels, stats: ColorStats) -> float:
    """Return how far the colours of `pixels` are from the split's mean and from half the split's standard deviations.

    The distance is twice the Kullback–Leibler divergence of two normal distributions, plus a constant. 1 (in
    grey levels²) is added to each diagonal entry of both covariances, so that the distance is finite for images without
    colour.
    """
    inverse = np.linalg.inv(np.array(stats.covariance) / 4 + np.eye(3))
    covariance, offset = np.cov(pixels, rowvar=False) + np.eye(3), pixels.mean(axis=0) - stats.mean_rgb
    return float(np.trace(inverse @ covariance) + offset @ inverse @ offset - np.linalg.slogdet(covariance)[1])


def _reduced_square(image: Pixels) -> Pixels:
    side = min(image.shape[:2])
    square = Image.fromarray(central_square(image, side))
    return np.asarray(square.reduce(max(1, side // PHOTOGRAPH_PX)))


def shift_colors(
    colors: npt.ArrayLike, stats: ColorStats, component: int, stdevs: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Shift RGB colours (..., 3) by `stdevs` standard deviations along component 0, 1 or 2.

    The shifted colours are not clipped. `stdevs` is a number or an array. For one colour and an array of shape (n, 1),
    the result has shape (n, 3): one shifted colour for each number in the array.
    """
    sigma: npt.NDArray[np.float64] = stats.stdevs[component] * np.array(stats.eigenvectors)[:, component]
    return np.asarray(colors) + np.asarray(stdevs) * sigma


def draw_figure(figure: Any, split: str, stats: ColorStats, pixels: Pixels, photograph: Pixels) -> None:
    """Draw all four panels into an empty matplotlib Figure of 14 × 7 inches."""
    figure.suptitle(
        f"The colours of {count_noun(stats.records, 'photograph')} ({split})", x=0.004, ha="left", fontsize=14
    )
    left, right = figure.subfigures(1, 2, width_ratios=(4.6, 9.4), wspace=0.02)
    cloud, spectrum = left.subfigures(2, 1, height_ratios=(4.4, 2.4))
    photographs, mean = right.subfigures(2, 1, height_ratios=(4.4, 2.4))
    _draw_cloud(cloud, stats, pixels)
    _draw_spectrum(spectrum, stats)
    _draw_photographs(photographs, stats, photograph)
    _draw_mean(mean, stats)


def _draw_cloud(panel: Any, stats: ColorStats, pixels: Pixels) -> None:
    from matplotlib.patheffects import withStroke

    _set_title(panel, f"{len(pixels):,} pixels; axes to ±{AXIS_STDEVS} standard deviations")
    axes = panel.add_subplot(projection="3d", computed_zorder=False, proj_type="ortho")
    axes.scatter(*pixels.T, c=pixels / 255, s=5, linewidths=0, depthshade=False, rasterized=True)
    for component in range(3):
        ends = shift_colors(stats.mean_rgb, stats, component, [[-AXIS_STDEVS], [AXIS_STDEVS]])
        axes.plot(*ends.T, color="black", lw=1.8, path_effects=[withStroke(linewidth=4, foreground="white")])
        label_position = ends[1] + 10 * np.array(stats.eigenvectors)[:, component]
        halo = [withStroke(linewidth=3, foreground="white")]
        axes.text(*label_position, f"PC {component + 1}", weight="bold", path_effects=halo)
    limits, ticks = (0, 255), (0, 100, 200)
    axes.set(xlim=limits, ylim=limits, zlim=limits, xticks=ticks, yticks=ticks, zticks=ticks)
    axes.set(xlabel="red", ylabel="green", zlabel="blue")
    # From this angle, no principal axis of typical photographs hides another.
    axes.view_init(20, 30, vertical_axis="y")
    axes.set_box_aspect(None, zoom=0.98)


def _draw_spectrum(panel: Any, stats: ColorStats) -> None:
    _set_title(panel, "Standard deviation σ, grey levels, and share of the variance")
    axes, positions, total = panel.subplots(), np.arange(3), sum(stats.eigenvalues) or 1.0
    axes.bar(positions, stats.stdevs, width=0.4, color="0.75")
    for position, stdev, variance in zip(positions, stats.stdevs, stats.eigenvalues, strict=True):
        axes.text(position + 0.28, stdev, f"{stdev:.1f}\n{100 * variance / total:.1f} %", va="center")
    values = ", ".join(f"{stdev:.1f}" for stdev in ILSVRC)
    label = f"ILSVRC: {values} (fb.resnet.torch)"
    axes.hlines(ILSVRC, positions - 0.24, positions + 0.24, color="black", lw=1.2, label=label)
    axes.set_xticks(positions, [f"PC {k + 1}" for k in positions])
    axes.set_xlim(-0.45, 2.75)
    axes.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="outside lower left")


def _draw_photographs(panel: Any, stats: ColorStats, photograph: Pixels) -> None:
    limit = f"α ~ N(0, {ALPHA_STDEV}), so ±{3 * ALPHA_STDEV:.1f} is three standard deviations of α"
    _set_title(panel, f"The colour noise: a photograph moved by α·σ; {limit}")
    gap = -(-len(photograph) // 32)
    cells = [
        [_displayed(shift_colors(photograph, stats, component, k * ALPHA_STDEV), gap) for k in STEPS]
        for component in range(3)
    ]
    axes, positions = panel.subplots(), np.arange(len(STEPS)) + 0.5
    axes.imshow(np.concatenate([np.concatenate(row, axis=1) for row in cells]), extent=(0, len(STEPS), 3, 0))
    axes.set_xticks(positions, [_signed("α = {:+.1f}", k * ALPHA_STDEV, "as stored") for k in STEPS])
    sigmas = [f"{ALPHA_STDEV}·σ = {ALPHA_STDEV * stdev:.1f}" for stdev in stats.stdevs]
    axes.set_yticks(positions[:3], [f"PC {k + 1}\n{sigma}" for k, sigma in enumerate(sigmas)])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def _draw_mean(panel: Any, stats: ColorStats) -> None:
    _set_title(panel, "The mean colour moved by whole standard deviations σ")
    axes, stdevs = panel.subplots(), np.linspace(-3, 3, 241)[:, None]
    strips = np.stack([_displayed(shift_colors(stats.mean_rgb, stats, component, stdevs)) for component in range(3)])
    axes.imshow(strips, aspect="auto", extent=(-3, 3, 3, 0), interpolation="nearest")
    axes.hlines((1, 2), -3, 3, color="white", lw=6)
    axes.set_xticks(STEPS, [_signed("{:+d} σ", k, "mean") for k in STEPS])
    axes.set_yticks((0.5, 1.5, 2.5), [f"PC {k + 1}" for k in range(3)])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def _set_title(panel: Any, title: str) -> None:
    panel.suptitle(title, x=0.01, ha="left", fontsize=10.5)


def _signed(template: str, value: float, zero: str) -> str:
    """Format `value` by `template` with a typographic minus sign. Returns `zero` if `value` is 0."""
    return template.format(value).replace("-", "−") if value else zero


def _displayed(colors: npt.NDArray[np.float64], margin_px: int = 0) -> Pixels:
    """Return the colours rounded and clipped to uint8, with a white margin below and to the right."""
    pixels = np.clip(np.rint(colors), 0, 255).astype(np.uint8)
    return np.pad(pixels, ((0, margin_px), (0, margin_px), (0, 0)), constant_values=255) if margin_px else pixels
