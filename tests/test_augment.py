"""The training stream, image by image, against a NumPy oracle given the same draws; and the draws against chance.

The oracle reads the records itself (py-lmdb, protobuf-free), decodes them with Pillow, and applies the formula of
pipeline.augment in float64.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.augment import Augmentation, noise_matrix
from pipeline.loader import eval_loader, train_graph
from pipeline.placement import Placement
from prep import shard
from prep.console import UserError
from prep.datum import Datum
from prep.manifest import Store

CPU = Placement.of("cpu")
CHOICES = [
    Augmentation(),
    Augmentation(mean="image", colour="stdev", divisor=1.1, shared_by=4),
    Augmentation(mean="none", colour="eigenvalue"),
    Augmentation(mean="channel", colour="off"),
]


def central_square(picture: np.ndarray, side: int) -> np.ndarray:
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return picture[top : top + side, left : left + side]


def stored_squares(store: Store, split: str) -> list[tuple[int, np.ndarray]]:
    """(label, central square) of every record, in the order of their keys."""
    squares = []
    for path in store.shard_paths(split):
        for _, value in shard.read(Path(path)):
            datum = Datum.decode(value)
            picture = np.asarray(Image.open(io.BytesIO(datum.data)))
            squares.append((datum.label, central_square(picture, store.settings.side_px)))
    return squares


def mean_of(store: Store, how: Augmentation) -> np.ndarray:
    """What is subtracted, (224, 224, 3) or (3,)."""
    if how.mean == "image":
        return central_square(store.mean_image().astype(np.float64), 224)
    return np.array(store.colour().mean_rgb if how.mean == "channel" else [0.0, 0.0, 0.0])


def oracle(square: np.ndarray, offset: np.ndarray, flip: int, shift: np.ndarray, mean: np.ndarray, divisor: float):
    y, x = offset
    window = square[y : y + 224, x : x + 224].astype(np.float64)
    if flip:
        window = window[:, ::-1]
    return ((window + shift - mean) / divisor).transpose(2, 0, 1)


@pytest.mark.parametrize("how", CHOICES, ids=lambda how: f"{how.mean}-{how.colour}-{how.shared_by}")
@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
def test_training_images_equal_the_formula(stores: dict[str, Path], kind: str, how: Augmentation) -> None:
    store = Store.open(stores[kind])
    squares = stored_squares(store, "train")
    images, labels, offsets, flips, shifts = (
        out.as_array() for out in train_graph(store, "train", 16, CPU, 3, how, 2).run()
    )
    for image, label, offset, flip, shift in zip(images, labels[:, 0], offsets, flips, shifts, strict=True):
        wanted = [
            oracle(square, offset, flip, shift, mean_of(store, how), how.divisor)
            for mine, square in squares
            if mine == label
        ]
        assert min(np.abs(image - one).max() for one in wanted) < 1e-3


@pytest.mark.parametrize("mean", ["channel", "image", "none"])
@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
def test_views_of_evaluation_equal_the_formula(stores: dict[str, Path], kind: str, mean: str) -> None:
    store, how = Store.open(stores[kind]), Augmentation(mean=mean)
    squares = stored_squares(store, "val")
    far = store.settings.side_px - 224
    corners = [(0, 0), (0, far), (far // 2, far // 2), (far, 0), (far, far)]
    nothing = np.zeros(3)
    ten = [(corner, flip) for flip in (0, 1) for corner in corners]
    with (
        eval_loader(store.root, 5, augmentation=how) as one_view,
        eval_loader(store.root, 5, views=10, augmentation=how) as ten_views,
    ):
        one = [(int(label), image) for batch in one_view for image, label in zip(*batch, strict=True)]
        all_ten = [(int(label), views) for batch in ten_views for views, label in zip(*batch, strict=True)]
    assert len(one) == len(all_ten) == len(squares)
    for (label, square), (label_1, image), (label_10, views) in zip(squares, one, all_ten, strict=True):
        assert label == label_1 == label_10
        wanted = oracle(square, corners[2], 0, nothing, mean_of(store, how), 1.0)
        assert np.abs(image.numpy() - wanted).max() < 1e-3
        for view, (corner, flip) in zip(views.numpy(), ten, strict=True):
            assert np.abs(view - oracle(square, corner, flip, nothing, mean_of(store, how), 1.0)).max() < 1e-3


@pytest.fixture(scope="module")
def many_draws(stores: dict[str, Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets (n, 2), flips (n,), shifts (n, 3) of a few thousand images."""
    store = Store.open(stores["ppm"])
    graph = train_graph(store, "train", 32, CPU, 11, Augmentation(), 2)
    runs = [[out.as_array() for out in graph.run()[2:]] for _ in range(250)]
    offsets, flips, shifts = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    return offsets, flips, shifts


