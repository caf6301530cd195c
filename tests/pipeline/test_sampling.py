"""Epoch permutations and random augmentation parameters: distributions, independence, and exact bits.

The tests compare the exact bits of the random numbers with digests. If a new version of NumPy draws other numbers, the
stream needs a new STREAM_VERSION.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from pipeline.sampling import BLOCK_RECORDS, WINDOW_RECORDS, draw_params, epoch_permutation

SIZES = [1, 2, 63, 64, 65, 1000, 16_384, 20_000]
MAX_OFFSET_PX = 32


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**64 - 1, 10**9)])
def test_an_epoch_holds_every_record_once(size: int, seed: int, epoch: int) -> None:
    order = epoch_permutation(size, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))


def test_an_empty_split_has_an_empty_permutation() -> None:
    assert len(epoch_permutation(0, 0, 0)) == 0


@pytest.mark.parametrize("size", [64, 1000, 20_000])
def test_permutations_differ_between_epochs_and_seeds_and_are_reproducible(size: int) -> None:
    positions = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (0, 2**32), (2**63, 0)]
    orders = [epoch_permutation(size, *position) for position in positions]
    for position, order in zip(positions, orders, strict=True):
        assert np.array_equal(order, epoch_permutation(size, *position))
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(one == other) < 0.1


@pytest.mark.parametrize("size", [20_000, 40_000])
def test_batches_have_as_many_classes_as_with_a_perfect_shuffle_if_the_store_is_in_random_order(size: int) -> None:
    labels = np.random.default_rng(1).permutation(np.arange(size) % 200)
    ideal = _distinct(labels[np.random.default_rng(2).permutation(size)])
    assert _distinct(labels[epoch_permutation(size, 0, 0)]) == pytest.approx(ideal, rel=0.01)


@pytest.mark.parametrize("size", [16_384, 40_000])
def test_neighboring_records_of_the_store_are_far_apart_in_an_epoch(size: int) -> None:
    """The records of a batch come from as many blocks as 128 random records of a shuffle window would, within 3 %."""
    blocks = WINDOW_RECORDS // BLOCK_RECORDS
    ideal = blocks * (1 - (1 - 1 / blocks) ** 128)
    mixed = epoch_permutation(size, 0, 0) // BLOCK_RECORDS
    assert _distinct(mixed[: size // WINDOW_RECORDS * WINDOW_RECORDS]) == pytest.approx(ideal, rel=0.03)


def _distinct(labels: np.ndarray, batch: int = 128) -> float:
    whole = labels[: len(labels) // batch * batch].reshape(-1, batch)
    return float(np.mean([len(np.unique(row)) for row in whole]))


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_a_shuffle_window_consists_of_complete_blocks(size: int) -> None:
    order = epoch_permutation(size, 3, 1)
    seen: list[set[int]] = []
    for first in range(0, size, WINDOW_RECORDS):
        blocks, counts = np.unique(order[first : first + WINDOW_RECORDS] // BLOCK_RECORDS, return_counts=True)
        # A shuffle window may begin and end within a block, and the last block of the store is shorter than the others.
        assert len(blocks) <= WINDOW_RECORDS // BLOCK_RECORDS + 2
        last = (size - 1) // BLOCK_RECORDS
        assert sum(count < BLOCK_RECORDS for block, count in zip(blocks, counts, strict=True) if block != last) <= 2
        seen.append(set(blocks.tolist()))
    assert sum(map(len, seen)) <= -(-size // BLOCK_RECORDS) + len(seen)
    ends = [max(window) - min(window) for window in seen]
    assert min(ends) > 0.9 * size / BLOCK_RECORDS  # the blocks of a shuffle window come from all parts of the store


@pytest.mark.parametrize("record", [0, 63, 64, 129])
def test_a_record_is_equally_likely_at_every_position_of_an_epoch(record: int) -> None:
    """The 130 records are two full blocks and a block of two records."""
    positions = [int(np.flatnonzero(epoch_permutation(130, 0, epoch) == record)[0]) for epoch in range(2600)]
    counts = np.bincount(np.array(positions) // 10, minlength=13)
    assert ((counts - 200) ** 2 / 200).sum() < 34.5  # 99.95 % quantile of chi-squared, 12 degrees of freedom


@pytest.fixture(scope="module")
def draws_of_400_steps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws of 400 steps of 128 images: offsets (400, 128, 2), flips (400, 128), normals (400, 128, 3)."""
    draws = [draw_params(5, step // 100, step % 100, 128, MAX_OFFSET_PX) for step in range(400)]
    offsets, flips, normals = (np.stack(parts) for parts in zip(*draws, strict=True))
    return offsets, flips, normals


def test_crop_offsets_are_uniform_over_33_by_33(draws_of_400_steps: tuple[np.ndarray, ...]) -> None:
    offsets = draws_of_400_steps[0].reshape(-1, 2)
    n = len(offsets)
    assert offsets.dtype == np.int32 and offsets.min() == 0 and offsets.max() == MAX_OFFSET_PX
    for axis in range(2):
        counts = np.bincount(offsets[:, axis], minlength=33)
        assert ((counts - n / 33) ** 2 / (n / 33)).sum() < 62.5  # 99.9 % quantile of chi-squared, 32 degrees of freedom
    table = np.zeros((33, 33))
    np.add.at(table, tuple(offsets.T), 1)
    chi2 = ((table - n / 1089) ** 2 / (n / 1089)).sum()
    assert abs(chi2 - 1088) < 3.3 * np.sqrt(2 * 1088)  # row and column offsets are independent


def test_half_of_the_images_are_flipped(draws_of_400_steps: tuple[np.ndarray, ...]) -> None:
    flips = draws_of_400_steps[1]
    assert flips.dtype == np.int32 and set(np.unique(flips)) == {0, 1}
    assert abs(flips.mean() - 0.5) < 3.3 * 0.5 / np.sqrt(flips.size)


def test_noise_is_standard_normal(draws_of_400_steps: tuple[np.ndarray, ...]) -> None:
    normal = draws_of_400_steps[2].reshape(-1, 3)
    n = len(normal)
    assert normal.dtype == np.float64
    assert (np.abs(normal.mean(0)) < 4 / np.sqrt(n)).all()
    assert (np.abs(np.cov(normal.T) - np.eye(3)) < 4 * np.sqrt(2 / n)).all()
    assert (np.abs((normal**4).mean(0) - 3) < 4 * np.sqrt(96 / n)).all()


def test_draws_of_different_images_steps_and_parameters_are_independent(
    draws_of_400_steps: tuple[np.ndarray, ...],
) -> None:
    offsets, flips, normals = draws_of_400_steps
    columns = np.concatenate([offsets, flips[..., None], normals], axis=2).astype(np.float64)
    for one, other in (
        (columns[:-1], columns[1:]),
        (columns[:-100], columns[100:]),
        (columns[:, :-1], columns[:, 1:]),
    ):
        a, b = one.reshape(-1, 6), other.reshape(-1, 6)
        correlation = np.corrcoef(a.T, b.T)[:6, 6:]
        assert (np.abs(correlation) < 4.5 / np.sqrt(len(a))).all()
    within = np.corrcoef(columns.reshape(-1, 6).T) - np.eye(6)
    assert (np.abs(within) < 4.5 / np.sqrt(columns[..., 0].size)).all()


@pytest.mark.parametrize(("seed", "epoch", "step"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 2**32, 0)])
def test_draws_differ_with_seed_epoch_and_step_and_are_reproducible(seed: int, epoch: int, step: int) -> None:
    zero, one, again = (
        draw_params(*position, 64, MAX_OFFSET_PX) for position in ((0, 0, 0), (seed, epoch, step), (seed, epoch, step))
    )
    for a, b, c in zip(zero, one, again, strict=True):
        assert not np.array_equal(a, b) and np.array_equal(b, c)


def test_no_two_combinations_of_seed_epoch_and_step_share_a_generator() -> None:
    """The test tries all combinations of the values 0 to 3 of seed, epoch and step.

    If the generator were seeded with the sum or the product of the three values, numbers would be repeated.
    """
    positions = itertools.product(range(4), repeat=3)
    assert len({draw_params(*position, 4, MAX_OFFSET_PX).normal.tobytes() for position in positions}) == 64


@pytest.mark.parametrize(("images", "shared_by"), [(16, 4), (10, 4), (128, 32), (3, 32)])
def test_groups_of_shared_by_images_have_one_offset_and_flip_but_separate_noise(images: int, shared_by: int) -> None:
    draws = [draw_params(0, 0, step, images, MAX_OFFSET_PX, shared_by) for step in range(40)]
    for one in draws:
        assert [len(part) for part in one] == [images] * 3
        for first in range(0, images, shared_by):
            assert (one.offset[first : first + shared_by] == one.offset[first]).all()
            assert (one.flip[first : first + shared_by] == one.flip[first]).all()
    leaders = np.concatenate([one.offset[::shared_by] for one in draws])
    ideal = 1089 * (1 - (1 - 1 / 1089) ** len(leaders))
    assert len(np.unique(leaders, axis=0)) > 0.9 * ideal
    assert len(np.unique(np.concatenate([one.normal for one in draws]))) == 40 * images * 3


def test_select_gives_the_draws_of_some_images() -> None:
    all_draws = draw_params(0, 0, 0, 12, MAX_OFFSET_PX)
    for part, all_values in zip(all_draws.select(slice(4, 8)), all_draws, strict=True):
        assert np.array_equal(part, all_values[4:8])


def test_an_image_of_the_size_of_a_crop_has_offset_zero() -> None:
    assert not draw_params(0, 0, 0, 50, 0).offset.any()


def test_the_bits_are_those_of_the_first_version() -> None:
    """If this test fails, the random numbers have changed, and loaders can no longer resume from older states."""
    order, last = epoch_permutation(20_000, 0, 0), epoch_permutation(1000, 2**64 - 1, 90)
    assert digest(order) == "7a8c2849a3ed1c2a69aaf4ee5c5d5b5cff87e4e978effc2e6b241f5242fd3916"
    assert digest(last) == "fd88b008bc89ad71d1bedf409b959bf0f6a88f847367c93d41557eb54f811820"
    offset, flip, normal = draw_params(0, 0, 0, 128, MAX_OFFSET_PX)
    assert digest(offset, flip) == "b4f0d3274e496e5a49b2e9f860ad72b6b85fa184a1604f09efbab360b08eecde"
    assert digest(normal.astype(np.float32)) == "11e5cd77fca54ee423b10ccb5d34855c792c41bb4d7d449bcfbaffb3709b2e48"
    offset, flip, _ = draw_params(2**64 - 1, 90, 10_000, 128, MAX_OFFSET_PX, 32)
    assert digest(offset, flip) == "5ceede14341467428cd545833774b664f94aa73c5db402070781b7c2dc23e613"
