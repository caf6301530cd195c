"""Is a store what its manifest says? Every byte is looked at; every fault is named by shard, key and source.

Shards are read by worker processes: LMDB trusts its file, and one that was cut short or torn kills who touches it.
"""

from __future__ import annotations

import json
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
    digest_json,
    split_fingerprint,
)
from prep.workers import Runner, TaskProgress, WorkerDied

# The moments of a jpeg store are of the pixels before compression. Whether they are the build's own, the manifest's
# checksum says exactly; how far those of the stored pictures may be off is bounded by what 4:2:0 does to lines of two
# saturated colours. Hundreds of photographs stay within .1 grey level and 1 %, from quality 50 up.
MEAN_BOUND = 64.0  # grey levels, of each channel's mean
SPREAD_BOUND = 1.1  # of the largest entry of the covariance, for each entry
_LEAST_QUALITY = 50  # below it only digests and pictures are compared


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it should be."""

    where: str  # a shard, `train/00003`, or a file of the store
    key: str  # of the record; empty where the fault is not one record's
    source: str  # path of its photograph, where it can still be read
    what: str

    def line(self) -> str:
        """For a person."""
        key = f", key {self.key}" if self.key else ""
        source = f" ({self.source})" if self.source else ""
        return f"{self.where}{key}{source}: {self.what}"


@dataclass(frozen=True)
class _Check:
    """One shard to look at; what a worker is sent."""

    root: Path
    shard: Shard
    settings: Settings
    classes: int
    decode: bool


@dataclass
class _Seen:
    """What a worker found in one shard."""

    faults: list[Fault] = field(default_factory=list)
    keys: tuple[int, int] = (-1, -1)  # the first and the last
    records: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    moments: Moments = field(default_factory=Moments)
    square_sum: npt.NDArray[np.int64] | None = None


def verify_split(store: Store, split: str, runner: Runner, report: Progress, decode: bool = True) -> list[Fault]:
    """Look at every record of a split and at what the manifest says of them; without `decode` pictures stay closed."""
    whole = store.split(split)
    tasks = [_Check(store.root, each, store.settings, len(store.classes), decode) for each in whole.shards]
    seen: dict[str, _Seen] = {}
    squares = np.zeros((store.settings.side_px, store.settings.side_px, 3), np.int64)
    faults: list[Fault] = []
    done, bad = report.done, report.bad  # of the splits before
    on_progress = lambda counts: report.update(done + counts.done, bad + counts.bad)  # noqa: E731
    for task, result in runner.map(check_shard, tasks, on_progress):
        if isinstance(result, WorkerDied):
            what = (
                f"the process that read it {result.describe()} at record {result.index}: the file is torn or cut short"
            )
            faults.append(Fault(task.shard.path, "", "", what))
        else:
            if result.square_sum is not None:
                squares += result.square_sum
                result.square_sum = None  # megabytes for each shard
            seen[task.shard.path] = result
            faults += result.faults
    try:
        faults += _check_manifest(store, split)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        faults.append(Fault("manifest.json", "", "", f"split {split}: {error!r} where a field should be"))
    if not faults:
        faults += _check_sums(store, split, [seen[each.path] for each in whole.shards], squares if decode else None)
    return sorted(faults, key=lambda fault: (fault.where, fault.key))


def check_shard(task: _Check, task_progress: TaskProgress) -> _Seen:
    """Everything that can be wrong in one shard. Its digest is only compared where no record is at fault."""
    seen, told, digest, size, last = _Seen(), task.shard, sha256(), 0, -1
    sums = PixelSums(task.settings.side_px)
    try:
        for key, value in lmdb_shard.read(task.root / told.path):
            task_progress.begin(seen.records)
            seen.records += 1
            digest.update(key + len(value).to_bytes(8, "little"))
            digest.update(value)
            size += len(value)
            before = len(seen.faults)
            number = int(key) if len(key) == 8 and key.isdigit() else -1
            try:
                if number <= last:
                    raise DatumError("its key is not a number of eight digits that is above the one before")
                last = number
                seen.keys = (number if seen.keys[0] < 0 else seen.keys[0], number)
                label, pixels = _look(task, value)
                seen.labels[label] += 1
                if pixels is not None:
                    sums.add(pixels)
            except (DatumError, BadImage) as error:
                seen.faults.append(Fault(told.path, name_text(key), _source(value), str(error)))
            task_progress.count(len(value), bad=len(seen.faults) > before)
    except StoreError as error:
        seen.faults.append(Fault(told.path, "", "", str(error)))
    if not seen.faults:
        for name, is_now, said in (
            ("records", seen.records, told.records),
            ("bytes", size, told.bytes),
            ("digest", digest.hexdigest(), told.digest),
        ):
            if is_now != said:
                seen.faults.append(Fault(told.path, "", "", f"{name} {is_now}, the manifest says {said}"))
                break
    if task.decode:
        seen.moments, seen.square_sum = sums.moments, sums.square_sum()
    return seen


def _look(task: _Check, value: bytes) -> tuple[int, npt.NDArray[np.uint8] | None]:
    """A record's label and pixels; raises DatumError or BadImage where it is not what the settings promise."""
    datum = Datum.decode(value)
    side, shape = task.settings.side_px, (datum.height, datum.width)
    if min(shape) != side or (not task.settings.keep_aspect and max(shape) != side):
        raise DatumError(f"{shape[1]}×{shape[0]} px, the store's shorter side is {side}")
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
    picture = decode_image(datum.data)
    if picture.pixels.shape[:2] != shape or picture.converted:
        raise DatumError(f"decodes to {picture.pixels.shape}, {picture.converted}; expected an RGB JPEG of {shape}")
    return datum.label, picture.pixels