def test_windows_are_uniform_over_33_by_33(many_draws: tuple[np.ndarray, ...]) -> None:
    offsets = many_draws[0]
    n = len(offsets)
    assert offsets.min() == 0 and offsets.max() == 32
    for axis in range(2):
        counts = np.bincount(offsets[:, axis], minlength=33)
        chi2 = ((counts - n / 33) ** 2 / (n / 33)).sum()
        assert chi2 < 62.5  # 99.9 % quantile at 32 degrees of freedom
    table = np.zeros((33, 33))
    np.add.at(table, tuple(offsets.T), 1)
    chi2 = ((table - n / 1089) ** 2 / (n / 1089)).sum()
    assert abs(chi2 - 1088) < 3.3 * np.sqrt(2 * 1088)  # rows and columns are independent


def test_half_of_the_images_are_flipped(many_draws: tuple[np.ndarray, ...]) -> None:
    flips = many_draws[1]
    assert set(np.unique(flips)) == {0, 1}
    assert abs(flips.mean() - 0.5) < 3.3 * 0.5 / np.sqrt(len(flips))
    assert abs(np.corrcoef(flips[:-1], flips[1:])[0, 1]) < 3.3 / np.sqrt(len(flips))


def test_colour_offsets_have_the_covariance_of_the_pixels(
    stores: dict[str, Path], many_draws: tuple[np.ndarray, ...]
) -> None:
    shifts, stats = many_draws[2].astype(np.float64), Store.open(stores["ppm"]).colour()
    wanted = 0.1**2 * np.array(stats.covariance)  # P diag(0.1² λ) Pᵀ
    found = np.cov(shifts.T)
    spread = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / len(shifts))
    assert (np.abs(found - wanted) < 4 * spread).all()
    assert (np.abs(shifts.mean(0)) < 4 * np.sqrt(np.diag(wanted) / len(shifts))).all()


def test_two_readings_of_the_noise_formula(stores: dict[str, Path]) -> None:
    stats = Store.open(stores["jpeg"]).colour()
    vectors, variances = np.array(stats.eigenvectors), np.array(stats.eigenvalues)
    alpha = np.array([0.7, -1.3, 0.4])
    by_stdev = vectors @ (0.1 * alpha * np.sqrt(variances))
    unit_pixels = vectors @ (0.1 * alpha * variances / 255**2)  # the paper's p λ α, for pixels in [0, 1]
    assert np.allclose(noise_matrix(stats, "stdev", 0.1) @ alpha, by_stdev, rtol=1e-5)
    assert np.allclose(noise_matrix(stats, "eigenvalue", 0.1) @ alpha, 255 * unit_pixels, rtol=1e-5)
    assert not noise_matrix(stats, "off", 0.1).any()


def test_window_and_flip_are_shared_by_neighbours_but_noise_is_not(stores: dict[str, Path]) -> None:
    graph = train_graph(Store.open(stores["jpeg"]), "train", 16, CPU, 5, Augmentation(shared_by=4), 2)
    runs = [[out.as_array() for out in graph.run()[2:]] for _ in range(20)]
    offsets, flips, shifts = (np.stack(parts) for parts in zip(*runs, strict=True))
    assert (offsets.reshape(20, 4, 4, 2) == offsets.reshape(20, 4, 4, 2)[:, :, :1]).all()
    assert (flips.reshape(20, 4, 4) == flips.reshape(20, 4, 4)[:, :, :1]).all()
    assert len(np.unique(offsets[:, ::4].reshape(-1, 2), axis=0)) > 60
    assert len(np.unique(shifts.reshape(-1, 3), axis=0)) == 20 * 16


@pytest.mark.parametrize(
    "wrong", [{"mean": "median"}, {"colour": "hue"}, {"strength": -1.0}, {"divisor": 0.0}, {"shared_by": 0}]
)
def test_a_choice_that_does_not_exist_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="expected"):
        replace(Augmentation(), **wrong)
