"""Verifies a store: checks every record, and compares every shard and file with the manifest.

A record is compared with its own checksum and with the settings of the store. A fault is reported with the shard, the
key and the source path of the record, if they are known. LMDB does not check its data file for damage, so a truncated
or damaged file can crash the process that reads the file. Therefore worker processes read the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.console import Progress, UserError
from prep.images.codec import BadImage, decode_image, ppm_header
from prep.images.color_stats import Moments, PixelSums, compute_color_stats
from prep.inputs.names import name_text
from prep.schema import file_sha256
from prep.store import lmdb_shard
from prep.store.datum import CRC32_BYTES, SOURCE, Datum, DatumError, parse_fields
from prep.store.input_log import read_outcomes, summarize_outcomes
from prep.store.manifest import (
    SPLIT_FILES,
    ColorStats,
    Settings,
    Shard,
    Split,
    Store,
    StoreError,
)
from prep.workers import Runner, TaskProgress, WorkerDied

# The manifest of a jpeg store has the colour moments of the pixels before compression. The stored images have slightly
# different moments. The two bounds below allow the largest errors that 4:2:0 chroma subsampling can cause. The largest
# errors occur in images of alternating lines of two saturated colours. In stores of hundreds of photographs with
# quality 50 or more, the mean is wrong by at most 0.1 grey levels. The covariance is wrong by at most 1 %. If the
# moments in the manifest are changed later, the manifest's checksum is wrong.
MAX_MEAN_ERROR = 64.0  # largest error of a channel's mean, in grey levels
MAX_COVARIANCE_ERROR = 1.1  # largest error of a covariance entry, relative to the largest entry of the covariance
_MIN_QUALITY = 50  # below this JPEG quality, mean and covariance are not compared


@dataclass(frozen=True)
class Fault:
    """One difference between a store and its manifest, or one damaged record."""

    where: str  # name of a shard, such as `train/00003`, or of a file of the store
    key: str  # key of the record; empty if the fault does not concern a single record
    source: str  # path of the record's input, if it can still be read
    what: str

    def text(self) -> str:
        """Return the fault as one line of text."""
        key = f", key {self.key}" if self.key else ""
        source = f" ({self.source})" if self.source else ""
        return f"{self.where}{key}{source}: {self.what}"


@dataclass(frozen=True)
class _ShardCheck:
    """The task of verifying one shard. A task is pickled and sent to a worker process."""

    root: Path
    shard: Shard
    settings: Settings
    classes: int
    decode: bool


@dataclass
class _ShardFindings:
    """Result of the check of one shard."""

    faults: list[Fault] = field(default_factory=list)
    keys: tuple[int, int] = (-1, -1)  # keys of the first and the last record
    records: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    moments: Moments = field(default_factory=Moments)
    square_sum: npt.NDArray[np.int64] | None = None


def verify_split(store: Store, split: str, runner: Runner, progress: Progress, decode: bool = True) -> list[Fault]:
    """Return all faults of a split, sorted by file and key. Images are decoded only if `decode` is true."""
    shards = store.split(split).shards
    tasks = [_ShardCheck(store.root, shard, store.settings, len(store.classes), decode) for shard in shards]
    findings: dict[str, _ShardFindings] = {}
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


def check_shard(task: _ShardCheck, task_progress: TaskProgress) -> _ShardFindings:
    """Check each record of one shard. If no record is damaged, compare the counts and the digest with the manifest."""
    found, shard, digest, size, last_key = _ShardFindings(), task.shard, sha256(), 0, -1
    sums = PixelSums(task.settings.side_px)
    try:
        for key, value in lmdb_shard.read(task.root / shard.path):
            task_progress.begin(found.records)
            found.records += 1
            digest.update(key + len(value).to_bytes(8, "little"))
            digest.update(value)
            size += len(value)
            fault_count = len(found.faults)
            number = int(key) if len(key) == 8 and key.isdigit() else -1
            try:
                if number <= last_key:
                    raise DatumError("the key is not a number of eight digits greater than the previous key")
                last_key = number
                found.keys = (number if found.keys[0] < 0 else found.keys[0], number)
                label, pixels = _check_record(task, value)
                found.labels[label] += 1
                if pixels is not None:
                    sums.add(pixels)
            except (DatumError, BadImage) as error:
                found.faults.append(Fault(shard.path, name_text(key), _readable_source(value), str(error)))
            task_progress.count(len(value), bad=len(found.faults) > fault_count)
    except StoreError as error:
        found.faults.append(Fault(shard.path, "", "", str(error)))
    if not found.faults:
        for name, actual, expected in (
            ("records", found.records, shard.records),
            ("bytes", size, shard.bytes),
            ("digest", digest.hexdigest(), shard.digest),
        ):
            if actual != expected:
                found.faults.append(Fault(shard.path, "", "", f"{name} {actual}, the manifest says {expected}"))
                break
    if task.decode:
        found.moments, found.square_sum = sums.moments, sums.square_sum()
    return found


def _check_record(task: _ShardCheck, value: bytes) -> tuple[int, npt.NDArray[np.uint8] | None]:
    """Return (label, pixels) of a record.

    Raises DatumError or BadImage if the record is damaged or contradicts `task`.
    """
    datum = Datum.decode(value)
    side, shape = task.settings.side_px, (datum.height, datum.width)
    if min(shape) != side or (not task.settings.keep_aspect and max(shape) != side):
        raise DatumError(
            f"{shape[1]}×{shape[0]} px, the store's shorter side is {side}; only --keep-aspect allows a longer side"
        )
    if not 0 <= datum.label < task.classes:
        raise DatumError(f"label {datum.label}, the store has {task.classes} classes")
    if not task.decode:
        return datum.label, None
    if task.settings.format == "ppm":
        header = ppm_header(*shape)
        if not datum.data.startswith(header) or len(datum.data) != len(header) * (shape[0] + 1):
            raise DatumError("not a PPM whose header fills one row")
        pixels = np.frombuffer(datum.data, np.uint8).reshape(shape[0] + 1, shape[1], 3)[1:]
        return datum.label, pixels
    image = decode_image(datum.data)
    if image.pixels.shape[:2] != shape or image.converted:
        raise DatumError(
            f"decodes to shape {image.pixels.shape}, conversions {image.converted}; "
            f"expected an RGB JPEG of shape {(*shape, 3)} without conversion"
        )
    return datum.label, image.pixels


def _readable_source(value: bytes) -> str:
    """Return the source path in a record that may be damaged; empty if the path cannot be read."""
    try:
        source = parse_fields(value, len(value) - CRC32_BYTES).get(SOURCE, b"")
    except DatumError:
        return ""
    return name_text(source) if isinstance(source, bytes) else ""


def _check_manifest(store: Store, name: str) -> Iterator[Fault]:
    """Find faults of the files that lie next to the shards. Store.open has already checked the manifest itself."""
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
                "differs from the statistics of the manifest's moments; alexprep pca-stats writes the file again",
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
    """Compare the files next to the shards with the manifest's digests, and inputs.jsonl with the manifest's totals."""
    account = store.split(name).account
    for file in SPLIT_FILES:
        where = f"{name}/{file}"
        try:
            digest = file_sha256(store.root / where)
        except OSError as error:
            yield Fault(where, "", "", f"cannot be read: {error.strerror or error}")
            continue
        expected = account["files"][file]
        if digest != expected:
            yield Fault(where, "", "", f"digest {digest}, the manifest says {expected}")
        elif file == "inputs.jsonl":
            for what, total in summarize_outcomes(read_outcomes(store.root / where)).items():
                if total != account.get(what):
                    yield Fault(where, "", "", f"{what} {total}, the manifest says {account.get(what)}")


def _check_totals(
    store: Store, name: str, findings: Sequence[_ShardFindings], square_sum: npt.NDArray[np.int64] | None
) -> Iterator[Fault]:
    """Compare keys, label counts and pixel statistics of the undamaged records with the manifest."""
    split = store.split(name)
    where = "manifest.json"
    labels: Counter[int] = Counter()
    last_key = -1
    for shard, found in zip(split.shards, findings, strict=True):
        labels += found.labels
        if found.keys[0] <= last_key:
            yield Fault(shard.path, f"{found.keys[0]:08d}", "", f"follows key {last_key:08d} of the shard before")
        last_key = found.keys[1]
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

    For ppm stores, moments and mean image must be equal. For jpeg stores, mean and covariance of RGB may differ within
    bounds.
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
    if exact or store.settings.quality < _MIN_QUALITY:
        return
    actual, expected = compute_color_stats(split.records, moments), compute_color_stats(split.records, stated)
    mean_error = float(np.abs(np.subtract(actual.mean_rgb, expected.mean_rgb)).max())
    if mean_error > MAX_MEAN_ERROR:
        what = f"mean RGB is off by {mean_error:.2f} grey levels, JPEG explains at most {MAX_MEAN_ERROR}"
        yield Fault(where, "", "", f"split {name}: {what}")
    covariance = np.array(expected.covariance)
    largest = max(np.abs(covariance).max(), 1.0)
    covariance_error = float(np.abs(np.array(actual.covariance) - covariance).max() / largest)
    if covariance_error > MAX_COVARIANCE_ERROR:
        what = f"covariance is off by {covariance_error:.1%}, JPEG explains at most {MAX_COVARIANCE_ERROR:.0%}"
        yield Fault(where, "", "", f"split {name}: {what}")