def _source(value: bytes) -> str:
    """The source path of a record that may be damaged; empty where it cannot be read."""
    try:
        source = parse_fields(value, len(value) - CRC32_BYTES).get(SOURCE, b"")
    except DatumError:
        return ""
    return name_text(source) if isinstance(source, bytes) else ""


def _check_manifest(store: Store, name: str) -> Iterator[Fault]:
    """What can be wrong without a look at any record."""
    split = store.split(name)
    where = "manifest.json"

    def differ(what: str, is_now: object, said: object) -> Iterator[Fault]:
        if is_now != said:
            yield Fault(where, "", "", f"split {name}: {what} {is_now}, it says {said}")

    written = json.loads((store.root / where).read_bytes())
    checksum = written.pop("checksum", None)
    if checksum != digest_json(written):
        yield Fault(where, "", "", f"checksum {digest_json(written)}, it says {checksum}: changed after it was written")
    yield from differ("fingerprint of the store", store.fingerprint, written.get("fingerprint"))
    yield from differ("fingerprint", split_fingerprint(store.classes, split.shards), split.fingerprint)
    yield from differ("records of all shards", sum(each.records for each in split.shards), split.records)
    yield from differ("bytes of all shards", sum(each.bytes for each in split.shards), split.bytes)
    yield from differ("records of all classes", sum(split.label_counts), split.records)
    yield from differ("classes with a count", len(split.label_counts), len(store.classes))
    account = split.account
    yield from differ("inputs kept", account.get("kept"), split.records)
    yield from differ("inputs kept or bad", split.records + sum(account.get("bad", {}).values()), account.get("inputs"))
    named = {Path(each.path).name for each in split.shards}
    for folder in sorted((store.root / name).glob("[0-9]*")):
        if folder.name not in named:
            yield Fault(f"{name}/{folder.name}", "", "", "a shard that the manifest does not name")
    yield from _check_files(store, name)
    try:
        if not _same_colour(
            store.color_stats(name), compute_color_stats(split.records, Moments.from_json(split.moments))
        ):
            yield Fault(
                f"{name}/colour.json", "", "", "not what the manifest's moments give: alexprep pca-stats mends it"
            )
    except (UserError, KeyError, TypeError, ValueError) as error:
        yield Fault(f"{name}/colour.json", "", "", str(error))


