"""Benchmark of the service: rate in images/s of a loader with and without a service, in batches of 128.

stream             pipeline.train_loader without a service, with --threads threads
service            the same loader with a service whose workers run on the loader's node: --threads workers with one
                   thread each
two nodes          the same loader with a service whose workers run on a second node: Ray copies each batch from the
                   object store of the second node to that of the first
bounds             threads that only decode the JPEG records (libjpeg-turbo), or only copy the bytes of PPM records

All contestants give float32 NCHW batches, decode on --threads threads, and run on the same --threads cores. The loader
with a service shares these cores with Ray's processes and the workers. Both nodes are raylets (Ray's process of a node)
of one Ray cluster on this machine. All loaders stay open between their turns. The time to start the cluster is printed,
but is not part of the rates. Before the measurement, the benchmark compares the first batches of each loader with those
of the loader without a service, bit for bit.
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
# Size in bytes of the object store of a node. All four services keep their batches between their turns, 0.4 GB for each
# service.
_OBJECT_STORE_BYTES = 2_000_000_000


def endless(store: Store, threads: int, service: str | None) -> Batches:
    """Yield the images of a stream without end, epoch after epoch."""
    with train_loader(store.root, BATCH, threads=threads, service=service) as loader:
        while True:
            for images, _ in loader:
                yield images


def add_stream(benchmark: StreamBenchmark, name: str, store: Store, bound: str, ours: str, service: str | None) -> None:
    """Add a stream to the benchmark.

    Raises UserError if the first batches differ from the batches of the stream without a service.
    """
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
    # Give all processes of the cluster one authentication token, which is made for this run. Without these variables,
    # Ray looks for a token only after the first node has started. Ray then refuses the second node.
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
    # The workers above use all cores of the first node. The workers below therefore start on the second node.
    cluster.add_node(num_cpus=2 * threads, **node)
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
    help="Number of decoding threads of each stream. The benchmark runs on the same number of cores.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1),
    default=5.0,
    show_default=True,
    help="Duration of each turn of a contestant, in seconds.",
)
@common_options
def main(store: Path | None, threads: int, seconds: float, rounds: int, as_json: bool) -> None:
    """Compare the speed of a loader with a service to that of a loader without a service.

    The service is on one node, or on another node. Both nodes are processes on this machine.

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
