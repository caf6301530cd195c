"""CPU engine: memory bounds and self-test of the C kernel, number of threads, and reuse of memory."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.augment import Augmentation
from pipeline.engines import kernels
from pipeline.engines.cpu_engine import _BlockPool
from pipeline.loader import eval_loader, train_loader
from prep import compiled
from tests.conftest import compile_changed
from tests.pipeline.streaming import needs_kernel
from tools.compile_native import FLAGS


@pytest.mark.usefixtures("c_compiler")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("rows[side + j] = pixels[3 * j + 1]", "rows[side + j] = pixels[3 * j + 2]"),
        ("(pixel + shift - mean) * scale", "(pixel + shift - mean)"),
        ("(pixel + shift - mean) * scale", "(pixel + shift * scale - mean * scale)"),
        ("(c * mean_side + i) * mean_side", "(c * side + i) * mean_side"),
        ("augment(row[side - 1 - j], shift, mean[j], scale)", "augment(row[j], shift, mean[j], scale)"),
        ("augment(row[side - 1 - j], shift, 0, scale)", "augment(row[side - j], shift, 0, scale)"),
        ("cur->shift[j % 3]", "cur->shift[0]"),
        ("restrict mean = cur->mean + 3 * i * mean_side", "restrict mean = cur->mean + 3 * i * side"),
        ("rows[c * side + side - 1 - j]", "rows[c * side + j]"),
        ("augment(row[j], shifts[j], 0, scale[j])", "augment(row[j], 0, 0, scale[j])"),
        ("(uint8_t *)b->out + n * b->side", "(uint8_t *)b->out + k * b->side"),
        ("pixels + i * stride, row_bytes", "pixels + i * row_bytes, row_bytes"),
        # resample.h
        ("ROUND_HALF = 1 << (WEIGHT_BITS - 1)", "ROUND_HALF = 0"),
        ("rounded((i + 0.5) * scale)", "rounded(i * scale)"),
        ("(int64_t)(centre + support + 0.5)", "(int64_t)(centre + support)"),
        ("weight[t] / sum", "weight[t] / support"),
        ("one & ((1 << LOW_BITS) - 1)", "one & ((1 << (LOW_BITS - 1)) - 1)"),
        ("(used + 1) / 2", "used / 2"),
        ("in + k * stride, 3 * width", "in + k * stride, 3 * width - 3"),
        ("memcpy(out, line, 3 * side)", "memcpy(out, line, 3 * side - 3)"),
        # effects.h
        ("value < 0 ? 0 : value > 255", "value < 0 ? 1 : value > 255"),
        ("4 * unit - k ? k : 4 * unit - k", "3 * unit - k ? k : 3 * unit - k"),
        ("level * 257 >> 16", "level * 240 >> 16"),
        ("2 * chroma + blue - red", "2 * chroma + red - blue"),
        ("hue * (1 << FACTOR_BITS) + chroma", "hue * (1 << FACTOR_BITS) - chroma"),
        ("2 * side - 2 - i", "2 * side - 1 - i"),
        ("row[side - 1 - k] << ROW_BITS", "row[side - k] << ROW_BITS"),
        ("(radius + 1) / 2", "radius / 2"),
        ("i < top + height", "i < top + height - 1"),
    ],
)
def test_a_library_that_computes_wrongly_is_not_used(tmp_path: Path, right: str, wrong: str) -> None:
    library = compile_changed(kernels.SOURCE, tmp_path, right, wrong)
    assert compiled.load(library, kernels.NativeKernels, kernels.is_correct) is None


@pytest.mark.usefixtures("c_compiler")
@pytest.mark.parametrize("flags", ["-O0", "-O3 -march=native"])
def test_all_compiler_flags_give_the_same_bits(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    """Two settings have a mean image. The third setting has resized windows with all effects."""
    settings = (
        ("NCHW", Augmentation(mean="aligned", divisor=1.1)),
        ("NHWC", Augmentation(mean="aligned", divisor=1.1)),
        ("NCHW", replace(Augmentation.preset("simclr"), size_px=64, erase=0.5)),
    )

    def batches() -> list[torch.Tensor]:
        images = []
        for layout, augmentation in settings:
            with train_loader(stores["ppm"], 10, seed=5, augmentation=augmentation, layout=layout) as loader:
                images.append(next(iter(loader)).images)
        return images

    expected, library = batches(), tmp_path / "kernels.so"
    subprocess.run(["cc", *FLAGS, *flags.split(), str(kernels.SOURCE), "-o", str(library)], check=True)
    monkeypatch.setattr(kernels, "native", compiled.load(library, kernels.NativeKernels, kernels.is_correct))
    assert kernels.native
    assert all(torch.equal(found, wanted) for found, wanted in zip(batches(), expected, strict=True))


@needs_kernel
def test_the_kernel_stays_within_image_mean_and_output() -> None:
    """Each array begins or ends at a protected page, so an access outside of the array kills the subprocess."""
    program = """
