"""Reference images for the tests of the stream, computed by the formula of pipeline.augment in float64 NumPy.

This module reads the records from the LMDB in the order of their keys, and decodes them with Pillow. Only the epoch
permutation and the random parameters come from pipeline.sampling.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.augment import Augmentation
from pipeline.sampling import draw_params, epoch_permutation
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Store


def stored_images(store: Store, split: str) -> list[tuple[int, Image.Image]]:
    """Return a pair (label, complete image) for each record, in the order of the keys."""
    values = [value for path in store.shard_paths(split) for _, value in lmdb_shard.read(Path(path))]
    datums = [Datum.decode(value) for value in values]
    return [(datum.label, Image.open(io.BytesIO(datum.data)).convert("RGB")) for datum in datums]


def stored_squares(store: Store, split: str) -> list[tuple[int, np.ndarray]]:
    """Return a pair (label, central square) for each record, in the order of the keys."""
    return list(_stored_squares(store.root, split))


@cache
def _stored_squares(root: Path, split: str) -> list[tuple[int, np.ndarray]]:
    store, squares = Store.open(root), []
    side = store.settings.side_px
    for path in store.shard_paths(split):
        for _, value in lmdb_shard.read(Path(path)):
            datum = Datum.decode(value)
            pixels = np.asarray(Image.open(io.BytesIO(datum.data)))
            top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
            squares.append((datum.label, pixels[top : top + side, left : left + side].astype(np.float64)))
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
    size: int = 224,
) -> np.ndarray:
    """Return the augmented image, float64 (3, size, size).

    Pixel (i, j) is (square[y + i, x + j′] + shift − mean) / divisor. `offset` is (y, x). j′ is j, or size − 1 − j if
    `flip` is 1.
    """
    (y, x), m = offset, (store.settings.side_px - size) // 2
    crop, mirror = np.s_[y : y + size, x : x + size], np.s_[:, :: -1 if flip else 1]
    if mean == "image":
        subtracted = mean_image(store.root)[m : m + size, m : m + size]
    elif mean == "aligned":
        subtracted = mean_image(store.root)[crop][mirror]
    else:
        subtracted = np.array(store.color_stats().mean_rgb if mean == "channel" else [0.0, 0.0, 0.0])
    return ((square[crop][mirror] + shift - subtracted) / divisor).transpose(2, 0, 1)


def formula_shift(store: Store, augmentation: Augmentation, z: np.ndarray) -> np.ndarray:
    """Return the colour noise of one image, (3,), for standard normal `z` and pixels in 0..255."""
    stats = store.color_stats()
    vectors, variances = np.array(stats.eigenvectors), np.array(stats.eigenvalues)
    if augmentation.colour == "off":
        return np.zeros(3)
    if augmentation.colour == "stdev":
        return vectors @ (augmentation.strength * np.sqrt(variances) * z)
    # The formula of the paper is for pixels in 0..1.
    return 255 * (vectors @ (augmentation.strength * variances / 255**2 * z))


def expected_training_images(
    store: Store, augmentation: Augmentation, seed: int, batch_size: int, epochs: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the (label, image) pairs of the training stream, starting with its first batch."""
    squares, size = stored_squares(store, "train"), augmentation.size_px
    max_offset_px = store.settings.side_px - size
    for epoch in range(epochs):
        order = epoch_permutation(len(squares), seed, epoch)
        for step in range(len(squares) // batch_size):
            draws = draw_params(seed, epoch, step, batch_size, max_offset_px, augmentation.shared_by)
            for k, number in enumerate(order[step * batch_size : (step + 1) * batch_size]):
                label, square = squares[number]
                shift = formula_shift(store, augmentation, draws.normal[k])
                offset = tuple(draws.offset[k].tolist())
                settings = (augmentation.mean, store, augmentation.divisor, size)
                yield label, formula(square, offset, int(draws.flip[k]), shift, *settings)


def served(loader, epochs: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    with loader:
        for _ in range(epochs):
            for images, labels in loader:
                for image, label in zip(images, labels, strict=True):
                    yield int(label), image.numpy()


def ten_views(store: Store, size: int = 224) -> list[tuple[tuple[int, int], int]]:
    far = store.settings.side_px - size
    corners = [(0, 0), (0, far), (far // 2, far // 2), (far, 0), (far, far)]
    return [(corner, flip) for flip in (0, 1) for corner in corners]
