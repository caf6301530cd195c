"""Builds a split from images that Python code yields: any data set with (image, label, name) for each item.

The images are first written one after another into one file in the store, because a build reads them in the order of
the records. At the end of the build the file with the images is removed. The bytes of an encoded image are written into
this file unchanged. An image that is given as pixels (a PIL image of mode RGB, or an array) is first rescaled if it is
larger than the records. The build does not rescale the pixels a second time.
"""

from __future__ import annotations

import io
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from operator import index as as_integer
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from prep.build.limits import InputLimits
from prep.build.plan import BuildPolicy
from prep.build.resume import background_of
from prep.build.split import build_split, disk_errors
from prep.console import UserError, escaped, progress, usable_cores
from prep.extra.python_values import ItemValues
from prep.files import hold_lock
from prep.images.codec import BadImage, check_rescaled_size
from prep.images.limits import MAX_PIXELS, TIME_LIMIT_S
from prep.images.rescale import rescale
from prep.inputs.classes import order_classes
from prep.inputs.formats.labelled import LabelledRows
from prep.inputs.formats.shards import ShardReader, pack_location
from prep.inputs.listing import Input
from prep.inputs.reader import Content, ListOptions
from prep.inputs.sources import label_inputs
from prep.store.extra import Column
from prep.store.manifest import (
    BACKGROUNDS,
    DEFAULT_BACKGROUND,
    DROPPED,
    FILTERS,
    FORMATS,
    SPLITS,
    Settings,
    Store,
)
from prep.workers import WorkerPool

Pixels = npt.NDArray[np.uint8]  # (H, W, 3), RGB
Item = (
    tuple["bytes | Image.Image | Pixels", "str | int", "str | bytes"]
    | tuple["bytes | Image.Image | Pixels", "str | int", "str | bytes", Mapping[str, object]]
)

# The first byte of an item in the file is one of these types. The content follows.
_FILE = b"F"  # content: the bytes of an image file
_PIXELS = b"P"  # content: height and width, 4 bytes each, and the pixels
_BAD = b"B"  # content: the reason why the item is bad
_PNG_MODES = ("RGB", "1", "L", "LA", "P", "RGBA", "I;16")
_CONVERTED = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA", "HSV": "RGB"}  # Pillow's mode -> stored mode
_JPEG_SIGNATURE = b"\xff\xd8\xff"


@dataclass(frozen=True)
class ItemReader:
    """Reads inputs that build_from has written into the file `root`."""

    root: Path

    def read(self, item: Input) -> Content:
        """Return an encoded image as bytes, or pixels as uint8 (H, W, 3).

        Raises BadImage for an item that build_from could not use.
        """
        content = ShardReader(self.root, ("",)).read(item)
        if content.startswith(_BAD):
            raise BadImage(content[1:].decode())
        if content.startswith(_FILE):
            return content[1:]
        height, width = (int.from_bytes(content[at : at + 4]) for at in (1, 5))
        return np.frombuffer(content, np.uint8, offset=9).reshape(height, width, 3)

    def head(self, item: Input, size: int) -> bytes:
        """Return the first `size` bytes of an encoded image, or a JPEG signature if the item is pixels."""
        content = ShardReader(self.root, ("",)).head(item, size + 1)
        if content.startswith(_BAD):
            self.read(item)
        return content[1:] if content.startswith(_FILE) else _JPEG_SIGNATURE[:size]