def _same_colour(told: ColorStats, now: ColorStats) -> bool:
    """The same sums; of the eigenvectors the last digits are each machine's own."""
    exact = ("records", "pixels", "mean_rgb", "covariance", "pixel_scale")
    close = ("eigenvalues", "stdevs", "eigenvectors")
    near = (np.allclose(getattr(told, name), getattr(now, name), rtol=1e-9, atol=1e-9) for name in close)
    return all(getattr(told, name) == getattr(now, name) for name in exact) and all(near)


def _check_files(store: Store, name: str) -> Iterator[Fault]:
    """The files beside the shards, by their digests, and the account of the inputs by its lines."""
    account = store.split(name).account
    for file in SPLIT_FILES:
        where = f"{name}/{file}"
        try:
            content = (store.root / where).read_bytes()
        except OSError as error:
            yield Fault(where, "", "", f"cannot be read: {error.strerror or error}")
            continue
        digest, told = sha256(content).hexdigest(), account.get("files", {}).get(file)
        if digest != told:
            yield Fault(where, "", "", f"digest {digest}, the manifest says {told}")
        elif file == "inputs.jsonl":
            for what, found in summarize_outcomes(read_outcomes(store.root / where)).items():
                if found != account.get(what):
                    yield Fault(where, "", "", f"{what} {found}, the manifest says {account.get(what)}")


def _check_sums(
    store: Store, name: str, shards: Sequence[_Seen], squares: npt.NDArray[np.int64] | None
) -> Iterator[Fault]:
    """The records, all sound, against the sums that the manifest has of them."""
    split = store.split(name)
    where = "manifest.json"
    labels: Counter[int] = Counter()
    last = -1
    for told, seen in zip(split.shards, shards, strict=True):
        labels += seen.labels
        if seen.keys[0] <= last:
            yield Fault(told.path, f"{seen.keys[0]:08d}", "", f"follows key {last:08d} of the shard before")
        last = seen.keys[1]
    counted = tuple(labels[label] for label in range(len(store.classes)))
    if counted != split.label_counts:
        label = next(k for k, (a, b) in enumerate(zip(counted, split.label_counts, strict=True)) if a != b)
        what = f"{counted[label]} records of {store.classes[label]}, it says {split.label_counts[label]}"
        yield Fault(where, "", "", f"split {name}: {what}")
    if squares is not None:
        yield from _check_pixels(store, split, name, sum((seen.moments for seen in shards), Moments()), squares)


def _check_pixels(
    store: Store, split: Split, name: str, moments: Moments, squares: npt.NDArray[np.int64]
) -> Iterator[Fault]:
    where, exact = "manifest.json", store.settings.format == "ppm"
    said = Moments.from_json(split.moments)
    for pixels in {said.pixels, split.pixels} - {moments.pixels}:
        yield Fault(where, "", "", f"split {name}: {moments.pixels} pixels, it says {pixels}")
        return
    if exact and moments != said:
        yield Fault(where, "", "", f"split {name}: moments {moments.to_json()}, it says {said.to_json()}")
    try:
        mean_image = store.mean_image(name)
    except StoreError as error:
        yield Fault(f"{name}/mean_image.npy", "", "", str(error))
        return
    if exact and not np.array_equal((squares / split.records).astype(np.float32), mean_image):
        yield Fault(f"{name}/mean_image.npy", "", "", "not the mean of the stored pictures")
    if exact or store.settings.quality < _LEAST_QUALITY:
        return
    now, then = compute_color_stats(split.records, moments), compute_color_stats(split.records, said)
    off = float(np.abs(np.subtract(now.mean_rgb, then.mean_rgb)).max())
    if off > MEAN_BOUND:
        yield Fault(
            where, "", "", f"split {name}: mean RGB is off by {off:.2f} grey levels, JPEG explains {MEAN_BOUND}"
        )
    covariance = np.array(then.covariance)
    off = float(np.abs(np.array(now.covariance) - covariance).max() / max(np.abs(covariance).max(), 1.0))
    if off > SPREAD_BOUND:
        yield Fault(where, "", "", f"split {name}: covariance is off by {off:.1%}, JPEG explains {SPREAD_BOUND:.0%}")
