"""Python interface of kernels.c, the C kernel that decodes, crops or resizes, flips and normalizes images on a CPU.

`native` is None if the library is not compiled, fails its self-test or is switched off (prep/compiled.py). Without
`native`, streams of crops on a CPU use DALI, whose operator crop_mirror_normalize takes two to three times as long.

The libjpeg-turbo in Pillow's wheels decodes JPEG files. kernels.c calls the functions of this library directly. With
simplejpeg, a thread would need Python's GIL before and after each image, and would decode complete images.
`NativeKernels.jpeg` is None if libjpeg-turbo is not found, or if it fails the self-test `_decodes_correctly`. Without
libjpeg-turbo, streams of crops of JPEG records on a CPU use DALI.
"""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.effects.parameters import Effects
from pipeline.effects.sample import SIDE_PX, is_expected, sample_effects, sample_windows
from pipeline.engines.libjpeg import JpegLibrary, find_libjpeg
from prep import compiled
from prep.images.jpeg import decode_jpeg, encode_jpeg

SOURCE = Path(__file__).with_name("kernels.c")
CROP_DTYPE = np.dtype(  # same fields as struct crop in normalize.h
    [("pixels", np.uint64), ("stride", np.int64), ("mean", np.uint64), ("shift", np.float32, 3), ("flip", np.int32)]
)


class BatchJob(ctypes.Structure):
    """A batch for NativeKernels.make_images: struct batch in kernels.c, with N records and V crops of each record."""

    _fields_ = (
        ("next", ctypes.c_int64),
        ("failed", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("records", "views", "side", "mean_side")),
        *((name, ctypes.c_void_p) for name in ("jpeg", "payload", "payload_bytes", "size", "position", "extent")),
        *((name, ctypes.c_void_p) for name in ("flip", "shift", "mean", "out")),
        ("channels_last", ctypes.c_int32),
        ("scale", ctypes.c_float * 3),
        *((name, ctypes.c_void_p) for name in ("effects", "blur_weights")),
        ("weights", ctypes.c_int64),
        ("box", ctypes.c_void_p),
    )

    def __init__(
        self,
        jpeg: JpegLibrary | None,
        payload: npt.NDArray[np.uint64],
        payload_bytes: npt.NDArray[np.int64],
        size: npt.NDArray[np.int32],
        position: npt.NDArray[np.int32],
        flip: npt.NDArray[np.int32],
        shift: npt.NDArray[np.float32],
        mean: npt.NDArray[np.uint64] | None,
        mean_side_px: int,
        side_px: int,
        layout: str,
        scale: npt.ArrayLike,
        out: npt.NDArray[np.float32] | npt.NDArray[np.uint8] | None,
        extent: npt.NDArray[np.int32] | None = None,
        effects: Effects | None = None,
    ) -> None:
        """Describe a batch. The addresses are not checked: each address must point to memory that is large enough.

        jpeg           the decoder, or None if the records are raw
        payload        (N,): addresses of the JPEG files, or of the first pixels of the raw images (contiguous RGB)
        payload_bytes  (N,): sizes of the JPEG files, in bytes
        size           (N, 2): height and width of each image
        position       (N, V, 2): row and column of each crop in its image
        flip           (N, V): 1 if the crop is mirrored, otherwise 0
        shift          (N, 3): added to R, G and B
        mean           (N, V): for each crop, the address of the part of the mean image to subtract; None for no mean
        mean_side_px   side of the square mean image
        side_px        side of the crops
        layout         layout of `out` and of the mean image: "NCHW" or "NHWC"
        scale          factor of (pixel + shift − mean): one number, or three numbers for R, G and B
        out            (N · V, 3, side, side) or (N · V, side, side, 3); None: the records are only decoded
        extent         (N, V, 2): height and width of each crop, which is resized to `side_px`; None: nothing is resized
        effects        effects of the N · V images; None: no effects
        """
        arrays = [
            payload,
            payload_bytes,
            size,
            position,
            extent,
            flip,
            shift,
            mean,
            out,
            *([None] * 3 if effects is None else effects.for_kernel()),
        ]
        # This attribute keeps the arrays alive while the library uses their addresses.
        self.arrays = [None if array is None else np.ascontiguousarray(array) for array in arrays]
        pointers = [None if array is None else address(array) for array in self.arrays]
        count, views = flip.shape
        decoder = None if jpeg is None else ctypes.addressof(jpeg)
        is_nhwc = int(layout == "NHWC")
        *others, steps, weights, box = pointers
        super().__init__(*(0, count, count, views, side_px, mean_side_px, decoder, *others, is_nhwc), _three(scale))
        self.effects, self.blur_weights, self.box = steps, weights, box
        self.weights = 0 if effects is None else effects.weights.shape[1]

    @classmethod
    def of_squares(
        cls,
        jpeg: JpegLibrary | None,
        payload: npt.NDArray[np.uint64],
        payload_bytes: npt.NDArray[np.int64],
        size: npt.NDArray[np.int32],
        position: npt.NDArray[np.int32],
        out: npt.NDArray[np.uint8],
        extent: npt.NDArray[np.int32] | None = None,
    ) -> BatchJob:
        """Return a batch for NativeKernels.copy_squares; `out` is uint8 (N, V, side, side, 3).

        The other arguments are the arguments of __init__.
        """
        count, views, side = out.shape[:3]
        nothing, no_shift = np.zeros((count, views), np.int32), np.zeros((count, 3), np.float32)
        images = (payload, payload_bytes, size, position, nothing, no_shift)
        return cls(jpeg, *images, None, 0, side, "NHWC", 1.0, out, extent)


