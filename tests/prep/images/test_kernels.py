"""The compiled kernels of prep.images are compared with NumPy. Missing, old and wrong libraries must not be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from prep import compiled
from prep.build.split import build_split
from prep.console import Progress
from prep.images import kernels
from prep.images.color_stats import PixelSums
from prep.images.rescale import rescale
from prep.inputs.sources import list_source
from prep.store.manifest import FILTERS, Settings
from tests.helpers.building import InlineRunner
from tools.compile_native import compile_native

needs_kernels = pytest.mark.skipif(kernels.native is None, reason="the kernels were not compiled")


def load(path: Path) -> kernels.NativeKernels | None:
    return compiled.load(path, kernels.NativeKernels, kernels.is_correct)


Pixels = npt.NDArray[np.uint8]


def noise(height: int, width: int) -> Pixels:
    """Return uniform noise. In the upper third, each value is 0 or 255."""
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 3] = np.where(pixels[: height // 3] < 128, 0, 255)
    return pixels


def rescale_with_numpy(pixels: Pixels, side: int, keep_aspect: bool, filter: str = "area") -> Pixels:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "native", None)
        return rescale(pixels, side, keep_aspect, filter)


@needs_kernels
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("keep_aspect", [False, True])
def test_kernels_rescale_to_the_same_pixels_as_numpy(filter: str, keep_aspect: bool) -> None:
    """Rescales images of usual ILSVRC sizes, strong reductions, narrow strips, enlargements, and random sizes."""
    sizes = [(375, 500, 256), (500, 375, 256), (333, 500, 256), (257, 256, 256), (1200, 1600, 256), (300, 4000, 256)]
    sizes += [(4000, 300, 256), (64, 65, 64), (32, 1, 1), (1, 1, 1), (97, 33, 32), (2000, 1999, 33), (150, 140, 256)]
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes.append(tuple(int(number) for number in rng.integers((1, 1, 1), (200, 200, 100))))
    for height, width, side in sizes:
        pixels = noise(height, width)
        expected = rescale_with_numpy(pixels, side, keep_aspect, filter)
        assert np.array_equal(rescale(pixels, side, keep_aspect, filter), expected), (height, width, side)


@needs_kernels
def test_views_that_are_not_contiguous_are_rescaled() -> None:
    pixels = noise(400, 900)
    for view in (pixels[::2, 5:605], pixels[:, ::-1], pixels.transpose(1, 0, 2), pixels[:, :, ::-1]):
        assert np.array_equal(rescale(view, 100), rescale_with_numpy(view.copy(), 100, False))


@needs_kernels
def test_kernels_access_no_memory_outside_of_their_arrays() -> None:
    """Each array ends at the end of a memory page, and the pages before and after the array are protected.

    An access to a protected page kills the process.
    """
    program = """
import ctypes, mmap, numpy as np
from prep import compiled
from prep.images import kernels
from prep.images.rescale import rescale
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.PAGESIZE
def fenced(array):
    pages = -(-array.nbytes // page)
    area = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for fence in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
    offset = (pages + 1) * page - array.nbytes
    copy = np.frombuffer(area, array.dtype, array.size, offset).reshape(array.shape)
    copy[:] = array
    return copy
assert kernels.native
kept = []
rng = np.random.default_rng(0)
sizes = (41, 50, 32), (20, 33, 32), (32, 33, 32), (100, 32, 32), (64, 64, 32), (33, 90, 7), (375, 500, 256)
for height, width, side in sizes:
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    kept.append(fenced(pixels))
    for keep_aspect in (False, True):
        assert np.array_equal(rescale(kept[-1], side, keep_aspect), rescale(pixels, side, keep_aspect))
    sums, square = fenced(np.zeros(9, np.int64)), fenced(np.zeros((side, side, 3), np.uint16))
    kernels.native.add_moments(kept[-1], sums)
    part = rescale(pixels, side)
    kernels.native.add_square(fenced(part), square)
    assert sums[0] == pixels[..., 0].sum(dtype=int) and square.sum() == part.sum(dtype=int)
    kept += sums, square
import os
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


@needs_kernels
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (70, 64), (129, 127), (300, 200), (130, 5000)])
def test_kernels_give_the_same_sums_as_numpy(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    side = min(64, *size)
    computed, expected = PixelSums(side), PixelSums(side)
    images = [noise(*size), np.full((*size, 3), 255, np.uint8), noise(*size)[:, ::-1]]
    for image in images:
        computed.add(image)
    monkeypatch.setattr(kernels, "native", None)
    for image in images:
        expected.add(image)
    assert computed.moments == expected.moments
    assert np.array_equal(computed.square_sum(), expected.square_sum())


@pytest.mark.parametrize("filter", ["area", "lanczos"])
def test_a_store_built_without_kernels_is_the_same(
    filter: str, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    for name in ("with", "without"):
        source = list_source(photo_folder / "train", "train")
        store = build_split(
            source,
            tmp_path / name,
            Settings(64, False, "jpeg", 90, filter, 0),
            InlineRunner(),
            Progress(len(source.inputs), "pictures"),
        )
        built.append((store.split("train").fingerprint, store.split("train").moments, store.mean_image().tolist()))
        monkeypatch.setattr(kernels, "native", None)
    assert built[0] == built[1]


def test_kernels_are_not_loaded_if_missing_broken_or_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(tmp_path / "absent.so") is None
    (tmp_path / "torn.so").write_bytes(b"\x7fELF and no more")
    assert load(tmp_path / "torn.so") is None
    monkeypatch.setenv("ALEXNET_NATIVE", "0")
    assert load(compiled.library_path(kernels.SOURCE)) is None


def compiled_with(flags: str, text: str, folder: Path) -> Path | None:
    """Compile `text` and return the library. `flags` override the usual compiler flags."""
    folder.mkdir(exist_ok=True)
    compiler, source = folder / "compiler", folder / "kernels.c"
    compiler.write_text(f'#!/bin/sh\nexec cc "$@" {flags}\n')
    compiler.chmod(0o755)
    source.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", str(compiler))
        return compile_native(source)


@pytest.mark.usefixtures("c_compiler")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # an error in the sum for an output row that needs two input rows
        ("rows[j] + weights[1] * second[j];", "rows[j] + weights[1] * rows[j];"),
        ("weights[2] * third[j]", "weights[2] * second[j]"),
        ("+= weights[t] * rows[t * stride + j]", "+= weights[t] * rows[t * stride + j + 1]"),
        ("12582912.0f", "12582913.0f"),
        ("out[j] + ROUNDING - ROUNDING", "out[j]"),
        ("sum += weights[t] *", "sum += weights[0] *"),
        ("level < 0 ? 0 :", ""),
        ("6755399441055744.0", "6755399441055745.0"),
        ("taps--;", "taps = 1;"),
        ("rr += red * red", "rr += red * green"),
        ("sums[j] += lines[j]", "sums[j] = lines[j]"),
        ("void add_lines", "void add_columns"),
    ],
)
def test_a_library_that_computes_wrong_results_is_not_used(tmp_path: Path, right: str, wrong: str) -> None:
    """Each case adds an error to the C source. The self-test of the compiled library must detect the error.

    The library is compiled with -O1 and without function clones, which takes a ninth of the usual time.
    """
    text = kernels.SOURCE.read_text()
    assert text.count(right) == 1
    library = compiled_with("-UCLONES -O1", text.replace(right, wrong), tmp_path)
    assert library and load(library) is None


