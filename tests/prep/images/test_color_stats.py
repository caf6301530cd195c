"""prep.images.color_stats is compared with numpy.cov, scikit-learn's PCA, and exact fractions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.decomposition import PCA

from prep import workers
from prep.build.split import build_split
from prep.cli import main
from prep.console import Progress
from prep.images.color_stats import Moments, compute_color_stats, recompute_color_stats
from prep.inputs.sources import list_source
from prep.store.datum import Datum
from prep.store.lmdb_shard import write
from prep.store.manifest import Settings, Store, StoreError
from prep.workers import Counts, WorkerDied, WorkerPool
from tests.helpers.building import InlineRunner


def coloured_noise(seed: int, sizes: Sequence[tuple[int, int]]) -> list[npt.NDArray[np.uint8]]:
    """Return images whose channels are correlated, as in natural images."""
    rng = np.random.default_rng(seed)
    mixing = np.array([[50.0, 20.0, 5.0], [48.0, -2.0, -9.0], [45.0, -24.0, 6.0]])
    return [
        np.clip(rng.normal(size=(height, width, 3)) @ mixing.T + (120, 116, 104), 0, 255).astype(np.uint8)
        for height, width in sizes
    ]


def moments_of(images: Sequence[npt.NDArray[np.uint8]]) -> Moments:
    return sum((Moments.of(image) for image in images), Moments())


def all_pixels(images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float64]:
    return np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)


IMAGES = coloured_noise(0, [(40, 31), (1, 7), (64, 64), (100, 33)])


def test_the_covariance_equals_numpy_cov() -> None:
    pixels = all_pixels(IMAGES)
    stats = compute_color_stats(len(IMAGES), moments_of(IMAGES))
    assert (stats.records, stats.pixels, stats.pixel_scale) == (len(IMAGES), len(pixels), 255)
    np.testing.assert_allclose(stats.mean_rgb, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(pixels, rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(stats.stdevs, np.sqrt(np.linalg.svd(np.cov(pixels.T))[1]), rtol=1e-9)


def test_the_components_equal_scikit_learns_pca() -> None:
    pca = PCA(n_components=3, svd_solver="full").fit(all_pixels(IMAGES))
    stats = compute_color_stats(len(IMAGES), moments_of(IMAGES))
    np.testing.assert_allclose(stats.eigenvalues, pca.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(np.square(stats.stdevs), pca.explained_variance_, rtol=1e-9)
    for component, expected in zip(np.array(stats.eigenvectors).T, pca.components_, strict=True):
        np.testing.assert_allclose(component, expected * np.sign(expected @ component), atol=1e-9)


def test_moments_are_exact_sums() -> None:
    pixels = np.concatenate([image.reshape(-1, 3) for image in IMAGES]).astype(np.int64)
    moments = moments_of(IMAGES)
    assert moments.pixels == len(pixels)
    assert moments.total == tuple(pixels.sum(axis=0).tolist())
    assert moments.outer == tuple(tuple(row) for row in (pixels.T @ pixels).tolist())
    assert all(type(n) is int for n in (moments.pixels, *moments.total, *(n for row in moments.outer for n in row)))


def test_moments_add_up_in_any_order() -> None:
    one = Moments.of(np.concatenate([image.reshape(1, -1, 3) for image in IMAGES], axis=1))
    assert moments_of(IMAGES) == moments_of(IMAGES[::-1]) == one
    assert moments_of(IMAGES[:2]) + moments_of(IMAGES[2:]) == one
    assert Moments() + one == one
    assert Moments.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_moments_do_not_depend_on_strides() -> None:
    image = IMAGES[0]
    turned = np.ascontiguousarray(image.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert Moments.of(turned) == Moments.of(image[::-1, ::-1]) == Moments.of(image)


def test_the_variance_of_a_huge_nearly_constant_set_is_exact() -> None:
    """One of 10^13 pixels is (254, 253, 199), and all other pixels are (255, 254, 200).

    The variance is 10^-13. The sums of squares exceed 2^53, so float64 sums would lose this variance.
    """
    n, k = 10**13, 1
    high, low = (255, 254, 200), (254, 253, 199)
    total = tuple((n - k) * h + k * low_one for h, low_one in zip(high, low, strict=True))
    outer = tuple(tuple((n - k) * high[i] * high[j] + k * low[i] * low[j] for j in range(3)) for i in range(3))
    stats = compute_color_stats(1, Moments(n, total, outer))
    exact = float(Fraction(k * (n - k), n * (n - 1)))
    assert 0.99e-13 < exact < 1.01e-13
    np.testing.assert_allclose(stats.covariance, np.full((3, 3), exact), rtol=1e-15)
    assert stats.mean_rgb == tuple(float(Fraction(t, n)) for t in total)

    in_floats = float(outer[0][0]) / n - (float(total[0]) / n) ** 2
    assert abs(in_floats - exact) > 0.9 * exact  # float64 sums would give a wrong variance


def test_moments_beyond_53_bits_add_up() -> None:
    big = Moments(2**60, (2**67 + 1,) * 3, ((2**75 + 1,) * 3,) * 3)
    both = big + Moments(1, (1, 1, 1), ((1, 1, 1),) * 3)
    assert both == Moments(2**60 + 1, (2**67 + 2,) * 3, ((2**75 + 2,) * 3,) * 3)
    assert Moments.from_json(json.loads(json.dumps(both.to_json()))) == both


@pytest.mark.parametrize("seed", range(6))
def test_eigenvalues_descend_and_red_is_positive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (30, 40, 3)) @ rng.dirichlet((1, 1, 1), 3).T
    stats = compute_color_stats(1, Moments.of(pixels.astype(np.uint8)))
    assert list(stats.eigenvalues) == sorted(stats.eigenvalues, reverse=True)
    assert list(stats.stdevs) == sorted(stats.stdevs, reverse=True)
    vectors = np.array(stats.eigenvectors)
    assert (vectors[0] > 0).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(
        vectors @ np.diag(stats.eigenvalues) @ vectors.T, stats.covariance, atol=1e-12 * stats.eigenvalues[0]
    )


def test_an_eigenvector_without_red_has_its_first_component_positive() -> None:
    """The channels are uncorrelated, and B varies most.

    The eigenvectors are the positive axes of B, G and R, in this order.
    """
    pixels = np.zeros((3, 100, 3), np.uint8)
    for channel, amplitude in enumerate((10, 40, 90)):
        pixels[channel, :50, channel] = amplitude
    moments = Moments.of(pixels)
    diagonal = tuple(tuple(moments.outer[i][j] if i == j else 0 for j in range(3)) for i in range(3))
    stats = compute_color_stats(1, Moments(moments.pixels, (0, 0, 0), diagonal))
    np.testing.assert_array_equal(stats.eigenvectors, [[0, 0, 1], [0, 1, 0], [1, 0, 0]])


def test_an_image_of_one_colour_has_eigenvalues_of_zero() -> None:
    stats = compute_color_stats(1, Moments.of(np.full((9, 9, 3), (7, 8, 9), np.uint8)))
    assert stats.mean_rgb == (7, 8, 9)
    assert stats.eigenvalues == stats.stdevs == (0, 0, 0)


def test_one_pixel_is_refused() -> None:
    with pytest.raises(StoreError, match="two pixels"):
        compute_color_stats(1, Moments.of(np.zeros((1, 1, 3), np.uint8)))


def build(photo_folder: Path, store: Path, format: str) -> Store:
    source = list_source(photo_folder / "train", "train")
    settings = Settings(64, True, format, 60, "area", 3)
    return build_split(source, store, settings, InlineRunner(), Progress(len(source.inputs), "pictures"))


def recomputed(store: Path) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["pca-stats", "--store", str(store), "--recompute", "--json"])
    assert result.exit_code == 0, result.output
    stats = json.loads(result.stdout)
    assert isinstance(stats, dict)
    return stats


def stored_pixels(records: Sequence[tuple[bytes, Any]], tmp_path: Path) -> npt.NDArray[np.float64]:
    """Return the pixels of all records of the split, decoded by Pillow."""
    images = []
    for key, datum in records:
        path = tmp_path / key.decode()
        path.write_bytes(datum.data)
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB")))
    return all_pixels(images)


def test_recomputing_a_ppm_store_gives_the_same_bits_as_the_build(
    photo_folder: Path, records_of: Callable[[Path, str], Any], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    build(photo_folder, store, "ppm")
    at_build = json.loads((store / "train" / "colour.json").read_bytes())
    again = recomputed(store)
    assert {name: again[name] for name in at_build} == at_build
    assert again["std_rgb"] == np.sqrt(np.diag(at_build["covariance"])).tolist()
    assert again["unit_range"]["mean_rgb"] == pytest.approx([mean / 255 for mean in at_build["mean_rgb"]])
    pixels = stored_pixels(records_of(store, "train"), tmp_path)
    assert at_build["pixels"] == len(pixels)
    np.testing.assert_allclose(at_build["covariance"], np.cov(pixels, rowvar=False), rtol=1e-9)


def test_recomputing_a_jpeg_store_gives_nearly_the_values_of_the_build(
    photo_folder: Path, records_of: Callable[[Path, str], Any], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    build(photo_folder, store, "jpeg")
    at_build = json.loads((store / "train" / "colour.json").read_bytes())
    again = recomputed(store)
    assert again["pixels"] == at_build["pixels"]
    np.testing.assert_allclose(again["stdevs"], at_build["stdevs"], atol=1.5)
    assert again["stdevs"] != at_build["stdevs"]
    pixels = stored_pixels(records_of(store, "train"), tmp_path)
    np.testing.assert_allclose(again["covariance"], np.cov(pixels, rowvar=False), rtol=1e-9)
    assert json.loads((store / "train" / "colour.json").read_bytes()) == at_build  # the file is unchanged


def test_a_build_writes_the_statistics_of_its_moments(photo_folder: Path, tmp_path: Path) -> None:
    store = build(photo_folder, tmp_path / "store", "ppm")
    moments = Moments.from_json(store.split("train").moments)
    expected = compute_color_stats(30, moments)
    assert store.color_stats("train") == expected
    assert json.loads((tmp_path / "store" / "train" / "colour.json").read_bytes()) == json.loads(
        json.dumps(asdict(expected))
    )


def test_a_damaged_record_is_named_by_shard_and_key(photo_folder: Path, tmp_path: Path) -> None:
    """In one case, the damaged record is not an image. In the other case, the damaged record has a wrong checksum."""
    store = build(photo_folder, tmp_path / "store", "jpeg")
    # The new shard has a single record, which is larger than the whole old shard.
    good = Datum(1, 1, b"not a image" * 100_000, 0, b"x").encode()
    for value in (good, good[:-1] + bytes([good[-1] ^ 1])):
        folder = tmp_path / "store" / "train" / "00000"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        write(folder, [(b"00000005", value)])
        with pytest.raises(StoreError, match="00000, key 00000005: "):
            recompute_color_stats(store, "train", InlineRunner(), Progress(30, "records"))


def test_recompute_uses_as_many_workers_as_jobs_or_cores(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool_sizes: list[int] = []

    class Recorded(WorkerPool):
        def __init__(self, jobs: int, preload: str = "") -> None:
            pool_sizes.append(jobs)
            super().__init__(jobs, preload)

    monkeypatch.setattr(workers, "WorkerPool", Recorded)
    monkeypatch.setattr("prep.cli.options.usable_cores", lambda: 5)
    words = ["pca-stats", "--store", str(stores["ppm"]), "--recompute"]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert CliRunner().invoke(main, [*words, "--jobs", "2"]).exit_code == 0
    assert pool_sizes == [5, 2]


def test_moments_of_many_shards_are_added_and_counted(tmp_path: Path) -> None:
    """The 130 images make three shards, so there are three tasks. The sums equal the sums of the build, bit for bit."""
    rng = np.random.default_rng(6)
    (tmp_path / "photos" / "n1").mkdir(parents=True)
    for number in range(130):
        head = b"P6 32 32 255\n"
        (tmp_path / "photos" / "n1" / f"{number}.ppm").write_bytes(head + rng.bytes(3072))
    source = list_source(tmp_path / "photos", "train")
    settings = Settings(32, False, "ppm", 90, "area", 0)
    store = build_split(source, tmp_path / "store", settings, InlineRunner(), Progress(130, "pictures"))
    seen: list[str] = []

    class Recorded(InlineRunner):
        def map(
            self, work: Any, tasks: Iterable[Any], on_progress: Callable[[Counts], None]
        ) -> Iterator[tuple[Any, Any]]:
            for task, result in super().map(work, tasks, on_progress):
                seen.append(task)
                yield task, result

    progress = Progress(130, "records")
    assert recompute_color_stats(store, "train", Recorded(), progress) == store.color_stats("train")
    assert seen == store.shard_paths("train") and len(seen) == 3
    assert progress.done == 130

    class Dying(InlineRunner):
        def map(
            self, work: Any, tasks: Iterable[Any], on_progress: Callable[[Counts], None]
        ) -> Iterator[tuple[Any, Any]]:
            for task in tasks:
                yield task, WorkerDied(4, -7)

    with pytest.raises(
        StoreError, match=r"00000: the process that read this shard was killed \(SIGBUS\).*alexprep verify"
    ):
        recompute_color_stats(store, "train", Dying(), progress)