ALIGNMENT_BYTES = 64


def aligned_floats(block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the part of `block` (N,) that begins at the first address that is a multiple of ALIGNMENT_BYTES.

    On CPUs of AMD, the kernel writes images at such an address faster, past the CPU's cache.
    """
    return block[-address(block) % ALIGNMENT_BYTES // block.itemsize :]


def address(array: npt.NDArray[Any]) -> int:
    """Return the address of the first item of an array."""
    return int(array.__array_interface__["data"][0])


def _three(numbers: npt.ArrayLike) -> ctypes.Array[ctypes.c_float]:
    """Return three float32: the three numbers, or one number three times."""
    return (ctypes.c_float * 3)(*np.broadcast_to(numbers, 3).tolist())


class NativeKernels:
    """Functions of the compiled library. Raises AttributeError if the library lacks a function."""

    jpeg: JpegLibrary | None  # the decoder of JPEG files; None if no decoder can be used

    def __init__(self, library: ctypes.CDLL) -> None:
        self._crop = {"NCHW": library.crop_nchw, "NHWC": library.crop_nhwc}
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for function in self._crop.values():
            function.argtypes = [pointer, number, number, number, pointer, pointer]
            function.restype = None
        self._make_images = library.make_images
        self._make_images.argtypes = [ctypes.POINTER(BatchJob)]
        self._make_images.restype = None
        self._copy_squares = library.copy_squares
        self._copy_squares.argtypes = [ctypes.POINTER(BatchJob)]
        self._copy_squares.restype = None
        self.jpeg = find_libjpeg()
        if self.jpeg is not None and not _decodes_correctly(self, self.jpeg):
            self.jpeg = None

    def make_images(self, job: BatchJob) -> None:
        """Make the images of the records of a batch, one record after another, until no record is left.

        Each thread of the batch calls this method once. When all threads have returned, job.failed is the lowest index
        of a record that cannot be decoded. If no record is damaged, job.failed is N.
        """
        self._make_images(job)

    def copy_squares(self, job: BatchJob) -> None:
        """Copy or resize the crops of the records to `out`, the job's uint8 array, without flip, shift and mean.

        Each thread of the batch calls this method once. job.failed is set as in make_images.
        """
        self._copy_squares(job)

    def crop(
        self,
        crops: npt.NDArray[np.void],
        layout: str,
        mean_side_px: int,
        scale: npt.ArrayLike,
        out: npt.NDArray[np.float32],
    ) -> None:
        """Write (pixel + shift − mean) · scale for the pixels of each crop to `out`.

        crops         (N,) of CROP_DTYPE, contiguous. The addresses in this array are not checked: each address must
                      point to memory that is large enough. The address `mean` may be 0: then no mean is subtracted
        layout        layout of `out` and of the mean image: "NCHW" or "NHWC"
        mean_side_px  side of the square mean image; the field `mean` of a crop is an address in this image
        out           (N, 3, side, side) or (N, side, side, 3)
        """
        side = out.shape[2]
        scales = _three(scale)
        self._crop[layout](crops.ctypes.data, len(crops), side, mean_side_px, ctypes.addressof(scales), out.ctypes.data)


def is_correct(kernel: NativeKernels) -> bool:
    """Return True if the library computes a few small crops correctly.

    On CPUs of AMD, the crops of 32 px are written past the cache.
    """
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (47, 53, 3), dtype=np.uint8)
    mean = (255 * rng.random((41, 41, 3))).astype(np.float32)
    scale = np.array([0.5, 0.25, 2.0], np.float32)
    for side, layout, flip, with_mean in product((37, 32), ("NCHW", "NHWC"), (0, 1), (0, 1)):
        mean_in_layout = np.ascontiguousarray(mean.transpose(2, 0, 1) if layout == "NCHW" else mean)
        crops = np.zeros(2, CROP_DTYPE)
        positions, shifts = ((3, 5), (10, 16)), rng.normal(0, 9, (2, 3)).astype(np.float32)
        crops["pixels"] = [image[position].ctypes.data for position in positions]
        crops["stride"], crops["shift"], crops["flip"] = 53 * 3, shifts, flip
        crops["mean"] = with_mean * (mean_in_layout.ctypes.data + (4 * 41 + 2) * (4 if layout == "NCHW" else 12))
        block = aligned_floats(np.full(6 * side**2 + ALIGNMENT_BYTES, np.nan, np.float32))[: 6 * side**2]
        out = block.reshape((2, 3, side, side) if layout == "NCHW" else (2, side, side, 3))
        kernel.crop(crops, layout, 41, scale, out)
        for (y, x), shift, result in zip(positions, shifts, out, strict=True):
            pixels = image[y : y + side, x : x + side][:, :: -1 if flip else 1]
            expected = (pixels + shift - with_mean * mean[4 : 4 + side, 2 : 2 + side]) * scale
            if not np.array_equal(result.transpose(1, 2, 0) if layout == "NCHW" else result, expected):
                return False
    return _copies_correctly(kernel, image) and _adds_effects_correctly(kernel)


def _copies_correctly(kernel: NativeKernels, image: npt.NDArray[np.uint8]) -> bool:
    """Return True if the library copies and resizes a few rectangles of an image correctly."""
    position = np.array([[(0, 0), (16, 22)], [(3, 5), (15, 1)]], np.int32)
    extents = np.array([[(47, 53), (20, 31)], [(44, 9), (1, 52)]], np.int32)
    sizes, addresses = np.full((2, 2), image.shape[:2], np.int32), np.full(2, address(image), np.uint64)
    for side, extent in product((31, 9), (None, extents)):
        out = np.zeros((2, 2, side, side, 3), np.uint8)
        job = BatchJob.of_squares(None, addresses, np.full(2, image.nbytes), sizes, position, out, extent)
        kernel.copy_squares(job)
        lengths = np.full_like(extents, side) if extent is None else extents
        parts = zip(position.reshape(-1, 2).tolist(), lengths.reshape(-1, 2).tolist(), strict=True)
        expected = [resized(image[y : y + height, x : x + width], side) for (y, x), (height, width) in parts]
        if not np.array_equal(out.reshape(4, side, side, 3), expected):
            return False
    return True


def _adds_effects_correctly(kernel: NativeKernels) -> bool:
    """Return True if the library adds the effects of pipeline.effects.sample correctly."""
    windows, nothing = sample_windows(), np.zeros((4, 1, 3), np.int32)
    out, addresses = np.empty(windows.shape, np.float32), address(windows) + windows[0].nbytes * np.arange(4)
    images = (addresses.astype(np.uint64), np.full(4, windows[0].nbytes), np.full((4, 2), SIDE_PX, np.int32))
    places = (nothing[:, :, :2], nothing[:, :, 0], nothing[:, 0].astype(np.float32))
    kernel.make_images(BatchJob(None, *images, *places, None, 0, SIDE_PX, "NHWC", 1.0, out, effects=sample_effects()))
    return is_expected(out)


def resized(pixels: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.uint8]:
    """Return `pixels` (H, W, 3) resized to (side_px, side_px, 3) by Pillow's antialiased bilinear filter.

    The C kernel gives the same bits. Rows are resized before columns, in two calls, because the order of the two passes
    within one call depends on the version of Pillow.
    """
    from PIL import Image  # loaded only when a loader is opened

    rows = Image.fromarray(pixels).resize((side_px, len(pixels)), Image.Resampling.BILINEAR)
    return np.asarray(rows.resize((side_px, side_px), Image.Resampling.BILINEAR))


def cut_window(
    payload: npt.NDArray[np.uint8],
    is_raw: bool,
    corner: npt.NDArray[np.int32],
    extent: npt.NDArray[np.int32] | None,
    out: npt.NDArray[np.uint8],
) -> bool:
    """Write a window of one record to `out` (side, side, 3), without the C kernel.

    Returns False if a JPEG file is damaged, or if the window is not within the image.

    payload  RGB pixels (H, W, 3) if `is_raw`, otherwise the bytes of a JPEG file
    corner   row and column at which the window begins
    extent   height and width of a region that is resized to the window; None: the window is a crop
    """
    try:
        pixels = payload if is_raw else decode_jpeg(payload.tobytes())
    except ValueError:
        return False
    side = len(out)
    (y, x), (height, width) = corner.tolist(), (side, side) if extent is None else extent.tolist()
    if min(y, x) < 0 or y + height > pixels.shape[0] or x + width > pixels.shape[1]:
        return False
    part = pixels[y : y + height, x : x + width]
    out[:] = part if extent is None else resized(part, side)
    return True


def _decodes_correctly(kernel: NativeKernels, jpeg: JpegLibrary) -> bool:
    """Return True if the kernel decodes parts of a small image as simplejpeg does, and reports damaged files."""
    rng, side = np.random.default_rng(1), 33
    smooth = rng.integers(0, 256, (12, 14, 3)).repeat(8, 0).repeat(8, 1)[:91, :109]
    content = encode_jpeg(np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8), 90)
    pixels = decode_jpeg(content)
    positions = [(0, 0), (0, 76), (58, 0), (58, 76), (16, 16), (17, 15), (15, 17), (32, 48), (31, 41)]
    damaged = bytearray(content)
    damaged[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    files = [np.frombuffer(file, np.uint8) for file in [content] * len(positions) + [bytes(damaged), content[:300]]]
    position = np.array([*positions, (58, 76), (58, 76)], np.int32)[:, None]
    for first, count in ((0, len(positions)), (len(positions), 1), (len(positions) + 1, 1)):
        part = slice(first, first + count)
        addresses = np.array([address(file) for file in files[part]], np.uint64)
        sizes, out = np.array([len(file) for file in files[part]]), np.empty((count, side, side, 3), np.float32)
        nothing = np.zeros((count, 3), np.float32)
        image_size, flip = np.full((count, 2), pixels.shape[:2], np.int32), np.zeros((count, 1), np.int32)
        job = BatchJob(
            jpeg, addresses, sizes, image_size, position[part], flip, nothing, None, 0, side, "NHWC", 1.0, out
        )
        kernel.make_images(job)
        if first:
            if job.failed != 0:
                return False
        elif job.failed != count or any(
            not np.array_equal(image, pixels[y : y + side, x : x + side])
            for image, (y, x) in zip(out, positions, strict=True)
        ):
            return False
    return True


native = compiled.load(compiled.library_path(SOURCE), NativeKernels, is_correct)
