"""The demo's data set: ILSVRC's layout, its oddities, seeded, and truthful labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from prep.console import UserError
from tools.photo_digits import HARD, make


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "photographs"
    assert make(out, seed=5, limit=180) == (150, 30)
    return out


def test_layout_is_ilsvrcs(small: Path) -> None:
    classes = sorted(path.name for path in (small / "train").iterdir())
    assert classes == [f"n{k:08d}" for k in range(10)]
    assert all(path.name.startswith(path.parent.name) for path in (small / "train").glob("*/*.JPEG"))
    assert len(list((small / "train").glob("*/*.JPEG"))) == 150 and len(list((small / "val").iterdir())) == 30
    truth = (small / "val_ground_truth.txt").read_text().split()
    assert len(truth) == 30 and {int(number) for number in truth} <= set(range(1, 11))


def test_sizes_orientations_and_odd_files(small: Path) -> None:
    sizes, kinds = [], set()
    for path in sorted(small.glob("**/*.JPEG")):
        with Image.open(path) as picture:
            sizes.append(picture.size)
            kinds.add((picture.format, picture.mode))
    short = [min(size) for size in sizes]
    assert min(short) >= 200 and max(short) <= 500 and len(set(short)) > 60
    assert 50 < sum(width > height for width, height in sizes) < 130
    assert kinds == {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")}


def test_same_seed_same_bytes(small: Path, tmp_path: Path) -> None:
    make(tmp_path / "again", seed=5, limit=180)
    make(tmp_path / "other", seed=6, limit=180)
    for path in small.glob("**/*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(small)).read_bytes()
    names = [path.relative_to(small) for path in small.glob("val/*")]
    assert any((small / n).read_bytes() != (tmp_path / "other" / n).read_bytes() for n in names)


def test_the_label_is_the_digit_that_is_drawn(small: Path) -> None:
    """The bright part of each picture, shrunk to 8×8, correlates best with digits of its own label."""
    digits = load_digits()
    prototypes = np.stack([digits.images[digits.target == k].mean(0) for k in range(10)])
    right = 0
    paths = sorted((small / "train").glob("*/*.JPEG"))
    for path in paths:
        picture = Image.open(path).convert("L")
        side = min(picture.size)
        left, top = (picture.size[0] - side) // 2, (picture.size[1] - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize((10, 10), Image.Resampling.BOX)
        cells = np.asarray(square, float)[1:9, 1:9]
        scores = [np.corrcoef(cells.ravel(), one.ravel())[0, 1] for one in prototypes]
        right += int(np.argmax(scores)) == int(path.parent.name[1:])
    assert right / len(paths) > 0.5  # chance is a tenth; a few digits sit off the middle


def test_the_hard_kind_draws_each_training_digit_anew_and_no_validation_digit_twice(tmp_path: Path) -> None:
    out = tmp_path / "hard"
    assert make(out, seed=5, limit=60, how=HARD) == (50 * HARD.copies, 10)
    pictures = [path.read_bytes() for path in out.glob("train/*/*.JPEG")]
    assert len(pictures) == len(set(pictures)) == 200 and len(list((out / "val").iterdir())) == 10
    counts = [len(list(folder.iterdir())) for folder in (out / "train").iterdir()]
    assert all(count % HARD.copies == 0 for count in counts) and sum(counts) == 200


def test_a_folder_that_exists_is_left_alone(small: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        make(small)
