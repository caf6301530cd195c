"""Decoding by the C kernel: comparison with simplejpeg and Pillow, damaged files, and machines without libjpeg."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pipeline.augment import Augmentation
from pipeline.engines import kernels
from pipeline.engines.cpu_engine import CpuEngine
from pipeline.engines.dali_engine import DaliEngine
from pipeline.engines.libjpeg import JpegLibrary, find_libjpeg
from pipeline.loader import eval_loader, train_loader
from prep import compiled
from prep.images.jpeg import decode_jpeg, encode_jpeg
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Store, StoreError
from tests.conftest import compile_changed

Pixels = npt.NDArray[np.uint8]
needs_decoder = pytest.mark.skipif(
    kernels.native is None or kernels.native.jpeg is None, reason="no C compiler or no libjpeg"
)


def photograph(height: int, width: int, seed: int = 0) -> Pixels:
    """Return an image with coarse and fine structure in saturated colours."""
    rng = np.random.default_rng([height, width, seed])
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + rng.integers(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)


def decode(
    files: Sequence[bytes], positions: Sequence[Sequence[tuple[int, int]]], side: int, threads: int = 1
) -> tuple[npt.NDArray[np.float32], int]:
    """Return the crops (N · V, side, side, 3) of N files at V positions each.

    Also returns the index of the first bad file, or N if there is no bad file.
    """
    assert kernels.native
    arrays = [np.frombuffer(file, np.uint8) for file in files]
    count, views = len(files), len(positions[0])
    out = np.full((count * views, side, side, 3), np.nan, np.float32)
    job = kernels.BatchJob(
        kernels.native.jpeg,
        np.array([kernels.address(array) for array in arrays], np.uint64),
        np.array([len(file) for file in files], np.int64),
        np.zeros((count, 2), np.int32),
        np.array(positions, np.int32),
        np.zeros((count, views), np.int32),
        np.zeros((count, 3), np.float32),
        None,
        0,
        side,
        "NHWC",
        1.0,
        out,
    )
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(kernels.native.make_images, job) for _ in range(threads)]:
            future.result()
    return out, job.failed


@needs_decoder
@pytest.mark.parametrize(("height", "width"), [(64, 64), (67, 90), (91, 66), (256, 301)])
def test_a_decoded_part_has_the_pixels_of_the_complete_image(height: int, width: int) -> None:
    """Parts begin and end at every position in JPEG's blocks of 16 × 16 px, and at the edges of the image."""
    content, side = encode_jpeg(photograph(height, width), 90), 40
    complete = decode_jpeg(content)
    rows, columns = [(*range(19), size - side - 1, size - side) for size in (height, width)]
    positions = [(y, x) for y in rows for x in columns]
    for many in ([[position] for position in positions], [positions]):
        out, failed = decode([content] * len(many), many, side)
        assert failed == len(many)
        for image, (y, x) in zip(out, positions, strict=True):
            assert np.array_equal(image, complete[y : y + side, x : x + side])


@needs_decoder
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_files_of_other_programs_are_decoded_as_pillow_decodes_them(options: dict[str, int], mode: str) -> None:
    image, file = Image.fromarray(photograph(120, 150)).convert(mode), io.BytesIO()
    image.save(file, "JPEG", **options)
    expected = np.asarray(Image.open(file).convert("RGB"))
    out, _ = decode([file.getvalue()] * 2, [[(30, 47)], [(0, 70)]], 80)
    assert np.array_equal(out[0], expected[30:110, 47:127]) and np.array_equal(out[1], expected[:80, 70:])


@needs_decoder
@pytest.mark.parametrize("threads", [1, 3])
def test_images_of_different_sizes_do_not_mix(threads: int) -> None:
    sizes = np.random.default_rng(0).integers(40, 400, (60, 2)).tolist()
    images = [encode_jpeg(photograph(*size), 80) for size in sizes]
    out, failed = decode(images, [[(height - 40, width - 40)] for height, width in sizes], 40, threads)
    assert failed == 60
    assert all(np.array_equal(image, decode_jpeg(file)[-40:, -40:]) for image, file in zip(out, images, strict=True))