def build_from(
    items: Iterable[Item],
    store: str | Path,
    *,
    split: str = "train",
    classes: Sequence[str] = (),
    side: int = 256,
    keep_aspect: bool = False,
    format: str = "jpeg",
    quality: int = 90,
    filter: str = "area",
    seed: int = 0,
    background: str | None = None,
    max_pixels: int = MAX_PIXELS,
    reduce_above: int = 0,
    time_limit: float = TIME_LIMIT_S,
    on_warning: str = "keep",
    on_bad: str = "fail",
    max_bad: int | None = None,
    allow_empty_classes: bool = False,
    restart: bool = False,
    jobs: int | None = None,
) -> Store:
    """Build one split of a store from items (image, label, name) or (image, label, name, extra). Returns the store.

    An image is the bytes of an image file, a PIL image, or pixels as uint8 (H, W, 3). The build sees the warnings of
    the decoder only if the image is given as bytes. A PIL image that Pillow cannot load is a bad input. A label is the
    name of a class, or the position of a class counted from 0. `classes` lists the class names in the order of their
    positions. Without `classes`, labels that are names give the classes, in sorted order. Labels that are positions get
    the class names of the store, or the names 0, 1, 2 and so on in a new store. The names of the items must be unique,
    and become the source paths of the records. Items named CLASS/FILE therefore give the same fingerprint as files in
    class folders. `extra` has the values of extra fields, such as {"age": 3, "box": [0.1, 0.2], "caption": "a cat"}.
    The values give the type of a field: int for whole numbers, float for other numbers, vector for sequences of
    numbers, and text for str. All items have the same fields with the same types. `jobs` is the number of worker
    processes, by default the number of usable cores. The other arguments are the options of `alexprep build-lmdb`.

    If a build was interrupted, the same call with the same items resumes the build. Raises UserError for a wrong
    argument or item, and in all cases in which `alexprep build-lmdb` ends with an error. Raises DiskFull if the disk is
    full.

        from prep.build import build_from

        build_from(((image, label, f"{k:08d}") for k, (image, label) in enumerate(dataset)), "store")
    """
    store = Path(store)
    background = background or background_of(store, restart) or DEFAULT_BACKGROUND
    settings = Settings(side, keep_aspect, format, quality, filter, seed, background, reduce_above)
    _check_arguments(settings, split, on_bad, on_warning)
    double = next((name for name, count in Counter(classes).items() if count > 1), None)
    if double is not None:
        raise UserError(f"classes: {double} occurs twice. Expected the name of each class once.")
    work = store / f".items-{split}"
    limits = InputLimits(max_pixels, on_warning == "keep", time_limit)
    policy = BuildPolicy(on_bad == "skip" or max_bad is not None, max_bad, restart, allow_empty_classes, limits)
    options = ListOptions(allow_empty_classes=allow_empty_classes)
    with disk_errors(store):
        work.mkdir(parents=True, exist_ok=True)
        try:
            with hold_lock(work, "build"):
                rows, extra = _write_items(items, work / "items", settings, split)
                known = Store.open(store).classes if (store / "manifest.json").exists() else ()
                names = classes or (order_classes(rows.texts, str(store)) if rows.labels_are_names else known)
                found = rows.found(names, options, known, in_class_folders=False)
                source = label_inputs(ItemReader(work / "items"), found, split, options, known)
                source = replace(source, extra=extra)
                with (
                    WorkerPool(jobs or usable_cores(), preload="prep.build.shard_task") as workers,
                    progress(f"{split}: rescaling", len(source.inputs), "pictures") as build_progress,
                ):
                    return build_split(source, store, settings, workers, build_progress, policy)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _check_arguments(settings: Settings, split: str, on_bad: str, on_warning: str) -> None:
    for name, value, choices in (
        ("split", split, SPLITS),
        ("format", settings.format, FORMATS),
        ("filter", settings.filter, FILTERS),
        ("background", settings.background, (*BACKGROUNDS, DROPPED)),
        ("on_bad", on_bad, ("fail", "skip")),
        ("on_warning", on_warning, ("keep", "bad")),
    ):
        if value not in choices:
            raise UserError(f"{name}={value!r}: expected one of {', '.join(choices)}.")
    for name, number, lowest, highest in (
        ("side", settings.side_px, 32, 4096),
        ("quality", settings.quality, 1, 100),
        ("seed", settings.seed, 0, 2**63 - 1),
    ):
        if not lowest <= number <= highest:
            raise UserError(f"{name}={number}: expected {lowest} to {highest}.")


