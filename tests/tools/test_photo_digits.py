"""Tests of the demo's data set: layout and unusual files as in ILSVRC, the same files for a seed, correct labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from prep.console import UserError
from tools.photo_digits import HARD, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 digits: 150 training and 30 validation images."""
    out = tmp_path_factory.mktemp("digits") / "photographs"
    assert make_dataset(out, seed=5, limit=180) == (150, 30)
    return out


def test_layout_is_that_of_ilsvrc(dataset: Path) -> None:
    classes = sorted(path.name for path in (dataset / "train").iterdir())
    assert classes == [f"n{k:08d}" for k in range(10)]
    assert all(path.name.startswith(path.parent.name) for path in (dataset / "train").glob("*/*.JPEG"))
    assert len(list((dataset / "train").glob("*/*.JPEG"))) == 150 and len(list((dataset / "val").iterdir())) == 30
    rows = [line.split() for line in (dataset / "val.txt").read_text().splitlines()]
    assert [name for name, _ in rows] == sorted(path.name for path in (dataset / "val").iterdir())
    assert {label for _, label in rows} <= set(classes)


def test_sizes_orientations_and_file_formats_vary(dataset: Path) -> None:
    sizes, kinds = [], set()
    for path in sorted(dataset.glob("**/*.JPEG")):
        with Image.open(path) as picture:
            sizes.append(picture.size)
            kinds.add((picture.format, picture.mode))
    short = [min(size) for size in sizes]
    assert min(short) >= 200 and max(short) <= 500 and len(set(short)) > 60
    assert 50 < sum(width > height for width, height in sizes) < 130
    assert kinds == {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")}


def test_the_same_seed_gives_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "again", seed=5, limit=180)
    make_dataset(tmp_path / "other", seed=6, limit=180)
    for path in dataset.glob("**/*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(dataset)).read_bytes()
    names = [path.relative_to(dataset) for path in dataset.glob("val/*")]
    assert any((dataset / n).read_bytes() != (tmp_path / "other" / n).read_bytes() for n in names)


def test_the_label_is_the_digit_that_is_drawn(dataset: Path) -> None:
    """In most images, the central square correlates best with the mean digit of the image's label.

    For the comparison, the square is reduced to 10 × 10 px, of which the inner 8 × 8 px are used.
    """
    digits = load_digits()
    prototypes = np.stack([digits.images[digits.target == k].mean(0) for k in range(10)])
    correct = 0
    paths = sorted((dataset / "train").glob("*/*.JPEG"))
    for path in paths:
        picture = Image.open(path).convert("L")
        side = min(picture.size)
        left, top = (picture.size[0] - side) // 2, (picture.size[1] - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize((10, 10), Image.Resampling.BOX)
        cells = np.asarray(square, float)[1:9, 1:9]
        correlations = [np.corrcoef(cells.ravel(), prototype.ravel())[0, 1] for prototype in prototypes]
        correct += int(np.argmax(correlations)) == int(path.parent.name[1:])
    assert correct / len(paths) > 0.5  # random guesses give 0.1; digits off the middle correlate less


def test_the_hard_data_set_draws_each_training_digit_four_times_and_each_validation_digit_once(tmp_path: Path) -> None:
    out = tmp_path / "hard"
    assert make_dataset(out, seed=5, limit=60, difficulty=HARD) == (50 * HARD.copies, 10)
    contents = [path.read_bytes() for path in out.glob("train/*/*.JPEG")]
    assert len(contents) == len(set(contents)) == 200 and len(list((out / "val").iterdir())) == 10
    counts = [len(list(folder.iterdir())) for folder in (out / "train").iterdir()]
    assert all(count % HARD.copies == 0 for count in counts) and sum(counts) == 200


def test_an_existing_folder_is_refused(dataset: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        make_dataset(dataset)
