"""prep.check.color_plot: sample, drawing and file are compared with Pillow, the paper's formula and the stream.

To check a drawing, the tests read the lines, bars and images from matplotlib's objects of the figure.
"""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lmdb
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.augment import noise_matrix
from prep.check.color_plot import draw_figure, plot_colors, take_sample
from prep.console import UserError
from prep.images.codec import encode_image
from prep.images.color_stats import Moments, compute_color_stats
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import ColorStats, Settings, Shard, Split, Store, StoreError

Pictures = list[npt.NDArray[np.uint8]]
ALPHAS = (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., tuple[Store, ColorStats]]:
    """make_store(shards) returns a ppm store. `shards` lists the images (uint8, H×W×3) of each shard of train."""

    def make(shards: Sequence[Pictures]) -> tuple[Store, ColorStats]:
        entries, index, moments = [], 0, Moments()
        for number, pictures in enumerate(shards):
            records = []
            for picture in pictures:
                height, width = picture.shape[:2]
                datum = Datum(height, width, encode_image(picture, "ppm", 90), 0, b"a")
                records.append((lmdb_shard.record_key(index), datum.encode()))
                moments, index = moments + Moments.of(picture), index + 1
            name = f"train/{number:05d}"
            entries.append(Shard(name, *lmdb_shard.write(tmp_path / "made" / name, records)))
        settings = Settings(64, True, "ppm", 90, "area", 0)
        split = Split(index, 0, moments.pixels, "", (index,), tuple(entries), moments.to_json(), {})
        store = Store(tmp_path / "made", settings, {}, ("a",), {"train": split})
        return store, compute_color_stats(index, moments)

    return make


@pytest.fixture
def figure() -> Any:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(14, 7), layout="constrained")


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figure empty, because drawing takes a second. Tests that do not check the drawing use this fixture."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("prep.check.color_plot.draw_figure", lambda *of: None)


@pytest.fixture
def natural() -> ColorStats:
    """Colour statistics of ILSVRC, as fb.resnet.torch lists them, for pixels in 0..255."""
    vectors = np.linalg.qr([[0.5675, 0.7192, 0.4009], [0.5808, -0.0045, -0.8140], [0.5836, -0.6948, 0.4203]])[0]
    vectors *= np.sign(vectors[0])
    stdevs = 255 * np.sqrt([0.2175, 0.0188, 0.0045])
    covariance = (vectors * stdevs**2) @ vectors.T
    return ColorStats(
        records=3,
        pixels=3000,
        mean_rgb=(123.7, 116.3, 103.5),
        covariance=tuple(tuple(row) for row in covariance.tolist()),
        eigenvalues=tuple((stdevs**2).tolist()),
        stdevs=tuple(stdevs.tolist()),
        eigenvectors=tuple(tuple(row) for row in vectors.tolist()),
        pixel_scale=255,
    )