GOOD = encode_jpeg(photograph(100, 100), 90)
DAMAGED = {
    "empty": b"",
    "no jpeg": bytes(3000),
    "header only": GOOD[:200],
    "cut off": GOOD[: len(GOOD) // 2],
    "zeros": GOOD[: len(GOOD) // 2] + bytes(len(GOOD) // 2),
    "ones": GOOD[: len(GOOD) // 2] + b"\xff\x01" * 400,
    "too small": encode_jpeg(photograph(100, 99), 90),
    "too low": encode_jpeg(photograph(99, 100), 90),
}


@needs_decoder
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("damage", DAMAGED)
def test_the_first_damaged_file_is_named_and_later_batches_are_right(damage: str, threads: int) -> None:
    files = [GOOD] * 9
    files[4], files[7] = DAMAGED[damage], DAMAGED[damage]
    positions = [[(50, 50)]] * 9
    for _ in range(20):
        out, failed = decode(files, positions, 50, threads)
        assert failed == 4
        assert all(np.array_equal(image, decode_jpeg(GOOD)[50:, 50:]) for image in out[:4])
    assert decode([GOOD], [[(50, 50)]], 50)[1] == 1


@needs_decoder
def test_a_part_beyond_the_image_is_refused() -> None:
    for position in ((-1, 0), (0, -1), (51, 0), (0, 51)):
        assert decode([GOOD], [[position]], 50)[1] == 0


@needs_decoder
def test_random_bytes_never_crash_the_decoder() -> None:
    program = """
import numpy as np
from tests.pipeline.engines.test_kernels import GOOD, decode
rng, failures = np.random.default_rng(0), 0
for turn in range(600):
    file = bytearray(GOOD)
    for _ in range(1 + turn % 5):
        file[rng.integers(2, 700 if turn % 2 else len(file))] = rng.integers(0, 256)
    failures += decode([bytes(file[: rng.integers(100, len(file) + 1)])], [[(30, 20)]], 50)[1] == 0
print(failures)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 200, (done.returncode, done.stderr)


@needs_decoder
@pytest.mark.usefixtures("c_compiler")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("JPEG_API_VERSION = 62", "JPEG_API_VERSION = 80"),
        ("rest[632 - 144]", "rest[640 - 144]"),
        ("COLOUR_RGB = 2", "COLOUR_RGB = 3"),
        ("DCT_SLOW = 0", "DCT_SLOW = 1"),
        ("do_fancy_upsampling = 1", "do_fancy_upsampling = 0"),
        ("left > 0 ? left - 1 : 0", "left"),
        ("? right + 1 : right)", "? right : right)"),
        ("if (level < 0)", "if (level < -1)"),
        ("jpeg->skip(decoder, top);", "jpeg->skip(decoder, top - 1);"),
        ("self->pixels.at + 3 * (left - first)", "self->pixels.at"),
    ],
)
def test_a_decoder_that_decodes_wrongly_is_not_used(tmp_path: Path, right: str, wrong: str) -> None:
    library = compile_changed(kernels.SOURCE, tmp_path, right, wrong)
    loaded = compiled.load(library, kernels.NativeKernels, kernels.is_correct)
    assert loaded and loaded.jpeg is None


def batches(store: Path, **options: object) -> list[torch.Tensor]:
    with train_loader(store, 8, seed=3, **options) as loader, eval_loader(store, 3, views=10) as views:
        return [next(iter(loader)).images.clone(), next(iter(views)).images.clone()]


@needs_decoder
@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole"])
def test_without_libjpeg_dali_serves_the_same_stream(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """DALI's crop_mirror_normalize rounds differently from the C kernel. Pixels differ by at most 1e-4 grey levels."""
    augmentation = Augmentation(mean="none", colour="off")
    assert isinstance(engine_of(stores[kind]), CpuEngine)
    expected = batches(stores[kind], augmentation=augmentation)
    monkeypatch.setattr(kernels.native, "jpeg", None)
    assert isinstance(engine_of(stores[kind]), DaliEngine) and isinstance(engine_of(stores["ppm"]), CpuEngine)
    found = batches(stores[kind], augmentation=augmentation)
    assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], rtol=0, atol=1e-4)


def engine_of(store: Path) -> object:
    with eval_loader(store, 1) as loader:
        return loader._prefetcher._engine


@needs_decoder
def test_libjpeg_is_found_only_where_it_can_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(find_libjpeg(), JpegLibrary)

    def fail(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", fail)
    assert find_libjpeg() is None


@needs_decoder
@pytest.mark.parametrize("threads", [1, 4])
def test_a_damaged_jpeg_in_the_middle_of_a_batch_is_named(
    stores: dict[str, Path], tmp_path: Path, threads: int
) -> None:
    """The checksum of the record is right, so only the decoder can find the damage."""
    root = Path(shutil.copytree(stores["jpeg"], tmp_path / "store"))
    folder = Store.open(root).shard_paths("val")[0]
    key, value = list(lmdb_shard.read(Path(folder)))[7]
    with lmdb.open(folder, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        datum = Datum.decode(value)
        txn.put(key, replace(datum, data=datum.data[: len(datum.data) // 2]).encode())
    with eval_loader(root, 5, threads=threads) as loader:
        served = iter(loader)
        assert len(next(served).labels) == 5
        for _ in range(2):
            with pytest.raises(StoreError, match=f"^{folder}, key {key.decode()}, source .*: cannot be decoded: .*"):
                list(loader)
