"""Benchmark of the decoding service (docs/service.md): images/s of a loader with and without a service.

stream             pipeline.train_loader without a service, with --threads threads
service            the same loader with a service whose workers run on the loader's node: --threads workers with one
                   thread each
two nodes          the same loader with a service whose workers run on a second node: Ray copies each batch from the
                   object store of the second node to the object store of the first node
bounds             threads that only decode the JPEG records (libjpeg-turbo), or only copy the bytes of PPM records

The option --threads is the number of threads and of cores of each of these contestants. All loaders give batches of 128
images, float32 NCHW. The loader with a service shares its cores with Ray's processes and the workers. Both nodes are
raylets (Ray's process of a node) of one Ray cluster on this machine. Only one service runs at a time. For each service,
the benchmark starts a cluster. In each round, the loader with the service, the loader without a service and the bound
run one after another. Each node has an object store of the size that `alexstream serve --cluster local` chooses. Before
the measurement, the benchmark checks that the loader with a service and the loader without a service yield the same
bits in the first batches.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import torch

from pipeline import train_loader
from pipeline.service.control import make_config, object_store_bytes, start_service, stop_service
from pipeline.service.protocol import ServiceConfig
from prep.cluster import connected, ray_module
from prep.console import UserError, say
from prep.store.manifest import Store
from tools.bench.harness import (
    BenchmarkCommand,
    Contestant,
    Row,
    common_options,
    import_simplejpeg,
    print_results,
    race,
)
from tools.bench.loaders import Batches, jpeg_store
from tools.bench.peers.stream_turn import BATCH, images_per_s
from tools.bench.stream import StreamBenchmark

_CHECKED_BATCHES = 3


def endless(store: Store, threads: int, service: str | None) -> Batches:
    """Yield the images of a stream without end, epoch after epoch."""
    with train_loader(store.root, BATCH, threads=threads, service=service) as loader:
        while True:
            for images, _ in loader:
                yield images


def checked_stream(store: Store, threads: int, service: str) -> Batches:
    """Return the endless stream of a service.

    The function first compares the first batches with those of a loader without a service. Raises UserError if a batch
    differs.
    """
    batches = endless(store, threads, service)
    with train_loader(store.root, BATCH) as local:
        for number, (expected, _) in zip(range(_CHECKED_BATCHES), local, strict=False):
            if not torch.equal(next(batches), expected):
                raise UserError(f"service {service}: batch {number} differs from the stream without a service.")
    return batches


@contextmanager
def cluster_of(nodes: int, cores: int, store_bytes: int) -> Iterator[tuple[ModuleType, str]]:
    """Start a Ray cluster on this machine for a `with` block. Yields the module ray and the address of the cluster.

    nodes        1 or 2; with 2, the head node has no cores, so that the workers start on the second node
    cores        number of cores that Ray may give to workers
    store_bytes  size of the object store of each node, in bytes
    """
    ray_module()
    from ray.cluster_utils import Cluster

    settings: dict[str, Any] = {"object_store_memory": store_bytes, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores if nodes == 1 else 0, **settings})
    try:
        if nodes == 2:
            cluster.add_node(num_cpus=cores, **settings)
        with connected(cluster.address) as ray:
            yield ray, cluster.address
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]  # ray has no type hints here


def race_service(benchmark: StreamBenchmark, kind: str, nodes: int, store_bytes: int, rounds: int) -> list[Row]:
    """Return the rates of one service, of the loader without a service, and of the bound.

    kind  "JPEG" for the records of `benchmark.jpeg`, or "PPM" for the records of `benchmark.ppm`
    """
    store = {"JPEG": benchmark.jpeg, "PPM": benchmark.ppm}[kind]
    threads, bound = benchmark.threads, f"bound, {kind}"
    local = f"stream, {kind}" + (", second race" if nodes == 2 else "")
    ours = f"service, {kind}" + (", two nodes" if nodes == 2 else "")
    with cluster_of(nodes, threads, store_bytes) as (ray, address), ExitStack() as cleanup:
        started = time.monotonic()
        start_service(ray, make_config(store.root, kind, threads, threads, 1))
        cleanup.callback(stop_service, ray, kind, address)
        say(f"{ours}: started in {time.monotonic() - started:.1f} s")

        def contestant(name: str, batches: Batches) -> Contestant:
            cleanup.callback(batches.close)
            rate = partial(images_per_s, batches, benchmark.seconds, threads)
            return Contestant(name, rate, bound, ours=local)

        contestants = [
            contestant(local, endless(store, threads, None)),
            contestant(ours, checked_stream(store, threads, kind)),
            *(replace(other, ours=local) for other in benchmark.contestants if other.name == bound),
        ]
        os.sync()
        return race(contestants, rounds)


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
    help="Duration of each timed run of a contestant, in seconds.",
)
@click.option(
    "--store-mb",
    type=click.IntRange(80),
    metavar="MB",
    help="Size of the object store of each Ray node, in units of 10⁶ bytes.  [default: the size that `alexstream serve "
    "--cluster local` chooses]",
)
@click.option(
    "--only",
    type=click.Choice(["JPEG", "PPM"]),
    help="Kind of records to measure.  [default: both]",
)
@common_options
def main(
    store: Path | None,
    threads: int,
    seconds: float,
    store_mb: int | None,
    only: str | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Compare the speed of a loader with a service and of a loader without a service, on one node and on two nodes.

    Both nodes are processes on this machine.

    \b
    Example:
      python -m tools.bench.service --rounds 5
      python -m tools.bench.service --store store --seconds 10 --only JPEG
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    # All processes of the cluster get the same authentication token, which is new in each run. Without RAY_AUTH_MODE
    # and RAY_AUTH_TOKEN, Ray looks for a token only after the first node has started, and then refuses the second node.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    store_bytes = store_mb * 10**6 if store_mb else object_store_bytes(ServiceConfig.ahead)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as cleanup:
        work_dir = Path(temporary)
        jpeg = jpeg_store(store, work_dir, threads)
        benchmark = StreamBenchmark(jpeg, work_dir, threads, seconds)
        cleanup.callback(benchmark.cleanup.close)
        benchmark.add_bound("bound, JPEG", import_simplejpeg().decode_jpeg, jpeg, "stream, JPEG")
        benchmark.add_bound(
            "bound, PPM", lambda record: np.frombuffer(record, np.uint8).copy(), benchmark.ppm, "stream, PPM"
        )
        kinds = [only] if only else ["JPEG", "PPM"]
        rows = [
            row
            for kind, nodes in product(kinds, (1, 2))
            for row in race_service(benchmark, kind, nodes, store_bytes, rounds)
        ]
    records = jpeg.split("train").records
    details = {
        "records": records,
        "batch": BATCH,
        "seconds": seconds,
        "threads": threads,
        "rounds": rounds,
        "object_store_bytes": store_bytes,
    }
    print_results(rows, as_json, details)


if __name__ == "__main__":
    main()