import ctypes, itertools, mmap, os, numpy as np
from pipeline.engines.kernels import CROP_DTYPE, native as kernel
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.PAGESIZE
def fenced(shape, dtype, last):
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    pages = -(-nbytes // page)
    area = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for fence in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
    at = (pages + 1) * page - nbytes if last else page
    return np.frombuffer(area, dtype, int(np.prod(shape)), at).reshape(shape)
assert kernel
kept = []
for side, last, layout, flip in itertools.product((1, 2, 31, 32, 33, 224), (0, 1), ("NCHW", "NHWC"), (0, 1)):
    image, mean = fenced((side, side, 3), np.uint8, last), fenced((3, side, side), np.float32, last)
    out = fenced((1, 3, side, side) if layout == "NCHW" else (1, side, side, 3), np.float32, last)
    image[:] = 7
    crop = np.zeros(1, CROP_DTYPE)
    crop["pixels"], crop["mean"], crop["stride"], crop["flip"] = (
        image.ctypes.data, mean.ctypes.data, 3 * side, flip)
    kernel.crop(crop, layout, side, 0.5, out)
    assert (out == 3.5).all()
    crop["mean"], out[:] = 0, 0
    kernel.crop(crop, layout, side, 0.5, out)
    assert (out == 3.5).all()
    kept += image, mean, out
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


@needs_kernel
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_the_bits_do_not_depend_on_the_number_of_threads(stores: dict[str, Path], threads: int) -> None:
    """A batch has 10 images: the ten views of one record. With 16 threads, some threads get no image."""

    def views(threads: int) -> list[torch.Tensor]:
        with eval_loader(stores["jpeg-whole"], 1, views=10, threads=threads) as loader:
            return [batch.images for batch in itertools.islice(loader, 3)]

    assert all(torch.equal(a, b) for a, b in zip(views(1), views(threads), strict=True))


def test_batches_that_are_kept_are_not_overwritten(stores: dict[str, Path]) -> None:
    """The test keeps every third batch. The engine reuses the memory of the batches that are not kept."""
    with train_loader(stores["ppm"], 5, seed=1) as loader:
        first = [batch.images.clone() for _ in range(2) for batch in loader]
        loader.seek(0)
        kept = []
        for k, batch in enumerate(batch for _ in range(2) for batch in loader):
            if k % 3 == 1:
                kept.append((k, batch.images[2:4]))  # while this slice exists, the memory of the batch is not reused
            elif k % 3 == 2:
                batch.images.fill_(k)
    assert all(torch.equal(part, first[k][2:4]) for k, part in kept) and len(kept) == 4


def test_a_block_is_reused_once_no_tensor_refers_to_it() -> None:
    memory = _BlockPool()
    array = memory.array((4, 5))
    assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous and array.flags.writeable
    address, tensor = array.ctypes.data, torch.from_numpy(array)
    del array
    view = tensor[1:2]
    del tensor
    assert memory.array((4, 5)).ctypes.data != address  # `view` still refers to the first block
    del view
    gc.collect()
    addresses = {held.ctypes.data for held in [memory.array((4, 5)), memory.array((4, 5))]}
    assert address in addresses
    held = [memory.array((4, 5)) for _ in range(9)]
    del held
    assert len(memory._free) == 3
    outstanding = memory.array((4, 5))
    memory.close()
    del outstanding
    assert not memory._free


def test_an_array_of_another_size_gets_a_block_of_its_own() -> None:
    memory = _BlockPool()
    memory.array((9, 9))
    assert memory.array((2, 3)).size == 6 and memory.array((90, 90)).size == 8100
