"""prep.images.color_stats against numpy.cov in float64, scikit-learn's PCA, and exact fractions where float64 would cancel."""

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
from tests.helpers.building import Here


def coloured_noise(seed: int, sizes: Sequence[tuple[int, int]]) -> list[npt.NDArray[np.uint8]]:
    """Pictures whose channels are correlated, as those of natural ones are."""
    rng = np.random.default_rng(seed)
    mixing = np.array([[50.0, 20.0, 5.0], [48.0, -2.0, -9.0], [45.0, -24.0, 6.0]])
    return [
        np.clip(rng.normal(size=(height, width, 3)) @ mixing.T + (120, 116, 104), 0, 255).astype(np.uint8)
        for height, width in sizes
    ]


def moments_of(pictures: Sequence[npt.NDArray[np.uint8]]) -> Moments:
    return sum((Moments.of(picture) for picture in pictures), Moments())


def all_pixels(pictures: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float64]:
    return np.concatenate([picture.reshape(-1, 3) for picture in pictures]).astype(np.float64)


PICTURES = coloured_noise(0, [(40, 31), (1, 7), (64, 64), (100, 33)])


def test_covariance_is_numpys() -> None:
    pixels = all_pixels(PICTURES)
    stats = compute_color_stats(len(PICTURES), moments_of(PICTURES))
    assert (stats.records, stats.pixels, stats.pixel_scale) == (len(PICTURES), len(pixels), 255)
    np.testing.assert_allclose(stats.mean_rgb, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(pixels, rowvar=False), rtol=1e-9)
    np.testing.assert_allclose(stats.stdevs, np.sqrt(np.linalg.svd(np.cov(pixels.T))[1]), rtol=1e-9)


def test_components_are_scikit_learns() -> None:
    pca = PCA(n_components=3, svd_solver="full").fit(all_pixels(PICTURES))
    stats = compute_color_stats(len(PICTURES), moments_of(PICTURES))
    np.testing.assert_allclose(stats.eigenvalues, pca.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(np.square(stats.stdevs), pca.explained_variance_, rtol=1e-9)
    for component, expected in zip(np.array(stats.eigenvectors).T, pca.components_, strict=True):
        np.testing.assert_allclose(component, expected * np.sign(expected @ component), atol=1e-9)


def test_moments_are_exact_sums() -> None:
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in PICTURES]).astype(np.int64)
    moments = moments_of(PICTURES)
    assert moments.pixels == len(pixels)
    assert moments.total == tuple(pixels.sum(axis=0).tolist())
    assert moments.outer == tuple(tuple(row) for row in (pixels.T @ pixels).tolist())
    assert all(type(n) is int for n in (moments.pixels, *moments.total, *(n for row in moments.outer for n in row)))


