"""What loaders, coordinator and workers send each other: settings of a service, names of streams, requests, answers.

All of it is plain data: NumPy arrays, tuples of numbers and strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.windows import WindowRequest
from prep.console import UserError

# Version of these messages. A loader and a service of different versions refuse each other.
PROTOCOL_VERSION = 2
MAX_AHEAD = 1024
# Number of images in a block, if the batches are smaller. Ray needs 6 to 8 ms of processor time for each object that a
# loader gets from a worker, whatever its size. A core decodes 512 images in about 130 ms.
_BLOCK_IMAGES = 512


@dataclass(frozen=True)
class ServiceConfig:
    """Settings of a service; `alexstream serve` sets them."""

    name: str
    store: str  # absolute path of the store, the same on all nodes
    fingerprints: Mapping[str, str]  # fingerprint of each split
    min_workers: int = 1  # number of workers that are always kept
    max_workers: int = 1  # largest number of workers
    threads: int = 1  # number of decoding threads of a worker, and of cores that Ray reserves for it
    ahead: int = 16  # number of steps by which the fastest consumer of a stream may be ahead of the slowest
    consumers: int = 1  # number of consumers that a stream waits for at its first batch
    patience_s: float = 60.0  # time after which a consumer that does not move no longer holds the others
    forget_s: float = 15.0  # time after which a consumer that does not answer is forgotten
    start_s: float = 30.0  # time without any worker after which consumers get an error if workers cannot start
    idle_s: float = 60.0  # time after which workers above `min_workers` end if there is no work for them

    def __post_init__(self) -> None:
        """Raises UserError for a value that is not allowed."""
        if not 0 <= self.min_workers <= self.max_workers or self.max_workers < 1:
            raise UserError(
                f"workers {self.min_workers}:{self.max_workers}: expected MIN:MAX with MIN at least 0 and MAX at least "
                "1 and at least MIN."
            )
        if self.threads < 1 or not 1 <= self.ahead <= MAX_AHEAD or self.consumers < 1:
            raise UserError(
                f"threads {self.threads}, ahead {self.ahead}, consumers {self.consumers}: expected threads and "
                f"consumers of at least 1, and ahead of 1 to {MAX_AHEAD}."
            )


class StreamKey(NamedTuple):
    """Identifies a stream. Consumers with equal keys need the same windows at the same positions."""

    version: int  # STREAM_VERSION of pipeline.loader
    split: str
    fingerprint: str  # of the split
    seed: int | None  # None for the order of evaluation
    batch_size: int
    shard: int
    world_size: int
    window: str  # "random", "centre" or "square"
    shared_by: int  # Augmentation.shared_by; 0 for evaluation


class Call(NamedTuple):
    """What a consumer sends with every call."""

    consumer: str  # identifies the loader: host, process and a random number
    stream: StreamKey
    first_needed: int  # the first position that the consumer has not received
    waited_s: float  # time for which its training loop waited for batches, since its previous call
    number: int = 0  # counts the calls of a consumer, because a call can arrive after a later one


def block_steps(batch_size: int, ahead: int, max_workers: int) -> int:
    """Number of consecutive batches in a block, which is what a loader asks for at once.

    `ahead` batches are at least two blocks for each worker, so that all workers always have work.
    """
    return max(1, min(_BLOCK_IMAGES // batch_size, ahead // (2 * max_workers)))


class Fetch(NamedTuple):
    """Asks for the windows of a block: one batch or several consecutive batches."""

    # Position of the first batch in the stream: epoch · (number of batches of an epoch) + step, or the step in
    # evaluation.
    position: int
    steps: int  # number of batches
    request: WindowRequest  # the windows of all batches
    digest: bytes  # see request_digest
    lost: str  # hex of a reference whose object is lost, "" otherwise


class Answer(NamedTuple):
    """The answer to a Fetch. If all fields are empty, the block is not ready: ask again."""

    pixels: tuple[Any, ...] = ()  # (reference of the object with the pixels,)
    labels: Any = None  # int64 (N,)
    damage: str = ""  # text of the StoreError for a damaged record
    fault: str = ""  # text of a ServiceError


class Health(NamedTuple):
    """Numbers that a consumer shows."""

    workers: int  # number of workers that are ready
    queue: int  # number of batches that wait for a worker


def request_digest(request: WindowRequest) -> bytes:
    """Digest of a request. Consumers share a batch only if their requests are equal."""
    digest = hashlib.blake2b(request.numbers.tobytes(), digest_size=16)
    digest.update(request.offset.tobytes())
    digest.update(f"{request.split} {request.window_px}".encode())
    return digest.digest()


def actor_name(service: str) -> str:
    """Name of the coordinator's actor."""
    return f"alexstream:{service}"
