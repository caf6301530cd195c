"""Benchmark of the service: images/s that one consumer gets, beside the stream in this process, in batches of 128.

stream             pipeline.train_loader without a service, with --threads threads
service            the same loader with a service whose workers run on the node of the consumer: --threads workers with
                   one thread each
two nodes          the same with workers on a second node: each batch crosses from the object store of one raylet to
                   that of another one, on the same cores
bounds             threads that only decode the JPEG records (libjpeg-turbo), or only copy the bytes of PPM records

All contestants hand over float32 NCHW batches, and have --threads threads that decode, on --threads cores. So the
consumer's work, Ray's processes and the workers share the cores that the stream has for itself. Both nodes are raylets
of one Ray cluster on this machine. All streams keep running between their turns. Starting the cluster is not timed, but
printed. The first batches of each stream are compared with those of the stream without a service, bit for bit.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pipeline import train_loader
from pipeline.service.control import make_config, start_service, stop_service
from prep.cluster import connected, ray_module
from prep.console import UserError, say
from prep.store.manifest import Store
from tools.bench.harness import (
    BenchmarkCommand,
    Contestant,
    common_options,
    import_simplejpeg,
    print_results,
    race,
)
from tools.bench.loaders import Batches, jpeg_store
from tools.bench.peers.stream_turn import BATCH, images_per_s
from tools.bench.stream import StreamBenchmark

_CHECKED_BATCHES = 3
_JPEG_BOUND, _PPM_BOUND = "bound, JPEG: decode alone", "bound, PPM: copy alone"
# Size of the object store of a node. A process that maps a larger one has more page faults until it has seen all of it.
_OBJECT_STORE_BYTES = 1_000_000_000


def endless(store: Store, threads: int, service: str | None) -> Batches:
    """Images of the stream, epoch after epoch."""
    with train_loader(store.root, BATCH, threads=threads, service=service) as loader:
        while True:
            for images, _ in loader:
                yield images


def add_stream(benchmark: StreamBenchmark, name: str, store: Store, bound: str, ours: str, service: str | None) -> None:
    """Add a stream, after a comparison of its first batches with those of the stream without a service."""
    batches = endless(store, benchmark.threads, service)
    benchmark.cleanup.callback(batches.close)
    with train_loader(store.root, BATCH) as local:
        for number, (expected, _) in zip(range(_CHECKED_BATCHES), local, strict=False):
            if not torch.equal(next(batches), expected):
                raise UserError(f"{name}: batch {number} differs from the stream without a service.")
    rate = lambda: images_per_s(batches, benchmark.seconds, benchmark.threads)  # noqa: E731
    benchmark.contestants.append(Contestant(name, rate, bound, ours=ours))


def start_nodes(benchmark: StreamBenchmark) -> None:
    """Start a cluster of two nodes, and add the streams of a service on each node."""
    # All processes of the cluster use the same token, made for this run. Otherwise Ray looks for a token only after the
    # first node has started, and a node that starts later is refused.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray_module()
    from ray.cluster_utils import Cluster

    threads, jpeg, ppm = benchmark.threads, benchmark.jpeg, benchmark.ppm
    node: dict[str, Any] = {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    started = time.monotonic()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2 * threads, **node})
    benchmark.cleanup.callback(cluster.shutdown)
    ray = benchmark.cleanup.enter_context(connected(cluster.address))
    say(f"the first node started in {time.monotonic() - started:.1f} s")

    def serve(name: str, store: Store) -> str:
        begun = time.monotonic()
        start_service(ray, make_config(store.root, name, threads, threads, 1))
        benchmark.cleanup.callback(stop_service, ray, name, cluster.address)
        say(f"service {name} started in {time.monotonic() - begun:.1f} s")
        return name

    add_stream(benchmark, "service, JPEG", jpeg, _JPEG_BOUND, "stream, JPEG", serve("jpeg", jpeg))
    add_stream(benchmark, "service, PPM", ppm, _PPM_BOUND, "stream, PPM", serve("ppm", ppm))
    cluster.add_node(num_cpus=2 * threads, **node)  # the first node has no free core: these workers start here
    add_stream(benchmark, "service, JPEG, two nodes", jpeg, _JPEG_BOUND, "service, JPEG", serve("jpeg2", jpeg))
    add_stream(benchmark, "service, PPM, two nodes", ppm, _PPM_BOUND, "service, PPM", serve("ppm2", ppm))


@click.command(cls=BenchmarkCommand)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Store of JPEG records.  [default: a store of the pictures of tools.photo_digits]",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Number of decoding threads of each stream, and of cores that this benchmark uses.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1),
    default=5.0,
    show_default=True,
    help="Duration of a turn, in seconds.",
)
@common_options
def main(store: Path | None, threads: int, seconds: float, rounds: int, as_json: bool) -> None:
    """Measure the service on one node and across two nodes of this machine, beside the stream in this process.

    \b
    Example:
      python -m tools.bench.service --rounds 5
      python -m tools.bench.service --store store --seconds 10
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as cleanup:
        work_dir = Path(temporary)
        jpeg = jpeg_store(store, work_dir, threads)
        benchmark = StreamBenchmark(jpeg, work_dir, threads, seconds)
        cleanup.callback(benchmark.cleanup.close)
        for name, opened, bound in (("JPEG", jpeg, _JPEG_BOUND), ("PPM", benchmark.ppm, _PPM_BOUND)):
            add_stream(benchmark, f"stream, {name}", opened, bound, f"stream, {name}", None)
        start_nodes(benchmark)
        benchmark.add_bound(_JPEG_BOUND, import_simplejpeg().decode_jpeg, jpeg, "stream, JPEG")
        benchmark.add_bound(
            _PPM_BOUND, lambda record: np.frombuffer(record, np.uint8).copy(), benchmark.ppm, "stream, PPM"
        )
        os.sync()
        rows = race(benchmark.contestants, rounds)
    records = jpeg.split("train").records
    details = {"records": records, "batch": BATCH, "seconds": seconds, "threads": threads, "rounds": rounds}
    print_results(rows, as_json, details)


if __name__ == "__main__":
    main()
