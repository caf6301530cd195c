"""Images of a stream equal the formula of pipeline.augment, with the C kernel and without it.

tests/pipeline/augment_formula.py computes the expected images in float64.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.augment import Augmentation, noise_matrix
from pipeline.loader import eval_loader, train_loader
from pipeline.sampling import draw_params
from prep.console import UserError
from prep.store.manifest import Store, StoreError
from tests.conftest import Build
from tests.pipeline.augment_formula import (
    expected_training_images,
    formula,
    formula_shift,
    mean_image,
    served,
    stored_squares,
    ten_views,
)

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


def name_of(augmentation: Augmentation) -> str:
    return f"{augmentation.mean}-{augmentation.colour}-{augmentation.divisor}-{augmentation.shared_by}"


@pytest.mark.parametrize("augmentation", CHOICES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("engine")
def test_training_images_equal_the_formula(stores: dict[str, Path], kind: str, augmentation: Augmentation) -> None:
    store = Store.open(stores[kind])
    compared = 0
    images = served(train_loader(store.root, 10, seed=3, augmentation=augmentation))
    for (label, image), (expected_label, expected_image) in zip(
        images, expected_training_images(store, augmentation, 3, 10), strict=True
    ):
        assert label == expected_label
        assert np.abs(image - expected_image).max() < TOLERANCE
        compared += 1
    assert compared == 30


@pytest.mark.parametrize(("kind", "mean"), [("jpeg", "aligned"), ("ppm", "none"), ("ppm-whole", "none")])
@pytest.mark.usefixtures("engine")
def test_every_crop_is_at_the_offset_that_was_drawn(stores: dict[str, Path], kind: str, mean: str) -> None:
    """All 33 offsets occur in each direction. DALI gets an offset as a fraction, but must crop at the exact pixel."""
    store, augmentation = Store.open(stores[kind]), Augmentation(mean=mean, colour="off")
    draws = [draw_params(1, epoch, 0, 30, 32).offset for epoch in range(6)]
    assert all(set(column) == set(range(33)) for column in np.concatenate(draws).T.tolist())
    images = served(train_loader(store.root, 30, seed=1, augmentation=augmentation), 6)
    for (_, image), (_, expected_image) in zip(
        images, expected_training_images(store, augmentation, 1, 30, 6), strict=True
    ):
        assert np.abs(image - expected_image).max() < TOLERANCE


@pytest.mark.parametrize(
    ("side", "options"),
    [(224, ("--format", "ppm", "--keep-aspect")), (225, ("--format", "ppm")), (227, ("--keep-aspect",))],
)
@pytest.mark.usefixtures("engine")
def test_crops_of_stores_of_other_sides_equal_the_formula(
    photo_folder: Path, build: Build, side: int, options: tuple[str, ...]
) -> None:
    """Records of 224 px allow one crop offset in each direction. Records of 225 and 227 px allow 2 and 4 offsets."""
    store = Store.open(build(photo_folder, "--split", "train", "--side", str(side), *options))
    augmentation = Augmentation(mean="aligned")
    images = served(train_loader(store.root, 10, seed=9, augmentation=augmentation))
    for (label, image), (expected_label, expected_image) in zip(
        images, expected_training_images(store, augmentation, 9, 10), strict=True
    ):
        assert label == expected_label
        assert np.abs(image - expected_image).max() < TOLERANCE
    whole = served(eval_loader(store.root, 4, views="square", split="train", augmentation=augmentation))
    for (_, image), (_, square) in zip(itertools.islice(whole, 6), stored_squares(store, "train"), strict=False):
        assert np.abs(image - (square - mean_image(store.root)).transpose(2, 0, 1)).max() < TOLERANCE
    views = served(eval_loader(store.root, 4, views=10, split="train", augmentation=augmentation))
    for (_, ten), (_, square) in zip(itertools.islice(views, 6), stored_squares(store, "train"), strict=False):
        for view, (corner, flip) in zip(ten, ten_views(store), strict=True):
            expected_image = formula(square, corner, flip, 0.0, "aligned", store)
            assert np.abs(view - expected_image).max() < TOLERANCE


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("engine")
def test_evaluation_views_equal_the_formula(stores: dict[str, Path], kind: str, mean: str) -> None:
    """The images come in the order of the store. The mean and the divisor of the Augmentation are applied."""
    store, augmentation = Store.open(stores[kind]), Augmentation(mean=mean, strength=9.0, divisor=3.0, shared_by=5)
    squares = stored_squares(store, "val")
    one = list(served(eval_loader(store.root, 5, augmentation=augmentation)))
    all_ten = list(served(eval_loader(store.root, 5, views=10, augmentation=augmentation)))
    assert len(one) == len(all_ten) == len(squares)
    crops = ten_views(store)
    for (label, square), (label_1, image), (label_10, views) in zip(squares, one, all_ten, strict=True):
        assert label == label_1 == label_10
        for number, (view, (corner, flip)) in enumerate(zip(views, crops, strict=True)):
            expected_image = formula(square, corner, flip, 0.0, mean, store, divisor=3.0)
            assert np.abs(view - expected_image).max() < TOLERANCE
            assert number != 2 or np.abs(image - expected_image).max() < TOLERANCE


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
def test_squares_equal_the_central_square_minus_the_mean(
    stores: dict[str, Path], kind: str, mean: str, layout: str
) -> None:
    """The test compares all 256 × 256 × 3 values of each central square."""
    store, augmentation = Store.open(stores[kind]), Augmentation(mean=mean, strength=9.0, divisor=3.0)
    rgb = {"channel": store.color_stats("train").mean_rgb, "none": (0, 0, 0)}
    subtracted = np.array(rgb[mean]) if mean in rgb else mean_image(store.root)
    loader = eval_loader(store.root, 5, views="square", augmentation=augmentation, layout=layout)
    squares = stored_squares(store, "val")
    for (label, square), (served_label, image) in zip(squares, served(loader), strict=True):
        expected_image = (square - subtracted) / 3.0
        if layout == "NCHW":
            expected_image = expected_image.transpose(2, 0, 1)
        assert label == served_label and image.shape == expected_image.shape
        assert np.abs(image - expected_image).max() < TOLERANCE


def test_evaluation_subtracts_the_mean_of_the_training_split(stores: dict[str, Path]) -> None:
    with (
        eval_loader(stores["jpeg"], 8) as plain,
        eval_loader(stores["jpeg"], 8, augmentation=Augmentation("none")) as raw,
    ):
        difference = next(iter(raw)).images - next(iter(plain)).images
    mean = Store.open(stores["jpeg"]).color_stats("train").mean_rgb
    assert np.allclose(difference.mean((0, 2, 3)).numpy(), mean, atol=1e-3)
    assert not np.allclose(mean, Store.open(stores["jpeg"]).color_stats("val").mean_rgb, atol=1e-3)


def test_the_divisor_of_evaluation_is_the_divisor_of_training_unless_it_has_its_own(stores: dict[str, Path]) -> None:
    """Without noise, the values of an image have the same scale in training and in evaluation."""
    scaled = {
        (divisor, own): batches(stores["ppm"], "centre", augmentation=Augmentation("none", "off", 0, divisor, 1, own))
        for divisor, own in ((1.0, None), (64.0, None), (64.0, 1.0), (1.0, 64.0))
    }
    plain = scaled[1.0, None]
    for settings, divisor in {(64.0, None): 64.0, (64.0, 1.0): 1.0, (1.0, 64.0): 64.0}.items():
        assert all(torch.equal(a / divisor, b) for a, b in zip(plain, scaled[settings], strict=True)), settings
    training = batches(stores["ppm"], "train", augmentation=Augmentation("none", "off", 0, 64.0))
    assert 0.1 < float(training[0].std() / scaled[64.0, None][0].std()) < 10


@pytest.mark.parametrize("mean", ["image", "aligned"])
def test_a_mirrored_view_has_a_mirrored_mean_only_if_the_mean_is_aligned(stores: dict[str, Path], mean: str) -> None:
    """Views 6 to 10 are the mirror images of views 1 to 5. The test compares views 3 and 8, the centre crops."""
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
    """Return images of the first two batches. A batch has 8 images, or the ten views of one image."""
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
def test_nhwc_is_nchw_transposed(stores: dict[str, Path], loader: str, mean: str) -> None:
    augmentation = Augmentation(mean=mean, divisor=1.1)
    planes = batches(stores["ppm-whole"], loader, augmentation=augmentation)
    pixels = batches(stores["ppm-whole"], loader, augmentation=augmentation, layout="NHWC")
    for a, b in zip(planes, pixels, strict=True):
        assert a.shape[-3:] == (3, 224, 224) and b.shape[-3:] == (224, 224, 3) and b.is_contiguous()
        assert torch.equal(a, b.movedim(-1, -3))


@pytest.mark.parametrize(("mean", "layout"), [("channel", "NCHW"), ("aligned", "NHWC")])
@pytest.mark.parametrize("loader", LOADERS)
def test_half_precision_is_float32_rounded(stores: dict[str, Path], loader: str, layout: str, mean: str) -> None:
    """bfloat16 pixels equal the float32 pixels, rounded to bfloat16 by torch.

    float16 pixels differ from the float32 pixels, rounded to float16 by NumPy, by at most the distance to the next
    float16 number.
    """
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


def test_the_noise_matrix_has_both_readings_of_the_paper(stores: dict[str, Path]) -> None:
    store = Store.open(stores["jpeg"])
    z = np.array([0.7, -1.3, 0.4])
    for colour, strength in itertools.product(("stdev", "eigenvalue", "off"), (0.1, 0.7)):
        shift = noise_matrix(store.color_stats(), colour, strength) @ z
        augmentation = Augmentation(colour=colour, strength=strength)
        assert np.allclose(shift, formula_shift(store, augmentation, z), rtol=1e-5)


def test_colour_noise_has_the_covariance_of_the_pixels(stores: dict[str, Path]) -> None:
    stats = Store.open(stores["ppm"]).color_stats()
    covariance = 0.1**2 * np.array(stats.covariance)  # the covariance is P diag(0.1² λ) Pᵀ
    shifts = draw_params(11, 0, 0, 8000, 32).normal @ noise_matrix(stats, "stdev", 0.1).T
    spread = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / len(shifts))
    assert (np.abs(np.cov(shifts.T) - covariance) < 4 * spread).all()
    assert (np.abs(shifts.mean(0)) < 4 * np.sqrt(np.diag(covariance) / len(shifts))).all()


def test_an_error_about_missing_statistics_names_the_command_that_writes_them(photo_folder: Path, build: Build) -> None:
    store = build(photo_folder, "--split", "train")
    (store / "train" / "mean_image.npy").unlink()
    for loader in (train_loader, eval_loader):
        with pytest.raises(StoreError, match="mean_image"):
            loader(store, 4, split="train", augmentation=Augmentation(mean="aligned"))
    (store / "train" / "colour.json").unlink()
    with pytest.raises(StoreError, match="alexprep pca-stats"):
        train_loader(store, 4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mean": "median"},
        {"colour": "hue"},
        {"strength": -1.0},
        {"divisor": 0.0},
        {"eval_divisor": 0.0},
        {"shared_by": 0},
    ],
)
def test_an_augmentation_value_that_is_not_allowed_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(UserError, match="expected"):
        replace(Augmentation(), **arguments)


@pytest.mark.parametrize("arguments", [{"layout": "CHWN"}, {"dtype": "float64"}])
def test_an_unknown_layout_or_dtype_is_refused(stores: dict[str, Path], arguments: dict[str, str]) -> None:
    for loader in (train_loader, eval_loader):
        with pytest.raises(UserError, match="expected one of"):
            loader(stores["jpeg"], 4, **arguments)


def test_images_smaller_than_a_crop_are_refused(photo_folder: Path, build: Build) -> None:
    small = build(photo_folder, "--side", "200", "--split", "train")
    with pytest.raises(UserError, match="200 px, which is less than a crop of 224 px"):
        train_loader(small, 4)