def test_moments_add_up_in_any_order() -> None:
    one = Moments.of(np.concatenate([picture.reshape(1, -1, 3) for picture in PICTURES], axis=1))
    assert moments_of(PICTURES) == moments_of(PICTURES[::-1]) == one
    assert moments_of(PICTURES[:2]) + moments_of(PICTURES[2:]) == one
    assert Moments() + one == one
    assert Moments.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_moments_do_not_mind_strides() -> None:
    picture = PICTURES[0]
    turned = np.ascontiguousarray(picture.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert Moments.of(turned) == Moments.of(picture[::-1, ::-1]) == Moments.of(picture)


def test_nearly_constant_colour_of_a_huge_set() -> None:
    """10^13 pixels of (255, 254, 200), one of them a level lower: sums of squares are beyond 2^53.

    The variance is 10^-13, which float64 sums lose altogether.
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
    assert abs(in_floats - exact) > 0.9 * exact  # so the test is one that rounding would fail


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


def test_sign_where_red_is_zero() -> None:
    """Channels that vary one at a time: the components are the axes, each with its one number positive."""
    pixels = np.zeros((3, 100, 3), np.uint8)
    for channel, amplitude in enumerate((10, 40, 90)):
        pixels[channel, :50, channel] = amplitude
    moments = Moments.of(pixels)
    diagonal = tuple(tuple(moments.outer[i][j] if i == j else 0 for j in range(3)) for i in range(3))
    stats = compute_color_stats(1, Moments(moments.pixels, (0, 0, 0), diagonal))
    np.testing.assert_array_equal(stats.eigenvectors, [[0, 0, 1], [0, 1, 0], [1, 0, 0]])


def test_one_colour_has_no_spread() -> None:
    stats = compute_color_stats(1, Moments.of(np.full((9, 9, 3), (7, 8, 9), np.uint8)))
    assert stats.mean_rgb == (7, 8, 9)
    assert stats.eigenvalues == stats.stdevs == (0, 0, 0)


def test_one_pixel_has_no_covariance() -> None:
    with pytest.raises(StoreError, match="two pixels"):
        compute_color_stats(1, Moments.of(np.zeros((1, 1, 3), np.uint8)))


def build(photo_folder: Path, store: Path, format: str) -> Store:
    source = list_source(photo_folder / "train", "train", None, None, ())
    settings = Settings(64, True, format, 60, "area", 3)
    return build_split(source, store, settings, Here(), Progress(len(source.inputs), "pictures"))


def recomputed(store: Path) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["pca-stats", "--store", str(store), "--recompute", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


def stored_pixels(records: Sequence[tuple[bytes, Any]], tmp_path: Path) -> npt.NDArray[np.float64]:
    """Every pixel of every payload, decoded by Pillow."""
    pictures = []
    for key, datum in records:
        path = tmp_path / key.decode()
        path.write_bytes(datum.data)
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    return all_pixels(pictures)


def test_ppm_store_recomputed_is_the_build_to_the_bit(
    photo_folder: Path, records_of: Callable[[Path, str], Any], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    build(photo_folder, store, "ppm")
    at_build = json.loads((store / "train" / "colour.json").read_bytes())
    assert recomputed(store) == at_build
    pixels = stored_pixels(records_of(store, "train"), tmp_path)
    assert at_build["pixels"] == len(pixels)
    np.testing.assert_allclose(at_build["covariance"], np.cov(pixels, rowvar=False), rtol=1e-9)


def test_jpeg_store_recomputed_is_near_the_build(
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
    assert json.loads((store / "train" / "colour.json").read_bytes()) == at_build  # the file stays as it is


def test_build_writes_the_statistics_of_its_moments(photo_folder: Path, tmp_path: Path) -> None:
    store = build(photo_folder, tmp_path / "store", "ppm")
    moments = Moments.from_json(store.split("train").moments)
    expected = compute_color_stats(30, moments)
    assert store.color_stats("train") == expected
    assert json.loads((tmp_path / "store" / "train" / "colour.json").read_bytes()) == json.loads(
        json.dumps(asdict(expected))
    )


def test_damaged_record_is_named(photo_folder: Path, tmp_path: Path) -> None:
    """A record that was changed after the build: the error names the shard and the key."""
    store = build(photo_folder, tmp_path / "store", "jpeg")
    good = Datum(1, 1, b"not a picture" * 100_000, 0, b"x").encode()  # as long as the shard that it stands for
    for value in (good, good[:-1] + bytes([good[-1] ^ 1])):
        folder = tmp_path / "store" / "train" / "00000"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        write(folder, [(b"00000005", value)])
        with pytest.raises(StoreError, match="00000, key 00000005: "):
            recompute_color_stats(store, "train", Here(), Progress(30, "records"))


def test_recompute_runs_on_all_workers(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many processes as --jobs, or as there are cores; each shard is a task."""
    asked: list[int] = []

    class Recorded(WorkerPool):
        def __init__(self, jobs: int) -> None:
            asked.append(jobs)
            super().__init__(jobs)

    monkeypatch.setattr(workers, "WorkerPool", Recorded)
    monkeypatch.setattr("prep.cli.check.usable_cores", lambda: 5)
    words = ["pca-stats", "--store", str(stores["ppm"]), "--recompute"]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert CliRunner().invoke(main, [*words, "--jobs", "2"]).exit_code == 0
    assert asked == [5, 2]


def test_moments_of_many_shards_are_added_and_counted(tmp_path: Path) -> None:
    """130 pictures are three shards: three tasks, 130 records told, the build's sums to the bit."""
    rng = np.random.default_rng(6)
    (tmp_path / "photos" / "n1").mkdir(parents=True)
    for number in range(130):
        head = b"P6 32 32 255\n"
        (tmp_path / "photos" / "n1" / f"{number}.ppm").write_bytes(head + rng.bytes(3072))
    source = list_source(tmp_path / "photos", "train", None, None, ())
    settings = Settings(32, False, "ppm", 90, "area", 0)
    store = build_split(source, tmp_path / "store", settings, Here(), Progress(130, "pictures"))
    seen: list[str] = []

    class Recorded(Here):
        def map(
            self, work: Any, tasks: Iterable[Any], on_progress: Callable[[Counts], None]
        ) -> Iterator[tuple[Any, Any]]:
            for task, result in super().map(work, tasks, on_progress):
                seen.append(task)
                yield task, result

    report = Progress(130, "records")
    assert recompute_color_stats(store, "train", Recorded(), report) == store.color_stats("train")
    assert seen == store.shard_paths("train") and len(seen) == 3
    assert report.done == 130

    class Dying(Here):
        def map(
            self, work: Any, tasks: Iterable[Any], on_progress: Callable[[Counts], None]
        ) -> Iterator[tuple[Any, Any]]:
            for task in tasks:
                yield task, WorkerDied(4, -7)

    with pytest.raises(StoreError, match=r"00000: the process that read it was killed \(SIGBUS\).*alexprep verify"):
        recompute_color_stats(store, "train", Dying(), report)
