"""A picture of a split's colours: its pixels and their principal axes, the spectrum, and what the colour noise does.

The noise of the paper's section 4.1 adds α·σ·v to a whole training image, for each component's eigenvector v and
standard deviation σ, with α ~ N(0, 0.1). "Three sigma" of it is therefore α = ±0.3: so far the photograph is moved,
which is little to see along the second component and less along the third. Hence the mean colour beneath it, moved by
±3 σ, ten times as far.
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

RECORDS, PIXELS = 48, 4800  # read and drawn, at the most
ALPHA = 0.1  # standard deviation of α (section 4.1)
STEPS = (-3, -2, -1, 0, 1, 2, 3)  # standard deviations of α
REACH = 2  # of the axes through the cloud: standard deviations of the pixels
PHOTOGRAPH_PX = 256  # twice as large and more is reduced
ILSVRC = tuple(255 * value**0.5 for value in (0.2175, 0.0188, 0.0045))  # grey levels; eigenvalues of fb.resnet.torch

Pixels = npt.NDArray[np.uint8]  # (..., 3) RGB


def plot_colour(store: Store, split: str, stats: ColorStats, out: Path) -> None:
    """Draw `stats` and a sample of the split that they are of to a .png or .svg file: the same bytes each time.

    Reads at most RECORDS records. Raises UserError where matplotlib is missing, the extension is unknown or the file
    cannot be written (what was there before stays), and StoreError naming shard and key of a record that is damaged.
    """
    format = figure_format(out, "--plot")
    content = render_figure(
        lambda figure: draw(figure, split, stats, *take_sample(store, split, stats)), (14, 7), format, font_size_pt=10.5
    )
    try:
        write_atomic(out, content)
    except OSError as error:
        raise UserError(f"--plot {out}: {error.strerror}. Name a file in a folder that you may write to.") from None


def take_sample(store: Store, split: str, stats: ColorStats, seed: int = 0) -> tuple[Pixels, Pixels]:
    """Pixels, uint8 (N, 3) with N ≤ PIXELS, as many from each of at most RECORDS records; and a photograph (S, S, 3).

    The photograph is the central square of the record that is most like the split at half its contrast: there slight
    shifts show and little is clipped. It is reduced by an integer where S would be 2·PHOTOGRAPH_PX or more. Raises
    StoreError as plot_colour does.
    """
    rng, share = np.random.default_rng(seed), PIXELS // min(RECORDS, store.split(split).records)
    pixels, best, least = [], np.empty(0, np.uint8), np.inf
    for picture in _pictures(store, split):
        flat = picture.reshape(-1, 3)
        pixels.append(flat[rng.choice(len(flat), min(share, len(flat)), replace=False)])
        unlike = _divergence(pixels[-1], stats)
        if unlike < least:
            best, least = _photograph(picture), unlike
    return np.concatenate(pixels), best


def _pictures(store: Store, split: str) -> Iterator[Pixels]:
    """uint8 (H, W, 3): at most RECORDS pictures, spread evenly over the shards, from the beginning of each.

    The first records of a shard are as good a sample as any, for their order is that of a hash.
    """
    both = zip(store.shard_paths(split), store.split(split).shards, strict=True)
    shards = [(path, entry) for path, entry in both if entry.records]
    wanted = Counter(k * len(shards) // RECORDS for k in range(RECORDS))
    for k, (path, entry) in enumerate(shards):
        count = min(wanted[k], entry.records)
        records = list(islice(lmdb_shard.read(Path(path)), count))
        if len(records) < count:
            raise StoreError(f"{path}: {len(records)} records, expected {entry.records}. Build the store again.")
        for key, value in records:
            try:
                yield decode_image(Datum.decode(value).data).pixels
            except (DatumError, BadImage) as error:
                key_text = key.decode(errors="replace")
                raise StoreError(f"{path}, key {key_text}: {error}. Build the store again.") from None


def _divergence(pixels: Pixels, stats: ColorStats) -> float:
    """Kullback–Leibler divergence (doubled, plus a constant) of the pixels, taken for normal, from the split at half
    its contrast. One grey level squared on each diagonal keeps it finite for grey pictures.
    """
    inverse = np.linalg.inv(np.array(stats.covariance) / 4 + np.eye(3))
    covariance, off = np.cov(pixels, rowvar=False) + np.eye(3), pixels.mean(axis=0) - stats.mean_rgb
    return float(np.trace(inverse @ covariance) + off @ inverse @ off - np.linalg.slogdet(covariance)[1])


def _photograph(picture: Pixels) -> Pixels:
    side = min(picture.shape[:2])
    square = Image.fromarray(central_square(picture, side))
    return np.asarray(square.reduce(max(1, side // PHOTOGRAPH_PX)))


def moved(colours: npt.ArrayLike, stats: ColorStats, component: int, stdevs: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """RGB colours (..., 3) moved by so many standard deviations along component 0, 1 or 2: grey levels, not clipped.

    `stdevs` is a number, or (n, 1) to give (n, 3).
    """
    sigma: npt.NDArray[np.float64] = stats.stdevs[component] * np.array(stats.eigenvectors)[:, component]
    return np.asarray(colours) + np.asarray(stdevs) * sigma


def draw(figure: Any, split: str, stats: ColorStats, pixels: Pixels, photograph: Pixels) -> None:
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

    _entitle(panel, f"{len(pixels):,} pixels; axes to ±{REACH} standard deviations")
    axes = panel.add_subplot(projection="3d", computed_zorder=False, proj_type="ortho")
    axes.scatter(*pixels.T, c=pixels / 255, s=5, linewidths=0, depthshade=False, rasterized=True)
    for component in range(3):
        ends = moved(stats.mean_rgb, stats, component, [[-REACH], [REACH]])
        axes.plot(*ends.T, color="black", lw=1.8, path_effects=[withStroke(linewidth=4, foreground="white")])
        place = ends[1] + 10 * np.array(stats.eigenvectors)[:, component]
        halo = [withStroke(linewidth=3, foreground="white")]
        axes.text(*place, f"PC {component + 1}", weight="bold", path_effects=halo)
    limits, ticks = (0, 255), (0, 100, 200)
    axes.set(xlim=limits, ylim=limits, zlim=limits, xticks=ticks, yticks=ticks, zticks=ticks)
    axes.set(xlabel="red", ylabel="green", zlabel="blue")
    axes.view_init(20, 30, vertical_axis="y")  # from here no axis of natural pictures hides another
    axes.set_box_aspect(None, zoom=0.98)


def _draw_spectrum(panel: Any, stats: ColorStats) -> None:
    _entitle(panel, "Standard deviation σ, grey levels, and share of the variance")
    axes, places, total = panel.subplots(), np.arange(3), sum(stats.eigenvalues) or 1.0
    axes.bar(places, stats.stdevs, width=0.4, color="0.75")
    for place, stdev, variance in zip(places, stats.stdevs, stats.eigenvalues, strict=True):
        axes.text(place + 0.28, stdev, f"{stdev:.1f}\n{100 * variance / total:.1f} %", va="center")
    known = ", ".join(f"{stdev:.1f}" for stdev in ILSVRC)
    axes.hlines(ILSVRC, places - 0.24, places + 0.24, color="black", lw=1.2, label=f"ILSVRC: {known} (fb.resnet.torch)")
    axes.set_xticks(places, [f"PC {k + 1}" for k in places])
    axes.set_xlim(-0.45, 2.75)
    axes.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="outside lower left")


def _draw_photographs(panel: Any, stats: ColorStats, photograph: Pixels) -> None:
    limit = f"α ~ N(0, {ALPHA}), so ±{3 * ALPHA:.1f} is three standard deviations of α"
    _entitle(panel, f"The colour noise: a photograph moved by α·σ; {limit}")
    gap = -(-len(photograph) // 32)
    cells = [[_bytes(moved(photograph, stats, component, k * ALPHA), gap) for k in STEPS] for component in range(3)]
    axes, places = panel.subplots(), np.arange(len(STEPS)) + 0.5
    axes.imshow(np.concatenate([np.concatenate(row, axis=1) for row in cells]), extent=(0, len(STEPS), 3, 0))
    axes.set_xticks(places, [_signed("α = {:+.1f}", k * ALPHA, "as stored") for k in STEPS])
    axes.set_yticks(places[:3], [f"PC {k + 1}\n{ALPHA}·σ = {ALPHA * stats.stdevs[k]:.1f}" for k in range(3)])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def _draw_mean(panel: Any, stats: ColorStats) -> None:
    _entitle(panel, "The mean colour moved by whole standard deviations σ")
    axes, steps = panel.subplots(), np.linspace(-3, 3, 241)[:, None]
    strips = np.stack([_bytes(moved(stats.mean_rgb, stats, component, steps)) for component in range(3)])
    axes.imshow(strips, aspect="auto", extent=(-3, 3, 3, 0), interpolation="nearest")
    axes.hlines((1, 2), -3, 3, color="white", lw=6)
    axes.set_xticks(STEPS, [_signed("{:+d} σ", k, "mean") for k in STEPS])
    axes.set_yticks((0.5, 1.5, 2.5), [f"PC {k + 1}" for k in range(3)])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def _entitle(panel: Any, title: str) -> None:
    panel.suptitle(title, x=0.01, ha="left", fontsize=10.5)


def _signed(form: str, value: float, zero: str) -> str:
    return form.format(value).replace("-", "−") if value else zero


def _bytes(colours: npt.NDArray[np.float64], margin: int = 0) -> Pixels:
    """Colours as they are shown, with a white margin below and to the right."""
    shown = np.clip(np.rint(colours), 0, 255).astype(np.uint8)
    return np.pad(shown, ((0, margin), (0, margin), (0, 0)), constant_values=255) if margin else shown
