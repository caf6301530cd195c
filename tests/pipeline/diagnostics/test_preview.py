"""The command `alexstream preview`: images in the cells of its contact sheet."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.augment import Augmentation
from pipeline.cli import main
from pipeline.diagnostics.preview import AUGMENTED
from pipeline.sampling import choose_regions, draw_step
from prep.store.manifest import Store
from tests.pipeline.augment_formula import stored_images


def test_preview_shows_stored_images_augmentations_and_stronger_noise(stores: dict[str, Path], tmp_path: Path) -> None:
    sheets = {}
    for kind in ("jpeg", "ppm", "ppm-whole"):
        out = tmp_path / f"{kind}.png"
        result = CliRunner().invoke(main, ["preview", str(out), "--store", str(stores[kind]), "--rows", "3"])
        assert result.exit_code == 0, result.output
        sheets[kind] = np.asarray(Image.open(out)).astype(float)
    cell = 224 + 6
    classes_px = 170
    assert sheets["jpeg"].shape == (34 + 3 * cell, classes_px + 6 + (AUGMENTED + 2) * cell, 3)
    for row in range(3):  # the name of the class is at the left
        name = sheets["ppm"][34 + row * cell :][:224, :classes_px]
        assert (name < 100).any() and (name[:, -10:] == 255).all()
    assert np.abs(sheets["jpeg"] - sheets["ppm"]).mean() < 3  # both sheets show the same crops of the same images
    for row in range(3):
        cells = [
            sheets["ppm"][34 + row * cell :][:224, classes_px + 6 + column * cell :][:, :224]
            for column in range(AUGMENTED + 2)
        ]
        assert all(np.abs(a - b).mean() > 0.5 for a, b in pairwise(cells[1:]))
        last, stronger = cells[AUGMENTED], cells[AUGMENTED + 1]
        inside = ((stronger > 1) & (stronger < 254)).all(2)
        if inside.sum() > 500:  # where no pixel is clipped, the two cells differ by a constant RGB offset
            assert (stronger - last)[inside].std(0).max() < 1.5


def test_the_preview_of_a_preset_without_noise_shows_resized_regions(stores: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "resnet.png"
    options = ["--store", str(stores["ppm-whole"]), "--rows", "2", "--preset", "resnet"]
    result = CliRunner().invoke(main, ["preview", str(out), *options])
    assert result.exit_code == 0, result.output
    sheet, cell = np.asarray(Image.open(out)), 224 + 6
    assert sheet.shape == (34 + 2 * cell, 170 + 6 + (AUGMENTED + 1) * cell, 3)
    settings = Augmentation.preset("resnet")
    draws, numbers, _ = draw_step(settings, 0, 0, 2, 2, 32)
    images = stored_images(Store.open(stores["ppm-whole"]), "train")
    for row, (_, image) in enumerate(images[:2]):
        sizes = np.array([[image.height, image.width]], np.int32)
        top, left, height, width = choose_regions(numbers[row : row + 1], sizes, settings.ratio)[0].tolist()
        rows = image.crop((left, top, left + width, top + height)).resize((224, height), Image.Resampling.BILINEAR)
        window = np.asarray(rows.resize((224, 224), Image.Resampling.BILINEAR))[:, :: -1 if draws.flip[row] else 1]
        shown = sheet[34 + row * cell :][:224, 170 + 6 + 3 * cell :][:, :224]
        assert np.array_equal(shown, window)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/out.png", "there is no folder"),
        ("a.xyz", "Name the file a.png"),
        ("a", "Name the file a.png"),
        (".", "is a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_a_wrong_argument(
    store: Path, tmp_path: Path, name: str, message: str
) -> None:
    result = CliRunner().invoke(main, ["preview", str(tmp_path / name), "--store", str(store)])
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