def noise(seed: int, height: int = 40, width: int = 40) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def unique_pixels(height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return an image in which no two pixels have the same colour."""
    codes = np.random.default_rng(1).permutation(2**24)[: height * width]
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8).reshape(height, width, 3)


def codes_of(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return pixels.reshape(-1, 3).astype(np.int64) @ (65536, 256, 1)


def decoded(records: list[tuple[bytes, Any]]) -> Pictures:
    """Return all images of a split, parsed by protobuf and decoded by Pillow."""
    return [np.asarray(Image.open(io.BytesIO(datum.data)).convert("RGB")) for _, datum in records]


def panels(figure: Any) -> list[Any]:
    """Return the four matplotlib axes of the figure: cloud, spectrum, photographs, mean colour."""
    assert len(figure.axes) == 4
    return list(figure.axes)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
def test_pixels_and_photograph_come_from_the_records(
    kind: str, stores: dict[str, Path], records_of: Callable[[Path, str], list[tuple[bytes, Any]]]
) -> None:
    """The sample is 160 pixels of each of the 30 images, and the central square of one of the images."""
    store = Store.open(stores[kind])
    pixels, photograph = take_sample(store, "train", store.color_stats())
    pictures = decoded(records_of(stores[kind], "train"))
    assert pixels.dtype == np.uint8
    assert len(pictures) == 30
    for chunk, picture in zip(pixels.reshape(30, 160, 3), pictures, strict=True):
        assert np.isin(codes_of(chunk), codes_of(picture)).all()
        assert not np.array_equal(chunk, picture.reshape(-1, 3)[:160])
    squares = []
    for picture in pictures:
        top, left = (picture.shape[0] - 256) // 2, (picture.shape[1] - 256) // 2
        squares.append(picture[top:, left:][:256, :256])
    assert sum(np.array_equal(photograph, square) for square in squares) == 1


def test_sampled_pixels_are_spread_over_the_image_and_distinct(make_store: Callable[..., Any]) -> None:
    picture = unique_pixels(100, 90)
    store, stats = make_store([[picture]])
    pixels, _ = take_sample(store, "train", stats)
    places = np.flatnonzero(np.isin(codes_of(picture), codes_of(pixels)))
    assert len(pixels) == len(places) == 4800
    shares = np.histogram(places, bins=9, range=(0, 9000))[0] / 4800
    assert np.abs(shares - 1 / 9).max() < 0.02  # the limit is four standard deviations of a binomial distribution


def test_a_single_small_record_gives_all_its_pixels(make_store: Callable[..., Any]) -> None:
    picture = unique_pixels(32, 32)
    store, stats = make_store([[picture]])
    pixels, photograph = take_sample(store, "train", stats)
    assert sorted(codes_of(pixels)) == sorted(codes_of(picture))
    assert np.array_equal(photograph, picture)


def test_a_large_photograph_is_averaged_to_fewer_pixels(make_store: Callable[..., Any]) -> None:
    picture = noise(5, 520, 601)
    store, stats = make_store([[picture]])
    _, photograph = take_sample(store, "train", stats)
    square = picture[:, 40:560].astype(float)
    blocks = square.reshape(260, 2, 260, 2, 3).mean(axis=(1, 3))
    assert np.abs(photograph - blocks).max() <= 0.5


def test_the_photograph_has_typical_colours_and_half_the_contrast(
    make_store: Callable[..., Any], natural: ColorStats
) -> None:
    """take_sample chooses the image with half the contrast of the split.

    The other images have a single principal component, a tint, more contrast or less contrast.
    """
    rng, vectors = np.random.default_rng(3), np.array(natural.eigenvectors)

    def drawn(spread: Sequence[float], off: Sequence[float] = (0, 0, 0)) -> npt.NDArray[np.uint8]:
        scores = rng.normal(size=(50, 50, 3)) * np.array(natural.stdevs) * spread
        return np.clip(scores @ vectors.T + natural.mean_rgb + off, 0, 255).astype(np.uint8)

    wanted = drawn((0.5, 0.5, 0.5))
    tinted = [drawn((0.5, 0.5, 0.5), off) for off in ((30, 0, -30), (-30, 0, 30), (0, 20, 0), (0, -20, 0))]
    others = [drawn((1, 1, 1)), drawn((0.1, 0.1, 0.1)), drawn((0.5, 0, 0))]
    store, _ = make_store([[*tinted, wanted], others])
    assert np.array_equal(take_sample(store, "train", natural)[1], wanted)


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the records that lmdb_shard.read yields from each folder. counts["open"] is the number of open readers."""
    counts: Counter[str] = Counter()
    original = lmdb_shard.read

    def read(folder: Path) -> Iterator[tuple[bytes, bytes]]:
        counts["open"] += 1
        try:
            for record in original(folder):
                counts[folder.name] += 1
                yield record
        finally:
            counts["open"] -= 1

    monkeypatch.setattr(lmdb_shard, "read", read)
    return counts


@pytest.mark.parametrize(
    ("shards", "records", "touched", "read"), [(5, 20, 5, 48), (100, 2, 48, 48), (3, 4, 3, 12), (1, 60, 1, 48)]
)
def test_few_records_are_read_from_shards_all_over_the_split(
    shards: int,
    records: int,
    touched: int,
    read: int,
    make_store: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, stats = make_store([[noise(i * records + j) for j in range(records)] for i in range(shards)])
    counts = watch_reads(monkeypatch)
    pixels, _ = take_sample(store, "train", stats)
    assert counts.pop("open") == 0
    assert (len(counts), counts.total()) == (touched, read)
    assert max(counts.values()) - min(counts.values()) <= 1
    steps = np.diff(sorted(int(name) for name in counts))
    assert len(steps) == 0 or max(steps) - min(steps) <= 1
    assert len(pixels) == 4800 // read * read
    # The reader has closed the shard. Otherwise, LMDB would refuse to open the shard again.
    lmdb.open(str(store.root / "train/00000"), readonly=True, lock=False).close()


def test_a_shard_without_records_is_skipped(make_store: Callable[..., Any]) -> None:
    """A build with --on-bad skip can leave empty shards. In this store, only shard 4 of 60 has records."""
    store, stats = make_store([[noise(1), noise(2)] if number == 4 else [] for number in range(60)])
    pixels, _ = take_sample(store, "train", stats)
    assert np.isin(codes_of(pixels), codes_of(np.stack([noise(1), noise(2)]))).all()


def test_the_sample_depends_on_the_seed_alone(store: Path) -> None:
    opened = Store.open(store)
    first, again, other = (take_sample(opened, "train", opened.color_stats(), seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_cloud_shows_each_pixel_at_its_colour_and_axes_through_the_mean(figure: Any, natural: ColorStats) -> None:
    from mpl_toolkits.mplot3d.proj3d import proj_transform

    pixels = unique_pixels(20, 30).reshape(-1, 3)
    draw_figure(figure, "train", natural, pixels, noise(1))
    cloud = panels(figure)[0]
    (points,) = cloud.collections
    figure.draw_without_rendering()  # matplotlib projects the points and sorts them by depth
    colours = np.rint(points.get_facecolor()[:, :3] * 255).astype(np.uint8)
    assert sorted(codes_of(colours)) == sorted(codes_of(pixels))
    x, y, _ = proj_transform(*colours.T, cloud.get_proj())
    np.testing.assert_allclose(points._offset_zordered, np.stack([x, y], axis=1), atol=1e-9)
    assert [text.get_text() for text in cloud.texts] == ["PC 1", "PC 2", "PC 3"]
    values, vectors = np.linalg.eigh(np.array(natural.covariance))  # ascending
    assert len(cloud.lines) == 3
    for component, line in enumerate(cloud.lines):
        ends = np.transpose(line.get_data_3d())
        half = 2 * np.sqrt(values[2 - component]) * vectors[:, 2 - component] * np.sign(vectors[0, 2 - component])
        np.testing.assert_allclose(ends, [natural.mean_rgb - half, natural.mean_rgb + half], atol=1e-6)


def test_the_spectrum_is_drawn_with_that_of_ilsvrc(figure: Any, store: Path) -> None:
    stats = Store.open(store).color_stats()
    draw_figure(figure, "train", stats, noise(1).reshape(-1, 3), noise(1))
    spectrum = panels(figure)[1]
    np.testing.assert_allclose([bar.get_height() for bar in spectrum.patches], np.sqrt(stats.eigenvalues))
    shares = 100 * np.array(stats.eigenvalues) / np.trace(stats.covariance)
    wanted = [f"{stdev:.1f}\n{share:.1f} %" for stdev, share in zip(stats.stdevs, shares, strict=True)]
    assert [text.get_text() for text in spectrum.texts] == wanted
    lines = spectrum.collections[0].get_segments()
    np.testing.assert_allclose([line[:, 1] for line in lines], [[118.9] * 2, [35.0] * 2, [17.1] * 2], atol=0.05)


def test_the_photographs_are_shifted_by_the_papers_formula(figure: Any, natural: ColorStats) -> None:
    """The panel is a grid of cells. A cell is the photograph plus [p1, p2, p3][α1 σ1, α2 σ2, α3 σ3]ᵀ at each pixel.

    The stream uses the same formula. In a cell, two of the three α are zero.
    """
    photograph = noise(2, 64, 64)
    draw_figure(figure, "train", natural, noise(1).reshape(-1, 3), photograph)
    axes = panels(figure)[2]
    sheet = np.asarray(axes.images[0].get_array())
    vectors, stdevs = np.array(natural.eigenvectors), natural.stdevs
    stream = noise_matrix(natural, "stdev", 0.1)
    assert sheet.shape == (3 * 66, 7 * 66, 3)  # cells of 64 px with a margin of 2 px
    for component in range(3):
        for column, alpha in enumerate(ALPHAS):
            cell = sheet[66 * component :, 66 * column :][:66, :66]
            assert (cell[64:] == 255).all() and (cell[:, 64:] == 255).all()
            shift = [alpha * stdevs[component] * vectors[channel][component] for channel in range(3)]
            np.testing.assert_allclose(shift, (column - 3) * stream[:, component], rtol=1e-5)
            for channel in range(3):
                exact = np.clip(photograph[..., channel] + shift[channel], 0, 255)
                assert np.abs(cell[:64, :64, channel] - exact).max() <= 0.5
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "α = −0.3", "α = −0.2", "α = −0.1", "as stored", "α = +0.1", "α = +0.2", "α = +0.3",
    ]  # fmt: skip
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        f"PC {k}\n0.1·σ = {step}" for k, step in ((1, 11.9), (2, 3.5), (3, 1.7))
    ]


def test_the_mean_colour_is_shifted_by_whole_standard_deviations(figure: Any, natural: ColorStats) -> None:
    draw_figure(figure, "train", natural, noise(1).reshape(-1, 3), noise(1))
    axes = panels(figure)[3]
    strips = np.asarray(axes.images[0].get_array())
    left, right, _, _ = axes.images[0].get_extent()
    assert (left, right, strips.shape) == (-3, 3, (3, 241, 3))
    for component, strip in enumerate(strips):
        for place, amount in ((0, -3), (40, -2), (120, 0), (240, 3)):
            colour = np.array(natural.covariance) @ np.array(natural.eigenvectors)[:, component]  # λ v
            exact = natural.mean_rgb + amount * colour / natural.stdevs[component]
            assert np.abs(strip[place] - np.clip(exact, 0, 255)).max() <= 0.5 + 1e-6


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
def test_every_kind_of_store_is_plotted(kind: str, stores: dict[str, Path], tmp_path: Path) -> None:
    store = Store.open(stores[kind])
    plot_colors(store, "val", store.color_stats("val"), tmp_path / "a.PNG")
    with Image.open(tmp_path / "a.PNG") as image:
        assert (image.format, image.size) == ("PNG", (2100, 1050))
    assert [path.name for path in tmp_path.iterdir()] == ["a.PNG"]


@pytest.mark.parametrize("what", ["grey", "one colour", "noise"])
def test_a_split_of_one_small_record_is_plotted(what: str, make_store: Callable[..., Any], tmp_path: Path) -> None:
    """A grey image has one principal component, and an image of a single colour has none."""
    pytest.importorskip("matplotlib")
    picture = noise(1, 32, 32)
    if what == "grey":
        picture = np.repeat(picture[..., :1], 3, axis=2)
    elif what == "one colour":
        picture = np.full_like(picture, 77)
    store, stats = make_store([[picture]])
    plot_colors(store, "train", stats, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        image.load()


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_the_same_plot_has_the_same_bytes(name: str, store: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    opened, out = Store.open(store), tmp_path / name
    plot_colors(opened, "train", opened.color_stats(), out)
    first = out.read_bytes()
    plot_colors(opened, "train", opened.color_stats(), out)
    assert out.read_bytes() == first
    if name == "a.svg":
        assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"


def test_plotting_leaves_matplotlibs_settings_unchanged(store: Path, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    opened = Store.open(store)
    with matplotlib.rc_context({"font.size": 7, "svg.hashsalt": "mine"}):
        before = dict(matplotlib.rcParams)
        plot_colors(opened, "train", opened.color_stats(), tmp_path / "a.png")
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", ["pca.jpeg", "pca", "pca.png.bak"])
def test_an_unknown_extension_is_an_error_with_the_known_ones(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, counts = Store.open(store), watch_reads(monkeypatch)
    with pytest.raises(UserError) as error:
        plot_colors(opened, "train", opened.color_stats(), tmp_path / name)
    for word in ("--plot", str(tmp_path / name), ".png or .svg"):
        assert word in str(error.value)
    assert not counts
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    opened = Store.open(store)
    with pytest.raises(UserError, match=r"pip install 'matplotlib>="):
        plot_colors(opened, "train", opened.color_stats(), tmp_path / "a.png")


@pytest.mark.usefixtures("blank")
def test_a_file_that_cannot_be_written_is_an_error(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out, why in (
        (tmp_path / "nowhere" / "a.png", "No such file or directory"),
        (tmp_path / "file" / "a.png", "Not a directory"),
        (tmp_path / "folder.png", "Is a directory"),
    ):
        with pytest.raises(UserError) as error:
            plot_colors(opened, "train", opened.color_stats(), out)
        assert f"--plot {out}: {why}. Name a file" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.usefixtures("blank")
def test_a_full_disk_leaves_the_existing_file(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, out = Store.open(store), tmp_path / "a.png"
    out.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        plot_colors(opened, "train", opened.color_stats(), out)
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def damage_record(store: Store, number: int, change: Callable[[bytes], bytes | None]) -> None:
    """Replace the value of the second record of shard `number` by change(value). None deletes the record."""
    folder = store.root / f"train/{number:05d}"
    with lmdb.open(str(folder), lock=False) as env, env.begin(write=True) as txn:
        key, value = list(txn.cursor())[1]
        if (changed := change(value)) is None:
            txn.delete(key)
        else:
            txn.put(key, changed)


@pytest.mark.parametrize("what", ["bytes", "picture"])
def test_a_damaged_record_is_an_error_with_shard_and_key(
    what: str, make_store: Callable[..., Any], tmp_path: Path
) -> None:
    """Record 3, the second record of shard 1, has one changed byte, or has a correct checksum but no image."""
    pytest.importorskip("matplotlib")
    store, stats = make_store([[noise(1), noise(2)], [noise(3), noise(4)]])
    no_picture = Datum(40, 40, b"P6\nnothing", 0, b"a").encode()
    damage_record(store, 1, lambda value: no_picture if what == "picture" else value[:99] + b"?" + value[100:])
    with pytest.raises(StoreError) as error:
        plot_colors(store, "train", stats, tmp_path / "a.png")
    for word in (str(store.root / "train/00001"), "key 00000003", "Build the store again"):
        assert word in str(error.value)
    assert not (tmp_path / "a.png").exists()


def test_a_missing_record_is_an_error(make_store: Callable[..., Any]) -> None:
    store, stats = make_store([[noise(1), noise(2)]])
    damage_record(store, 0, lambda value: None)
    with pytest.raises(StoreError, match="train/00000: 1 records, expected 2"):
        take_sample(store, "train", stats)