@pytest.mark.usefixtures("c_compiler")
def test_compiling_replaces_libraries_of_earlier_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels.c"
    source.write_bytes(kernels.SOURCE.read_bytes())
    (tmp_path / "kernels-0123456789abcdef.so").write_bytes(b"old")
    library = compile_native(source)
    assert library and sorted(tmp_path.iterdir()) == sorted([source, library])
    assert load(library)
    assert compiled.library_path(source) == library
    source.write_text(source.read_text() + "\n")
    assert not compiled.library_path(source).exists()  # a library compiled from another source is never loaded


@pytest.mark.usefixtures("c_compiler")
def test_a_changed_header_changes_the_name_of_the_library(tmp_path: Path) -> None:
    source, header = tmp_path / "kernels.c", tmp_path / "number.h"
    source.write_text('#include <stdint.h>\n#include "number.h"\nint64_t number(void) { return NUMBER; }\n')
    header.write_text("#define NUMBER 3\n")
    library = compile_native(source)
    assert library and library == compiled.library_path(source)
    header.write_text("#define NUMBER 4\n")
    assert not compiled.library_path(source).exists()
    assert compile_native(source) == compiled.library_path(source) and not library.exists()


@pytest.mark.usefixtures("c_compiler")
def test_every_kind_of_cpu_gives_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are compiled in four ways: as usual, unoptimized, without fused multiply-add, and for this CPU."""
    images = [noise(375, 500), noise(257, 300), noise(900, 700)]
    expected = [rescale_with_numpy(image, 256, False) for image in images]
    for number, flags in enumerate(("", "-UCLONES -O0", "-UCLONES -O1 -ffp-contract=off", "-UCLONES -march=native")):
        library = compiled_with(flags, kernels.SOURCE.read_text(), tmp_path / str(number))
        assert library
        monkeypatch.setattr(kernels, "native", load(library))
        assert kernels.native
        for image, wanted in zip(images, expected, strict=True):
            assert np.array_equal(rescale(image), wanted), flags


def test_compiling_without_a_working_compiler_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "kernels.c"
    source.write_bytes(kernels.SOURCE.read_bytes())
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CC", compiler)
        assert compile_native(source) is None
        assert list(tmp_path.iterdir()) == [source]


def test_images_with_strides_of_zero_are_read_correctly() -> None:
    """A grey image that is broadcast to RGB has a stride of zero."""
    grey = noise(90, 70)[:, :, :1]
    broadcast = np.broadcast_to(grey, (90, 70, 3))
    assert np.array_equal(rescale(broadcast, 50), rescale(np.repeat(grey, 3, axis=2), 50))
    sums = PixelSums(50)
    sums.add(broadcast)
    expected = np.asarray(Image.fromarray(grey[:, :, 0])).astype(np.int64)
    assert sums.moments.total == (expected.sum(),) * 3
