"""The stream, image by image, against a NumPy oracle: the formula of pipeline.augment in float64.

The oracle takes the records from the LMDB in the order of their keys, decodes them with Pillow, and asks pipeline.sampling
alone which record has which place and what chance decided for it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import Augmentation, noise_matrix
from pipeline.engines import kernels
from pipeline.loader import eval_loader, train_loader
from pipeline.sampling import draw_params, epoch_permutation
from prep.console import UserError
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Store, StoreError
from tests.conftest import Build

KINDS = ["jpeg", "jpeg-whole", "ppm", "ppm-whole"]
MEANS = ["channel", "image", "aligned", "none"]
CHOICES = [
    Augmentation(),
    Augmentation(mean="image", divisor=1.1, shared_by=4),
    Augmentation(mean="aligned", divisor=1.1, strength=0.3),
    Augmentation(mean="none", colour="eigenvalue", strength=2.0),
    Augmentation(mean="channel", colour="off", divisor=2.5, shared_by=32),
]
TOLERANCE = 1e-3  # grey levels


@pytest.fixture(params=["kernel", "graph"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both engines: the graph is what a GPU runs, and a CPU where no compiler was there."""
    if request.param == "graph":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("no C compiler was there at installation")
    return request.param


def stored_squares(store: Store, split: str) -> list[tuple[int, np.ndarray]]:
    """(label, central square) of every record, in the order of their keys."""
    return list(_stored_squares(store.root, split))


@cache
def _stored_squares(root: Path, split: str) -> list[tuple[int, np.ndarray]]:
    store, squares = Store.open(root), []
    side = store.settings.side_px
    for path in store.shard_paths(split):
        for _, value in lmdb_shard.read(Path(path)):
            datum = Datum.decode(value)
            picture = np.asarray(Image.open(io.BytesIO(datum.data)))
            top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
            squares.append((datum.label, picture[top : top + side, left : left + side].astype(np.float64)))
    return squares


mean_image = cache(lambda root: Store.open(root).mean_image().astype(np.float64))


def formula(
    square: np.ndarray,
    offset: tuple[int, int],
    flip: int,
    shift: np.ndarray | float,
    mean: str,
    store: Store,
    divisor: float = 1.0,
) -> np.ndarray:
    """float64 (3, 224, 224): (S[y + i, x + j′] + shift − mean) / divisor, as the docstring has it."""
    (y, x), m = offset, (store.settings.side_px - 224) // 2
    window, mirror = np.s_[y : y + 224, x : x + 224], np.s_[:, :: -1 if flip else 1]
    if mean == "image":
        subtracted = mean_image(store.root)[m : m + 224, m : m + 224]
    elif mean == "aligned":
        subtracted = mean_image(store.root)[window][mirror]
    else:
        subtracted = np.array(store.color_stats().mean_rgb if mean == "channel" else [0.0, 0.0, 0.0])
    return ((square[window][mirror] + shift - subtracted) / divisor).transpose(2, 0, 1)


def formula_shift(store: Store, how: Augmentation, z: np.ndarray) -> np.ndarray:
    """P·diag(σ)·z from the covariance of the pixels alone: its eigenvalues are variances on 0..255."""
    stats = store.color_stats()
    vectors, variances = np.array(stats.eigenvectors), np.array(stats.eigenvalues)
    if how.colour == "off":
        return np.zeros(3)
    if how.colour == "stdev":
        return vectors @ (how.strength * np.sqrt(variances) * z)
    return 255 * (vectors @ (how.strength * variances / 255**2 * z))  # the paper's p λ α, for pixels in [0, 1]


