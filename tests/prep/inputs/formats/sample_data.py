"""The same photographs in every layout.

If a library defines a layout, the library writes the files. This module writes the files of the other layouts.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from prep.build.split import build_split
from prep.console import Progress
from prep.inputs.reader import DEFAULT_OPTIONS, ListOptions
from prep.inputs.sources import find_splits, list_source
from prep.store.manifest import SPLITS, Store
from prep.workers import Runner
from tests.helpers.building import PPM, InlineRunner

CLASSES = ("n01", "n02")
Pictures = dict[str, bytes]  # CLASS/FILE.jpg -> content


def make_pictures() -> Pictures:
    """Return three JPEGs of each class."""
    rng = np.random.default_rng(16)
    pictures = {}
    for name in CLASSES:
        for number in range(3):
            out = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            coarse.resize((60, 50), Image.Resampling.BICUBIC).save(out, "JPEG")
            pictures[f"{name}/{name}_{number}.jpg"] = out.getvalue()
    return pictures


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def class_folders(pictures: Pictures, root: Path) -> Path:
    for name, content in pictures.items():
        put(root / name, content)
    return root


def class_tars(pictures: Pictures, root: Path) -> Path:
    """Write a folder like an unpacked ILSVRC2012_img_train.tar: one tar archive for each class. Return the folder."""
    root.mkdir()
    for folder in CLASSES:
        with tarfile.open(root / f"{folder}.tar", "w") as tar:
            for name, content in pictures.items():
                if name.startswith(folder):
                    _add(tar, name.partition("/")[2], content)
    return root


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def zip_of(compression: int, prefix: str = "") -> Callable[[Pictures, Path], Path]:
    def make(pictures: Pictures, root: Path) -> Path:
        path = root.with_suffix(".zip")
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in pictures.items():
                archive.writestr(prefix + name, content)
        return path

    return make


def streamed_zip(pictures: Pictures, root: Path) -> Path:
    """Return a zip archive that was written to a pipe.

    In such an archive, the sizes and the CRC-32 of a member follow its content. Here, zip64 fields hold the sizes.
    """

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.content = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.content += data
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in pictures.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(content)
    path = root.with_suffix(".zip")
    path.write_bytes(bytes(pipe.content))
    return path


def tiny_imagenet(pictures: Pictures, root: Path) -> Path:
    """Return a folder like the unpacked cs231n.stanford.edu/tiny-imagenet-200.zip."""
    for name, content in pictures.items():
        folder, _, file = name.partition("/")
        put(root / "train" / folder / "images" / file, content)
        put(root / "train" / folder / f"{folder}_boxes.txt", f"{file}\t0\t0\t9\t9\n".encode())
    lines = []
    for number, content in enumerate(pictures.values()):
        put(root / "val" / "images" / f"val_{number}.JPEG", content)
        lines.append(f"val_{number}.JPEG\t{list(pictures)[number].partition('/')[0]}\t0\t32\t44\t62\n")
    put(root / "val" / "val_annotations.txt", "".join(lines).encode())
    put(root / "test" / "images" / "test_0.JPEG", content)
    put(root / "wnids.txt", b"n02\nn01\n")
    return root


def zipped(make: Callable[[Pictures, Path], Path]) -> Callable[[Pictures, Path], Path]:
    """Return a function that packs the folder that `make` returns into a zip archive, under the folder's name."""

    def make_zip(pictures: Pictures, root: Path) -> Path:
        folder = make(pictures, root.with_name(f"{root.name}-folder"))
        path = root.with_suffix(".zip")
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, Path(folder.name) / file.relative_to(folder))
        return path

    return make_zip


def web_dataset(pictures: Pictures, root: Path) -> Path:
    """Return two shards with text labels, written by webdataset.ShardWriter."""
    root.mkdir()
    with webdataset.ShardWriter(str(root / "train-%06d.tar"), maxcount=4, verbose=0) as writer:
        for name, content in pictures.items():
            writer.write({"__key__": name.removesuffix(".jpg"), "jpg": content, "cls": name.partition("/")[0]})
    return root


def web_dataset_json(pictures: Pictures, root: Path) -> Path:
    """Return one shard as in timm/imagenet-1k-wds: names have no folders, and labels are in JSON."""
    path = root.with_suffix(".tar")
    with webdataset.TarWriter(str(path)) as writer:
        for name, content in pictures.items():
            folder, _, file = name.partition("/")
            key = file.removesuffix(".jpg")
            writer.write({"__key__": key, "jpg": content, "json": {"label": CLASSES.index(folder), "height": 50}})
    return path


def hugging_face_table(pictures: Pictures) -> pa.Table:
    """Return a table like those of `datasets.Dataset.to_parquet` (datasets/arrow_writer.py, features.py).

    The paths have no folders. The metadata of the schema contains column types and class names, as in `datasets`.
    """
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    schema = pa.schema({"image": image, "label": pa.int64()}, metadata=metadata)
    rows = [{"bytes": content, "path": name.partition("/")[2]} for name, content in pictures.items()]
    return pa.table([rows, [CLASSES.index(name[:3]) for name in pictures]], schema=schema)


def parquet(pictures: Pictures, root: Path) -> Path:
    """Return a folder like the repository imagenet-1k, with data/train-00000-of-00002.parquet and similar files."""
    (root / "data").mkdir(parents=True)
    table = hugging_face_table(pictures)
    for number in range(2):
        path = root / "data" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(table.slice(3 * number, 3), path, row_group_size=2)
    return root


def csv_file(pictures: Pictures, root: Path) -> Path:
    class_folders(pictures, root / "images")
    lines = [f"images/{name},{name.partition('/')[0]}\n" for name in pictures]
    put(root / "list.csv", ("path,label\n" + "".join(lines)).encode())
    return root / "list.csv"


LAYOUTS: dict[str, Callable[[Pictures, Path], Path]] = {
    "folders": class_folders,
    "class-tars": class_tars,
    "zip": zip_of(zipfile.ZIP_STORED),
    "zip, deflate": zip_of(zipfile.ZIP_DEFLATED, "photos/train/"),
    "zip, bzip2": zip_of(zipfile.ZIP_BZIP2),
    "zip, lzma": zip_of(zipfile.ZIP_LZMA),
    "zip, streamed": streamed_zip,
    "tiny-imagenet": tiny_imagenet,
    "tiny-imagenet, zip": zipped(tiny_imagenet),
    "webdataset": web_dataset,
    "parquet": parquet,
    "csv": csv_file,
}


def build_all(
    source: Path,
    store: Path,
    options: ListOptions = DEFAULT_OPTIONS,
    splits: Sequence[str] = SPLITS,
    runner: Runner | None = None,
) -> Store:
    """Build those of `splits` that are found in `source`."""
    classes: tuple[str, ...] = ()
    for split, where in find_splits(source, None).items():
        if split in splits:
            listed = list_source(where, split, options, classes)
            classes = listed.classes
            built = build_split(listed, store, PPM, runner or InlineRunner(), Progress(1, "pictures"))
    return built
