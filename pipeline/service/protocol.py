"""Messages between loaders, coordinator and workers of a service: settings, keys of streams, requests and answers.

All messages consist of NumPy arrays, numbers and strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.service.errors import ServiceError
from pipeline.windows import WindowRequest, Windows
from prep.console import UserError
from prep.store.extra import DTYPES, Column

# Version of the messages of a service. A loader refuses a service whose messages have another version.
PROTOCOL_VERSION = 4
MAX_AHEAD = 1024  # largest value of ServiceConfig.ahead, in steps
# Largest number of images in a block of several batches. Large blocks save time: for each object that a loader gets
# from a worker, Ray needs 6 to 8 ms of CPU time, whatever the size of the object. For comparison: a core decodes 512
# images in about 130 ms.
_BLOCK_IMAGES = 512


@dataclass(frozen=True)
class ServiceConfig:
    """Settings of a service, which the options of `alexstream serve` set.

    A consumer is a loader that uses the service.
    """

    name: str
    store: str  # absolute path of the store, the same on all nodes
    fingerprints: Mapping[str, str]  # name of a split -> fingerprint
    min_workers: int = 1  # number of workers that always run
    max_workers: int = 1  # largest number of workers
    threads: int = 1  # number of decoding threads in each worker; Ray reserves one core for each thread
    ahead: int = 16  # number of steps by which the fastest consumer of a stream may be ahead of the slowest
    # The first batch of a stream is made when this number of consumers have connected, or after patience_s.
    consumers: int = 1
    patience_s: float = 60.0  # other consumers stop waiting for a consumer that has made no progress for this time
    forget_s: float = 15.0  # a consumer that has sent no call for this time is removed
    start_s: float = 30.0  # consumers get an error if workers cannot start and no worker has been ready for this time
    idle_s: float = 60.0  # workers above `min_workers` are stopped when they have had no work for this time

    def __post_init__(self) -> None:
        """Raises UserError for a value outside of its allowed range."""
        if not 0 <= self.min_workers <= self.max_workers or self.max_workers < 1:
            raise UserError(
                f"workers {self.min_workers}:{self.max_workers}: expected MIN:MAX with MIN of 0 to MAX, and MAX of at "
                "least 1."
            )
        if self.threads < 1 or not 1 <= self.ahead <= MAX_AHEAD or self.consumers < 1:
            raise UserError(
                f"threads {self.threads}, ahead {self.ahead}, consumers {self.consumers}: expected threads and "
                f"consumers of at least 1, and ahead of 1 to {MAX_AHEAD}."
            )


class StreamKey(NamedTuple):
    """Identifies a stream. Consumers with equal keys read the same windows at the same positions."""

    version: int  # STREAM_VERSION of pipeline.loader
    split: str
    fingerprint: str  # fingerprint of the split
    seed: int | None  # seed of the stream; None for evaluation, which has a fixed order
    batch_size: int  # number of windows of a batch
    shard: int
    world_size: int
    # For evaluation: "centre" or "square", the part of an image that is used. For training: Augmentation.window_text.
    window: str
    shared_by: int  # Augmentation.shared_by; 0 for evaluation
    records: str = ""  # digests of the subset and of the weights; empty if the stream has neither


class Call(NamedTuple):
    """State that a consumer sends with every call."""

    consumer: str  # identifies the loader: host, process and a random number
    stream: StreamKey
    first_needed: int  # lowest position whose batch the consumer has not received yet
    waited_s: float  # time for which the training loop waited for batches since the consumer's previous call
    # Number of the call. The consumer counts its calls, because calls can arrive out of order.
    number: int = 0


def block_steps(batch_size: int, ahead: int, max_workers: int) -> int:
    """Return the number of consecutive batches in a block. With each call, a loader requests one block.

    A block has at most 512 images, but at least one batch. If `ahead` is at least 2 · `max_workers`, the next `ahead`
    batches make at least two blocks for each worker, so that all workers have work.
    """
    return max(1, min(_BLOCK_IMAGES // batch_size, ahead // (2 * max_workers)))


class Fetch(NamedTuple):
    """Request for the windows of a block, which is one batch or several consecutive batches."""

    # Position in the stream of the block's first batch: epoch · (number of batches of an epoch) + step. In evaluation,
    # the position is the step.
    position: int
    steps: int  # number of batches in the block
    request: WindowRequest  # request for the windows of all batches
    digest: bytes  # request_digest(request)
    # Ray's reference (hex) to the pixels of an earlier answer, if these pixels were lost; empty in the first request.
    lost: str


class Answer(NamedTuple):
    """The answer to a Fetch. If all fields are empty, the block is not ready, and the consumer must ask again."""

    # A tuple with the reference to the pixels in Ray's object store; empty if the block is not ready.
    pixels: tuple[Any, ...] = ()
    labels: Any = None  # int64 (N,)
    sources: tuple[str, ...] = ()  # Windows.sources
    extra: Mapping[str, Column] = {}  # Windows.extra
    damage: str = ""  # text of the StoreError for a damaged record
    fault: str = ""  # text of a ServiceError


class Health(NamedTuple):
    """State of the service that a consumer can display."""

    workers: int  # number of workers that are ready
    queue: int  # number of batches that wait for a worker


def request_digest(request: WindowRequest) -> bytes:
    """Return the digest of all fields of a request.

    Consumers share a block only if their requests have the same digest.
    """
    digest = hashlib.blake2b(request.numbers.tobytes(), digest_size=16)
    digest.update(request.offset.tobytes())
    if request.regions is not None:
        digest.update(request.regions.tobytes())
    extra = sorted(request.extra_fields)
    digest.update(f"{request.split} {request.window_px} {request.with_sources} {request.ratio} {extra}".encode())
    return digest.digest()


def checked_windows(service: str, pixels: Any, answer: Answer, request: WindowRequest) -> Windows:
    """Return the windows of an answer.

    Raises ServiceError if the type or shape of an array, the number of source paths, or an extra field differs from the
    request.
    """
    count, side = len(request.numbers), request.window_px
    _expect(service, "pixels", pixels, np.dtype(np.uint8), (count, side, side, 3))
    _expect(service, "labels", answer.labels, np.dtype(np.int64), (count,))
    expected = count if request.with_sources else 0
    if len(answer.sources) != expected:
        raise ServiceError(f"service {service} sent {len(answer.sources)} source paths, expected {expected}.")
    names = [", ".join(sorted(fields)) or "none" for fields in (answer.extra, request.extra_fields)]
    if names[0] != names[1]:
        raise ServiceError(f"service {service} sent the extra fields {names[0]}, expected {names[1]}.")
    for name, field in request.extra_fields.items():
        values, offsets = answer.extra[name].values, answer.extra[name].offsets
        shape: tuple[int, ...] = (count, field.width) if field.type == "vector" else (count,)
        if field.type == "text":
            offsets = _expect(service, f"extra field {name}", offsets, np.dtype(np.int64), (count + 1,))
            if offsets[0] != 0 or (np.diff(offsets) < 0).any():
                raise ServiceError(f"service {service} sent extra field {name} with offsets that do not ascend from 0.")
            shape = (int(offsets[-1]),)
        _expect(service, f"extra field {name}", values, np.dtype(DTYPES[field.type]), shape)
    return Windows(pixels, answer.labels, answer.sources, answer.extra)


def _expect(service: str, what: str, array: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if (
        not isinstance(array, np.ndarray)
        or array.dtype != dtype
        or array.shape != shape
        or not array.flags.c_contiguous
    ):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ServiceError(
            f"service {service} sent {what} as {found}, expected {dtype} {shape}. Install the same version of alexnet "
            "on all machines."
        )
    return array


def actor_name(service: str) -> str:
    """Return the name under which Ray knows the coordinator of a service."""
    return f"alexstream:{service}"
