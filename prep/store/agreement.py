"""Looks for contradictions within a manifest, within a colour.json, and between the two files of a store.

Sums, lengths and digests must agree. The moments (sums of R, G and B and of their products) must be possible for 8-bit
pixels. The principal components must be those of the covariance.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prep.schema import shown
from prep.store.models import ColorStats, ExtraField, Manifest, MomentsJson, Settings, Shard, Split

# A difference of at most this value counts as a rounding error. For covariances, the limit is this value times the sum
# of the variances (or times 1, if the sum is smaller).
_ROUNDING = 1e-6
SPLIT_FILES = ("mean_image.npy", "inputs.jsonl")  # files that every split has; Split.account has their digests
_NUMBER_BYTES = {"int": 8, "float": 4, "vector": 4}  # size of one number of an extra field


def digest_json(data: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def extra_files(name: str, type_: str) -> tuple[str, ...]:
    """Return the paths of the files of an extra field, relative to the folder of the split."""
    return (f"extra/{name}.npy", f"extra/{name}.offsets.npy") if type_ == "text" else (f"extra/{name}.npy",)


def split_files(extra: Mapping[str, ExtraField]) -> tuple[str, ...]:
    """Return the paths of all files that have a digest in Split.account: SPLIT_FILES, and the files of `extra`."""
    return (*SPLIT_FILES, *(file for name, field in extra.items() for file in extra_files(name, field.type)))


def split_fingerprint(
    classes: Sequence[str],
    shards: Sequence[Shard],
    extra: Mapping[str, ExtraField] | None = None,
    files: Mapping[str, str] | None = None,
) -> str:
    """Return the fingerprint of one split: the SHA-256 (hex) of the class names and of the shards' digests, in order.

    If the split has extra fields, the fingerprint also covers the type, the width and the file digests of each field.
    `files` is {path of a file: digest}, as in Split.account.
    """
    content: dict[str, Any] = {"classes": list(classes), "shards": [shard.digest for shard in shards]}
    if extra and files is not None:
        content["extra"] = {
            name: {
                "type": field.type,
                "width": field.width,
                "files": [files[file] for file in extra_files(name, field.type)],
            }
            for name, field in extra.items()
        }
    return digest_json(content)


def disagreements(manifest: Manifest, data: dict[str, Any]) -> Iterator[str]:
    """Yield a text for each rule that a manifest breaks. `data` is the parsed JSON of the same manifest."""
    name = next((name for name, count in Counter(manifest.classes).items() if count > 1), None)
    if name is not None:
        yield f"the list classes has the name {shown(name)} twice, expected once"
    for name, split in manifest.splits.items():
        for what, found, expected in _split_pairs(manifest, name, split):
            if found != expected:
                yield f"splits.{name}: {what} is {found}, expected {expected}"
        for shard in split.shards:
            if not shard.path.startswith(f"{name}/"):
                yield f"splits.{name}: a shard has the path {shown(shard.path)}, expected {name}/NAME"
        yield from (f"splits.{name}.moments: {text}" for text in impossible_moments(split.moments))
    yield from _different_fields(manifest.splits)
    fingerprint = digest_json({name: split.fingerprint for name, split in manifest.splits.items()})
    if fingerprint != manifest.fingerprint:
        yield f"fingerprint of the store is {manifest.fingerprint}, expected {fingerprint}"
    checksum = digest_json({name: value for name, value in data.items() if name != "checksum"})
    if checksum != manifest.checksum:
        yield f"was changed: checksum {checksum}, the file says {manifest.checksum}"


def _split_pairs(manifest: Manifest, name: str, split: Split) -> Iterator[tuple[str, object, object]]:
    """Yield (description, value found, value expected) for each rule of one split, whether it is broken or not."""
    shards, account = split.shards, split.account
    yield "number of records of all shards", sum(shard.records for shard in shards), split.records
    yield "number of bytes of all shards", sum(shard.bytes for shard in shards), split.bytes
    yield "number of different paths of shards", len({shard.path for shard in shards}), len(shards)
    yield "number of classes with a count", len(split.label_counts), len(manifest.classes)
    yield "number of records of all classes", sum(split.label_counts), split.records
    yield "number of inputs kept", account["kept"], split.records
    yield "number of inputs kept or bad", account["kept"] + sum(account["bad"].values()), account["inputs"]
    yield "list of files with a digest", sorted(account["files"]), sorted(split_files(split.extra))
    for field_name, field in split.extra.items():
        if field.type != "vector":
            yield f"extra.{field_name}.width", field.width, 1
        if field.type != "text":
            size = split.records * field.width * _NUMBER_BYTES[field.type]
            yield f"extra.{field_name}.bytes", field.bytes, size
    yield "number of pixels of the moments", split.moments["pixels"], split.pixels
    smallest = split.records * manifest.settings.side_px**2
    if split.pixels != smallest and not _allows_pixels(manifest.settings, split.pixels, smallest):
        yield "pixels", split.pixels, f"{smallest} or more" if manifest.settings.keep_aspect else smallest
    if sorted(account["files"]) == sorted(split_files(split.extra)):
        expected = split_fingerprint(manifest.classes, shards, split.extra, account["files"])
        yield "fingerprint", split.fingerprint, expected


def _different_fields(splits: Mapping[str, Split]) -> Iterator[str]:
    """Yield a text for each extra field whose type or width is not the same in all splits."""
    first: dict[str, tuple[str, ExtraField]] = {}
    for split_name, split in splits.items():
        for name, field in split.extra.items():
            other_name, other = first.setdefault(name, (split_name, field))
            if (field.type, field.width) != (other.type, other.width):
                found = f"is {field.type} of width {field.width}, expected {other.type} of width {other.width}"
                yield f"splits.{split_name}: extra.{name} {found}, as in {other_name}"


def _allows_pixels(settings: Settings, pixels: int, smallest: int) -> bool:
    return settings.keep_aspect and pixels > smallest


def impossible_moments(moments: MomentsJson) -> Iterator[str]:
    """Yield a text if no set of 8-bit pixels has these moments."""
    n, total, outer = moments["pixels"], moments["total"], moments["outer"]
    for i in range(3):
        if total[i] > 255 * n:
            yield f"total.{i} is {total[i]}, expected at most 255·pixels, {255 * n}"
        if not total[i] ** 2 <= n * outer[i][i] <= 255 * n * total[i]:
            expected = f"at least total²/pixels and at most 255·total (total.{i} is {total[i]})"
            yield f"outer.{i}.{i} is {outer[i][i]}, expected {expected}"
        for j in range(i):
            if outer[i][j] != outer[j][i]:
                yield f"outer.{i}.{j} is {outer[i][j]}, expected the value of outer.{j}.{i}, {outer[j][i]}"
            elif outer[i][j] ** 2 > outer[i][i] * outer[j][j]:
                yield f"outer.{i}.{j} is {outer[i][j]}, expected at most the square root of outer.{i}.{i}·outer.{j}.{j}"


def inconsistent_statistics(stats: ColorStats) -> Iterator[str]:
    """Yield a text for each field of colour statistics that contradicts another field.

    The covariance must be symmetric. The eigenvalues λ must descend, and the standard deviations must be their square
    roots. The eigenvectors v must have the length 1 and must be orthogonal. Σ λ·v·vᵀ must be the covariance.
    """
    covariance, values, vectors = stats.covariance, stats.eigenvalues, stats.eigenvectors
    pairs = [(i, j) for i in range(3) for j in range(i + 1)]
    for i, j in pairs:
        if covariance[i][j] != covariance[j][i]:
            expected = f"the value of covariance.{i}.{j}, {covariance[i][j]:g}"
            yield f"covariance.{j}.{i} is {covariance[j][i]:g}, expected {expected}"
    if list(values) != sorted(values, reverse=True):
        yield f"the eigenvalues are {list(values)}, expected descending values"
    for k in range(3):
        if not math.isclose(stats.stdevs[k] ** 2, max(0.0, values[k]), rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            yield f"stdevs.{k} is {stats.stdevs[k]:g}, expected the square root of eigenvalues.{k} ({values[k]:g})"
    for i, j in pairs:
        product = sum(vectors[row][i] * vectors[row][j] for row in range(3))
        if abs(product - (i == j)) > _ROUNDING:
            yield f"eigenvectors: the product of the columns {j} and {i} is {product:.6g}, expected {int(i == j)}"
    rounding = _ROUNDING * max(1.0, sum(values))
    for i, j in pairs:
        rebuilt = sum(values[k] * vectors[i][k] * vectors[j][k] for k in range(3))
        if abs(rebuilt - covariance[i][j]) > rounding:
            expected = f"{rebuilt:g} (from eigenvalues and eigenvectors)"
            yield f"covariance.{i}.{j} is {covariance[i][j]:g}, expected {expected}"


def mean_and_covariance(
    pixels: int, total: Sequence[int], outer: Sequence[Sequence[int]]
) -> tuple[list[float], list[list[float]]]:
    """Return the mean (3,) and the covariance (3, 3) of RGB pixels. The divisor of the covariance is pixels − 1.

    pixels  number of pixels, at least 2
    total   (3,): sum of R, sum of G and sum of B over all pixels
    outer   (3, 3): sums over all pixels of the product of two channels

    Each returned value is an exact quotient of integers, rounded once to float64.
    """
    divisor = pixels * (pixels - 1)
    covariance = [[(pixels * outer[i][j] - total[i] * total[j]) / divisor for j in range(3)] for i in range(3)]
    return [value / pixels for value in total], covariance


def differences_from_moments(stats: ColorStats, moments: MomentsJson) -> Iterator[str]:
    """Yield a text for each mean and covariance of `stats` that does not follow from the manifest's `moments`."""
    mean, covariance = mean_and_covariance(moments["pixels"], moments["total"], moments["outer"])
    for i in range(3):
        if stats.mean_rgb[i] != mean[i]:
            yield f"mean_rgb.{i} is {stats.mean_rgb[i]}, expected {mean[i]}"
        for j in range(3):
            if stats.covariance[i][j] != covariance[i][j]:
                yield f"covariance.{i}.{j} is {stats.covariance[i][j]}, expected {covariance[i][j]}"
