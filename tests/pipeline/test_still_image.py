"""Images that are preprocessed one by one, outside of the stream, equal the images of the stream, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import MEANS, Augmentation
from pipeline.loader import eval_loader
from pipeline.still_image import EvalTransform, StoredImages, read_photograph
from prep.console import UserError
from prep.store.manifest import Settings, Store

DIVISOR = 58.4


def transform_of(store: Store, mean: str) -> EvalTransform:
    return EvalTransform(store.settings, mean, store.color_stats().mean_rgb, store.mean_image(), DIVISOR)


@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm-whole"])
def test_a_photograph_is_prepared_as_its_record_in_a_store(
    stores: dict[str, Path], photo_folder: Path, kind: str
) -> None:
    store = Store.open(stores[kind])
    with StoredImages(store, "val") as images:
        assert len(images) == 12
        for number in range(12):  # one of the images is grey, one is CMYK, and one is a PNG
            source = images.records.source(number)
            (path,) = photo_folder.rglob(Path(source).name)
            square, orientation, _ = read_photograph(path, store.settings)
            assert square.shape == (256, 256, 3) and orientation == 1
            assert np.array_equal(square, images[number])
            assert images.records.key(number) == f"{number:08d}" and source in images.records.location(number)


@pytest.mark.parametrize("views", [1, 10])
def test_crops_equal_those_of_the_stream(stores: dict[str, Path], views: int) -> None:
    for mean in MEANS:
        store = Store.open(stores["ppm-whole"])
        augmentation = Augmentation(mean=mean, divisor=DIVISOR)
        loader = eval_loader(store.root, 12, views=views, augmentation=augmentation, threads=1)
        with loader, StoredImages(store, "val") as images:
            (batch,) = loader
            assert [images.label(k) for k in range(12)] == batch.labels.tolist()
            for number in (0, 7, 11):
                crops = torch.from_numpy(transform_of(store, mean).crops(images[number], views))
                assert crops.dtype == torch.float32 and crops.is_contiguous()
                assert torch.equal(crops, batch.images[number].reshape(crops.shape)), mean


SETTINGS = Settings(side_px=256, keep_aspect=True, format="ppm", quality=90, filter="area", seed=0)


def test_exif_orientation_is_reported_and_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[:128] = 200
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    square, orientation, _ = read_photograph(tmp_path / "a.jpg", SETTINGS)
    assert orientation == 6 and square[:100].mean() > 190 and square[156:].mean() < 10


@pytest.mark.parametrize(
    ("name", "message"), [("none.jpg", "No such file"), ("text.jpg", "not an image"), ("long.png", "would become")]
)
def test_a_file_that_cannot_be_prepared_is_refused_with_its_path(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "text.jpg").write_text("not an image at all")
    Image.new("L", (60_000, 20)).save(tmp_path / "long.png")
    with pytest.raises(UserError, match=message) as error:
        read_photograph(tmp_path / name, SETTINGS)
    assert name in str(error.value)
