"""Verifies a store: checks every record, and compares every shard and file with the manifest.

A record is compared with its own checksum and with the settings of the store (prep.check.verify_shard). A fault is
reported with the shard, the key and the source path of the record, if they are known. Worker processes read the shards,
so that a decoder that crashes ends only its own process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.check.verify_shard import Fault, ShardCheck, ShardFindings, check_shard
from prep.console import Progress, UserError
from prep.images.color_stats import Moments, compute_color_stats
from prep.schema import file_sha256
from prep.store.extra import FOLDER, StoredColumns
from prep.store.input_log import read_outcomes, summarize_outcomes
from prep.store.manifest import (
    ColorStats,
    Split,
    Store,
    StoreError,
    split_files,
)
from prep.workers import Runner, WorkerDied

# The manifest of a jpeg store has the colour moments of the pixels before compression. The stored images have slightly
# different moments. MAX_MEAN_ERROR and MAX_COVARIANCE_ERROR allow the largest errors that 4:2:0 chroma subsampling can
# cause. The largest errors occur in images of alternating lines of two saturated colours. In stores of hundreds of
# photographs with quality 50 or more, the mean is wrong by at most 0.1 grey levels. The covariance is wrong by at most
# 1 %. The manifest's checksum detects a later change of the moments.
MAX_MEAN_ERROR = 64.0  # largest error of a channel's mean, in grey levels
MAX_COVARIANCE_ERROR = 1.1  # largest error of a covariance entry, relative to the largest entry of the covariance
_ROWS_AT_ONCE = 65_536  # number of rows of the extra fields that are checked by one call
_MIN_QUALITY = 50  # below this JPEG quality, mean and covariance are not compared


def unverifiable_settings(store: Store) -> list[str]:
    """Return the names of the parts of a manifest that cannot be verified, because the records do not show them.

    Only the checksum and the fingerprints in the manifest protect these parts.
    """
    settings = store.settings
    parts = ["filter", "background", "reduce_above", "tools", "names of the classes"]
    if settings.format == "ppm":
        parts.append("quality")
    square_px = settings.side_px**2
    if settings.keep_aspect and all(split.pixels == split.records * square_px for split in store.splits.values()):
        parts.append("keep_aspect")  # all images are square, as they are in any store without keep_aspect
    return parts


def verify_split(store: Store, split: str, runner: Runner, progress: Progress, decode: bool = True) -> list[Fault]:
    """Return all faults of a split, sorted by file and key. Images are decoded only if `decode` is true."""
    shards = store.split(split).shards
    tasks = [ShardCheck(store.root, shard, store.settings, len(store.classes), decode) for shard in shards]
    findings: dict[str, ShardFindings] = {}
    square_sum = np.zeros((store.settings.side_px, store.settings.side_px, 3), np.int64)
    faults: list[Fault] = []
    done_before, bad_before = progress.done, progress.bad  # counts of the splits that were verified before this split
    on_progress = lambda counts: progress.update(done_before + counts.done, bad_before + counts.bad)  # noqa: E731
    for task, result in runner.map(check_shard, tasks, on_progress):
        if isinstance(result, WorkerDied):
            what = (
                f"the process that read this shard {result.describe()} at record {result.index}: "
                "the file is damaged or truncated"
            )
            faults.append(Fault(task.shard.path, "", "", what))
        else:
            if result.square_sum is not None:
                square_sum += result.square_sum
                result.square_sum = None  # this frees megabytes for each shard
            findings[task.shard.path] = result
            faults += result.faults
    faults += _check_manifest(store, split)
    if not faults:
        in_order = [findings[shard.path] for shard in shards]
        faults += _check_totals(store, split, in_order, square_sum if decode else None)
    return sorted(faults, key=lambda fault: (fault.where, fault.key))


def _check_manifest(store: Store, name: str) -> Iterator[Fault]:
    """Yield the faults of the files beside the shards. Store.open has already checked the manifest itself."""
    split = store.split(name)
    named = {Path(shard.path).name for shard in split.shards}
    for folder in sorted((store.root / name).glob("[0-9]*")):
        if folder.name not in named:
            yield Fault(f"{name}/{folder.name}", "", "", "a shard that the manifest does not name")
    yield from _check_files(store, name)
    try:
        if not same_color_stats(
            store.color_stats(name), compute_color_stats(split.records, Moments.from_json(split.moments))
        ):
            yield Fault(
                f"{name}/colour.json",
                "",
                "",
                "differs from the statistics computed from the moments in the manifest; alexprep pca-stats writes the "
                "file again",
            )
    except UserError as error:
        yield Fault(f"{name}/colour.json", "", "", str(error))


def same_color_stats(written: ColorStats, computed: ColorStats) -> bool:
    """Return whether two statistics agree.

    Counts, mean and covariance must be equal. Eigenvalues, standard deviations and eigenvectors may differ by
    1e-9·(1 + |value|), since their last digits vary between machines.
    """
    exact = ("records", "pixels", "mean_rgb", "covariance", "pixel_scale")
    close = ("eigenvalues", "stdevs", "eigenvectors")
    return all(getattr(written, name) == getattr(computed, name) for name in exact) and all(
        np.allclose(getattr(written, name), getattr(computed, name), rtol=1e-9, atol=1e-9) for name in close
    )


def _check_files(store: Store, name: str) -> Iterator[Fault]:
    """Compare the files beside the shards with the manifest's digests, and inputs.jsonl with the manifest's totals."""
    split = store.split(name)
    account, files = split.account, split_files(split.extra)
    is_intact = True
    for stray in sorted((store.root / name / FOLDER).glob("*.npy")):
        if f"{FOLDER}/{stray.name}" not in files:
            yield Fault(f"{name}/{FOLDER}/{stray.name}", "", "", "a column that the manifest does not name")
    for file in files:
        where = f"{name}/{file}"
        try:
            digest = file_sha256(store.root / where)
        except OSError as error:
            is_intact = False
            yield Fault(where, "", "", f"cannot be read: {error.strerror or error}")
            continue
        expected = account["files"][file]
        if digest != expected:
            is_intact = False
            yield Fault(where, "", "", f"digest {digest}, the manifest says {expected}")
        elif file == "inputs.jsonl":
            for what, total in summarize_outcomes(read_outcomes(store.root / where)).items():
                if total != account.get(what):
                    yield Fault(where, "", "", f"{what} {total}, the manifest says {account.get(what)}")

    if is_intact and split.extra:
        yield from _check_columns(store, name)


def _check_columns(store: Store, name: str) -> Iterator[Fault]:
    """Yield a fault if a column has a wrong type, shape or offset, a number that is not finite, or a non-UTF-8 text."""
    try:
        with closing(StoredColumns(store, name)) as columns:
            for first in range(0, store.split(name).records, _ROWS_AT_ONCE):
                columns.take(np.arange(first, min(first + _ROWS_AT_ONCE, store.split(name).records)))
    except StoreError as error:
        yield Fault(f"{name}/{FOLDER}", "", "", str(error))


def _check_totals(
    store: Store, name: str, findings: Sequence[ShardFindings], square_sum: npt.NDArray[np.int64] | None
) -> Iterator[Fault]:
    """Compare keys, label counts and pixel statistics of all records with the manifest.

    The caller has checked that no record is damaged.
    """
    split = store.split(name)
    where = "manifest.json"
    labels: Counter[int] = Counter()
    last_key, last_hash = -1, b""
    for shard, found in zip(split.shards, findings, strict=True):
        labels += found.labels
        if found.records and found.keys[0] <= last_key:
            what = f"not greater than key {last_key:08d}, the last key of the previous shard"
            yield Fault(shard.path, f"{found.keys[0]:08d}", "", what)
        elif found.records and found.hashes[0] < last_hash:
            what = f"not in the order of seed {store.settings.seed}: this record belongs before the previous shard"
            yield Fault(shard.path, f"{found.keys[0]:08d}", "", what)
        last_key, last_hash = (found.keys[1], found.hashes[1]) if found.records else (last_key, last_hash)
    counts = tuple(labels[label] for label in range(len(store.classes)))
    if counts != split.label_counts:
        label = next(k for k, (a, b) in enumerate(zip(counts, split.label_counts, strict=True)) if a != b)
        what = f"{counts[label]} records of {store.classes[label]}, the manifest says {split.label_counts[label]}"
        yield Fault(where, "", "", f"split {name}: {what}")
    if square_sum is not None:
        moments = sum((found.moments for found in findings), Moments())
        yield from _check_pixel_statistics(store, split, name, moments, square_sum)


def _check_pixel_statistics(
    store: Store, split: Split, name: str, moments: Moments, square_sum: npt.NDArray[np.int64]
) -> Iterator[Fault]:
    """Compare the pixel statistics of the stored images with the statistics that the build wrote.

    For ppm stores, moments and mean image must be equal. For jpeg stores, mean and covariance of RGB may differ by at
    most MAX_MEAN_ERROR and MAX_COVARIANCE_ERROR.
    """
    where, exact = "manifest.json", store.settings.format == "ppm"
    stated = Moments.from_json(split.moments)
    for pixels in {stated.pixels, split.pixels} - {moments.pixels}:
        yield Fault(where, "", "", f"split {name}: {moments.pixels} pixels, the manifest says {pixels}")
        return
    if exact and moments != stated:
        yield Fault(where, "", "", f"split {name}: moments {moments.to_json()}, the manifest says {stated.to_json()}")
    try:
        mean_image = store.mean_image(name)
    except StoreError as error:
        yield Fault(f"{name}/mean_image.npy", "", "", str(error))
        return
    if exact and not np.array_equal((square_sum / split.records).astype(np.float32), mean_image):
        yield Fault(f"{name}/mean_image.npy", "", "", "not the mean of the stored images")
    elif store.settings.quality >= _MIN_QUALITY and split.records:
        difference = float(np.abs((square_sum / split.records - mean_image).mean(axis=(0, 1))).max())
        if not difference <= MAX_MEAN_ERROR:
            what = f"mean RGB differs by {difference:.2f} grey levels from the stored images, JPEG can cause at most "
            yield Fault(f"{name}/mean_image.npy", "", "", f"{what}{MAX_MEAN_ERROR}")
    if exact or store.settings.quality < _MIN_QUALITY:
        return
    actual, expected = compute_color_stats(split.records, moments), compute_color_stats(split.records, stated)
    mean_error = float(np.abs(np.subtract(actual.mean_rgb, expected.mean_rgb)).max())
    if mean_error > MAX_MEAN_ERROR:
        what = (
            f"mean RGB differs by {mean_error:.2f} grey levels from the stored images, JPEG can cause at most "
            f"{MAX_MEAN_ERROR}"
        )
        yield Fault(where, "", "", f"split {name}: {what}")
    covariance = np.array(expected.covariance)
    largest = max(np.abs(covariance).max(), 1.0)
    covariance_error = float(np.abs(np.array(actual.covariance) - covariance).max() / largest)
    if covariance_error > MAX_COVARIANCE_ERROR:
        what = (
            f"covariance differs by {covariance_error:.1%} from the stored images, JPEG can cause at most "
            f"{MAX_COVARIANCE_ERROR:.0%}"
        )
        yield Fault(where, "", "", f"split {name}: {what}")