def _write_items(
    items: Iterable[Item], path: Path, settings: Settings, split: str
) -> tuple[LabelledRows, dict[str, Column]]:
    """Write all images into the file `path`. Return the inputs, sorted by path, and the columns of the extra fields.

    Items have no modification time. `mtime_ns` of an input is therefore the CRC-32 of its content.
    """
    rows, values = LabelledRows(f"the {split} items"), ItemValues()
    total = len(items) if isinstance(items, Sized) else 0
    with open(path, "wb") as file, progress(f"{split}: reading items", total, "items") as item_progress:
        for number, item in enumerate(items):
            if not isinstance(item, Sequence) or len(item) not in (3, 4):
                raise UserError(f"item {number} is a {type(item).__name__}; expected (image, label, name).")
            image, label, name = item[:3]
            extra = item[3] if len(item) == 4 else {}
            if not isinstance(extra, Mapping):
                raise UserError(
                    f"item {number}: extra is a {type(extra).__name__}; expected a dict of values by field."
                )
            values.add(extra, number)
            path_bytes = _name_bytes(name, number)
            text = _utf8_text(label) if isinstance(label, str) else str(_position(label, number))
            is_name = isinstance(label, str)
            if rows.texts and is_name != rows.labels_are_names:
                raise UserError(
                    f"item {number}: label {label!r}; expected class names in all items, or positions in all items."
                )
            rows.labels_are_names = is_name
            content = _encode(image, settings, number)
            location = pack_location(0, file.tell())
            rows.add(path_bytes, text, len(content), zlib.crc32(content), location)
            file.write(content)
            item_progress.advance()
    order = np.array(sorted(range(len(rows.rows)), key=rows.rows.path), np.int64)
    rows.sort()  # a call that resumes a build may get the items in another order than the first call
    return rows, {name: column.take(order) for name, column in values.columns().items()}


def _name_bytes(name: object, number: int) -> bytes:
    encoded = os.fsencode(_utf8_text(name)) if isinstance(name, str) else name
    if not isinstance(encoded, bytes) or not encoded:
        raise UserError(f"item {number}: name {name!r}; expected a text that is not empty, such as cat/1.jpg.")
    return encoded


def _utf8_text(text: str) -> str:
    """Return the text with escapes for surrogates, which UTF-8 cannot write."""
    return text.encode("utf-8", "backslashreplace").decode()


def _position(label: object, number: int) -> int:
    try:
        position = as_integer(label)  # type: ignore[arg-type]  # also NumPy's and torch's integers
    except TypeError:
        position = -1
    if position < 0 or isinstance(label, bool):
        raise UserError(f"item {number}: label {label!r}; expected the name of a class or a position from 0.")
    return position


def _encode(image: object, settings: Settings, number: int) -> bytes:
    """Return the bytes that are written for an item: the type and the content."""
    if isinstance(image, bytes | bytearray | memoryview):
        return _FILE + bytes(image)
    if isinstance(image, Image.Image):
        try:
            return _encode_pillow_image(image, settings)
        except Exception as error:  # Pillow decodes the file only at this point, and can raise any exception
            reason = str(error) if isinstance(error, BadImage) else f"cannot be decoded: {error or repr(error)}"
            return _BAD + escaped(reason).encode()
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        kind = f"{pixels.dtype} of shape {pixels.shape}" if pixels.dtype != object else type(image).__name__
        raise UserError(
            f"item {number}: image is {kind}; expected bytes, a PIL image or pixels as uint8 (height, width, 3). "
            "Leave out transforms such as ToTensor."
        )
    return _encode_pixels(pixels, settings)


def _encode_pillow_image(image: Image.Image, settings: Settings) -> bytes:
    """Return the bytes of an item that is a PIL image. Raises BadImage, or any exception of Pillow."""
    image.load()
    if not image.width * image.height:
        raise BadImage(f"{image.width}×{image.height}: no pixels")
    if image.mode == "I" and image.format == "PPM":  # 16-bit grey levels
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode in ("I", "F"):
        raise BadImage(f"pixel type {image.mode}, expected 8 or 16 bits per channel")
    image = image.convert(_CONVERTED.get(image.mode, image.mode))
    if image.mode == "RGB" and not isinstance(image.info.get("transparency"), tuple):
        return _encode_pixels(np.asarray(image), settings)
    out = io.BytesIO()
    image.save(out, "PNG" if image.mode in _PNG_MODES else "TIFF")
    return _FILE + out.getvalue()


def _encode_pixels(pixels: Pixels, settings: Settings) -> bytes:
    """Return the bytes of an item that is an array of pixels."""
    if min(pixels.shape[:2]) > settings.side_px:
        try:
            check_rescaled_size(pixels, settings.side_px, settings.keep_aspect)
            pixels = rescale(pixels, settings.side_px, settings.keep_aspect, settings.filter)
        except BadImage:  # the build later reports this input by its name
            pass
    height, width = pixels.shape[:2]
    return b"".join((_PIXELS, height.to_bytes(4), width.to_bytes(4), pixels.tobytes()))