def expected(
    store: Store, how: Augmentation, seed: int, batch_size: int, epochs: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """(label, image) of the training stream from its beginning."""
    squares, room = stored_squares(store, "train"), store.settings.side_px - 224
    for epoch in range(epochs):
        order = epoch_permutation(len(squares), seed, epoch)
        for step in range(len(squares) // batch_size):
            draws = draw_params(seed, epoch, step, batch_size, room, how.shared_by)
            for k, number in enumerate(order[step * batch_size : (step + 1) * batch_size]):
                label, square = squares[number]
                shift = formula_shift(store, how, draws.normal[k])
                offset = tuple(draws.offset[k].tolist())
                yield label, formula(square, offset, int(draws.flip[k]), shift, how.mean, store, how.divisor)


def served(loader, epochs: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    with loader:
        for _ in range(epochs):
            for images, labels in loader:
                for image, label in zip(images, labels, strict=True):
                    yield int(label), image.numpy()


def name(how: Augmentation) -> str:
    return f"{how.mean}-{how.colour}-{how.divisor}-{how.shared_by}"


@pytest.mark.parametrize("how", CHOICES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("engine")
def test_training_images_equal_the_formula(stores: dict[str, Path], kind: str, how: Augmentation) -> None:
    store = Store.open(stores[kind])
    compared = 0
    found = served(train_loader(store.root, 10, seed=3, augmentation=how))
    for (label, image), (right, wanted) in zip(found, expected(store, how, 3, 10), strict=True):
        assert label == right
        assert np.abs(image - wanted).max() < TOLERANCE
        compared += 1
    assert compared == 30


@pytest.mark.parametrize(("kind", "mean"), [("jpeg", "aligned"), ("ppm", "none"), ("ppm-whole", "none")])
@pytest.mark.usefixtures("engine")
def test_every_window_is_where_it_was_drawn(stores: dict[str, Path], kind: str, mean: str) -> None:
    """Each of the 33 offsets in each direction: positions that DALI is given as shares come back as whole pixels."""
    store, how = Store.open(stores[kind]), Augmentation(mean=mean, colour="off")
    draws = [draw_params(1, epoch, 0, 30, 32).offset for epoch in range(6)]
    assert all(set(column) == set(range(33)) for column in np.concatenate(draws).T.tolist())
    found = served(train_loader(store.root, 30, seed=1, augmentation=how), 6)
    for (_, image), (_, wanted) in zip(found, expected(store, how, 1, 30, 6), strict=True):
        assert np.abs(image - wanted).max() < TOLERANCE


@pytest.mark.parametrize(
    ("side", "options"),
    [(224, ("--format", "ppm", "--keep-aspect")), (225, ("--format", "ppm")), (227, ("--keep-aspect",))],
)
@pytest.mark.usefixtures("engine")
def test_other_sides_have_other_windows(photo_folder: Path, build: Build, side: int, options: tuple[str, ...]) -> None:
    """Odd rooms, and none at all."""
    store = Store.open(build(photo_folder, "--split", "train", "--side", str(side), *options))
    how = Augmentation(mean="aligned")
    found = served(train_loader(store.root, 10, seed=9, augmentation=how))
    for (label, image), (right, wanted) in zip(found, expected(store, how, 9, 10), strict=True):
        assert label == right
        assert np.abs(image - wanted).max() < TOLERANCE
    whole = served(eval_loader(store.root, 4, views="square", split="train", augmentation=how))
    for (_, image), (_, square) in zip(itertools.islice(whole, 6), stored_squares(store, "train"), strict=False):
        assert np.abs(image - (square - mean_image(store.root)).transpose(2, 0, 1)).max() < TOLERANCE
    views = served(eval_loader(store.root, 4, views=10, split="train", augmentation=how))
    for (_, ten), (_, square) in zip(itertools.islice(views, 6), stored_squares(store, "train"), strict=False):
        for view, (corner, flip) in zip(ten, ten_windows(store), strict=True):
            wanted = formula(square, corner, flip, 0.0, "aligned", store)
            assert np.abs(view - wanted).max() < TOLERANCE


def ten_windows(store: Store) -> list[tuple[tuple[int, int], int]]:
    far = store.settings.side_px - 224
    corners = [(0, 0), (0, far), (far // 2, far // 2), (far, 0), (far, far)]
    return [(corner, flip) for flip in (0, 1) for corner in corners]


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("engine")
def test_views_of_evaluation_equal_the_formula(stores: dict[str, Path], kind: str, mean: str) -> None:
    """In the store's order; of the augmentation only the mean counts."""
    store, how = Store.open(stores[kind]), Augmentation(mean=mean, strength=9.0, divisor=3.0, shared_by=5)
    squares = stored_squares(store, "val")
    one = list(served(eval_loader(store.root, 5, augmentation=how)))
    all_ten = list(served(eval_loader(store.root, 5, views=10, augmentation=how)))
    assert len(one) == len(all_ten) == len(squares)
    windows = ten_windows(store)
    for (label, square), (label_1, image), (label_10, views) in zip(squares, one, all_ten, strict=True):
        assert label == label_1 == label_10
        for number, (view, (corner, flip)) in enumerate(zip(views, windows, strict=True)):
            wanted = formula(square, corner, flip, 0.0, mean, store)
            assert np.abs(view - wanted).max() < TOLERANCE
            assert number != 2 or np.abs(image - wanted).max() < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "mean", "layout"),
    [
        ("jpeg", "channel", "NCHW"),
        ("jpeg-whole", "image", "NCHW"),
        ("jpeg-whole", "aligned", "NHWC"),
        ("ppm", "aligned", "NCHW"),
        ("ppm-whole", "none", "NHWC"),
        ("ppm-whole", "image", "NHWC"),
    ],
)
@pytest.mark.usefixtures("engine")
def test_squares_are_whole_minus_the_whole_mean(stores: dict[str, Path], kind: str, mean: str, layout: str) -> None:
    """All 256 × 256 × 3 of the central square; a mean image is all of itself, a mean of channels one number each."""
    store, how = Store.open(stores[kind]), Augmentation(mean=mean, strength=9.0, divisor=3.0)
    rgb = {"channel": store.color_stats("train").mean_rgb, "none": (0, 0, 0)}
    subtracted = np.array(rgb[mean]) if mean in rgb else mean_image(store.root)
    loader = eval_loader(store.root, 5, views="square", augmentation=how, layout=layout)
    squares = stored_squares(store, "val")
    for (label, square), (found_label, found) in zip(squares, served(loader), strict=True):
        wanted = square - subtracted
        assert label == found_label and found.shape == ((3, 256, 256) if layout == "NCHW" else (256, 256, 3))
        assert np.abs(found - (wanted.transpose(2, 0, 1) if layout == "NCHW" else wanted)).max() < TOLERANCE


def test_means_of_evaluation_are_the_training_splits(stores: dict[str, Path]) -> None:
    with (
        eval_loader(stores["jpeg"], 8) as plain,
        eval_loader(stores["jpeg"], 8, augmentation=Augmentation("none")) as raw,
    ):
        difference = next(iter(raw)).images - next(iter(plain)).images
    mean = Store.open(stores["jpeg"]).color_stats("train").mean_rgb
    assert np.allclose(difference.mean((0, 2, 3)).numpy(), mean, atol=1e-3)
    assert not np.allclose(mean, Store.open(stores["jpeg"]).color_stats("val").mean_rgb, atol=1e-3)


@pytest.mark.parametrize("mean", ["image", "aligned"])
def test_a_mirrored_picture_has_a_mirrored_mean_only_where_it_is_aligned(stores: dict[str, Path], mean: str) -> None:
    """Of the ten views, the sixth to tenth mirror the first to fifth."""
    store = Store.open(stores["ppm"])
    m = store.mean_image()[16:240, 16:240].transpose(2, 0, 1)
    assert np.abs(m - m[:, :, ::-1]).max() > 1
    with eval_loader(store.root, 4, views=10, augmentation=Augmentation(mean=mean)) as loader:
        views = next(iter(loader)).images.numpy()
    plain, mirrored = views[:, 2], views[:, 7, :, :, ::-1]
    if mean == "aligned":
        assert np.abs(plain - mirrored).max() < TOLERANCE
    else:
        assert np.abs((mirrored - plain) - (m - m[:, :, ::-1])).max() < TOLERANCE


def batches(store: Path, loader: str, **options) -> list[torch.Tensor]:
    """One batch of 8 images or views, and what follows it."""
    if loader == "train":
        stream = train_loader(store, 8, seed=4, **options)
    elif loader == "centre":
        stream = eval_loader(store, 8, **options)
    else:
        stream = eval_loader(store, 1, views=10, **options)
    with stream:
        return [batch.images for batch in itertools.islice(stream, 2)]


LOADERS = ["train", "centre", "ten views"]


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.usefixtures("engine")
def test_one_layout_is_the_other_transposed(stores: dict[str, Path], loader: str, mean: str) -> None:
    how = Augmentation(mean=mean, divisor=1.1)
    planes = batches(stores["ppm-whole"], loader, augmentation=how)
    pixels = batches(stores["ppm-whole"], loader, augmentation=how, layout="NHWC")
    for a, b in zip(planes, pixels, strict=True):
        assert a.shape[-3:] == (3, 224, 224) and b.shape[-3:] == (224, 224, 3) and b.is_contiguous()
        assert torch.equal(a, b.movedim(-1, -3))


@pytest.mark.parametrize(("mean", "layout"), [("channel", "NCHW"), ("aligned", "NHWC")])
@pytest.mark.parametrize("loader", LOADERS)
def test_half_precision_is_float32_rounded(stores: dict[str, Path], loader: str, layout: str, mean: str) -> None:
    """bfloat16 as torch rounds, float16 to one unit in its last place."""
    options = {"augmentation": Augmentation(mean=mean, divisor=1.1), "layout": layout}
    whole = batches(stores["jpeg"], loader, **options)
    brain = batches(stores["jpeg"], loader, dtype="bfloat16", **options)
    half = batches(stores["jpeg"], loader, dtype="float16", **options)
    for a, b, c in zip(whole, brain, half, strict=True):
        assert (a.dtype, b.dtype, c.dtype) == (torch.float32, torch.bfloat16, torch.float16)
        assert torch.equal(b, a.to(torch.bfloat16))
        rounded = a.numpy().astype(np.float16)
        apart = np.abs(c.numpy().astype(np.float32) - rounded.astype(np.float32))
        assert (apart <= np.spacing(np.abs(rounded)).astype(np.float32)).all()
        assert (c.numpy() == rounded).mean() > 0.95


def test_two_readings_of_the_noise_formula(stores: dict[str, Path]) -> None:
    store = Store.open(stores["jpeg"])
    z = np.array([0.7, -1.3, 0.4])
    for colour, strength in itertools.product(("stdev", "eigenvalue", "off"), (0.1, 0.7)):
        found = noise_matrix(store.color_stats(), colour, strength) @ z
        assert np.allclose(found, formula_shift(store, Augmentation(colour=colour, strength=strength), z), rtol=1e-5)


def test_colour_offsets_have_the_covariance_of_the_pixels(stores: dict[str, Path]) -> None:
    stats = Store.open(stores["ppm"]).color_stats()
    wanted = 0.1**2 * np.array(stats.covariance)  # P diag(0.1² λ) Pᵀ
    shifts = draw_params(11, 0, 0, 8000, 32).normal @ noise_matrix(stats, "stdev", 0.1).T
    spread = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / len(shifts))
    assert (np.abs(np.cov(shifts.T) - wanted) < 4 * spread).all()
    assert (np.abs(shifts.mean(0)) < 4 * np.sqrt(np.diag(wanted) / len(shifts))).all()


def test_without_statistics_the_stream_says_how_to_write_them(photo_folder: Path, build: Build) -> None:
    store = build(photo_folder, "--split", "train")
    (store / "train" / "mean_image.npy").unlink()
    for loader in (train_loader, eval_loader):
        with pytest.raises(StoreError, match="mean_image"):
            loader(store, 4, split="train", augmentation=Augmentation(mean="aligned"))
    (store / "train" / "colour.json").unlink()
    with pytest.raises(StoreError, match="alexprep pca-stats"):
        train_loader(store, 4)


@pytest.mark.parametrize(
    "wrong", [{"mean": "median"}, {"colour": "hue"}, {"strength": -1.0}, {"divisor": 0.0}, {"shared_by": 0}]
)
def test_a_choice_that_does_not_exist_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="expected"):
        replace(Augmentation(), **wrong)


@pytest.mark.parametrize("wrong", [{"layout": "CHWN"}, {"dtype": "float64"}])
def test_a_layout_or_dtype_that_does_not_exist_is_refused(stores: dict[str, Path], wrong: dict[str, str]) -> None:
    for loader in (train_loader, eval_loader):
        with pytest.raises(UserError, match="expected one of"):
            loader(stores["jpeg"], 4, **wrong)


def test_pictures_smaller_than_the_window_are_refused(photo_folder: Path, build: Build) -> None:
    small = build(photo_folder, "--side", "200", "--split", "train")
    with pytest.raises(UserError, match="200 px, a crop is 224 px"):
        train_loader(small, 4)
