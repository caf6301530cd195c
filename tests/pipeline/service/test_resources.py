"""Tests that the memory of a service is bounded and freed, and tests of the metrics that Prometheus reads."""

from __future__ import annotations

import gc
import re
import time
import urllib.request
from pathlib import Path

from pipeline.loader import train_loader
from tests.pipeline.service.conftest import DEADLINE_S, Serve, Service, TestCluster
from tests.pipeline.service.consumer import ConsumerProcess
from tests.pipeline.service.test_consumers import PREFETCHED
from tests.pipeline.streaming import take_batches

BATCH, AHEAD, WORKERS = 8, 5, 2
BATCH_BYTES = BATCH * (3 * 224**2 + 8)
KEPT = AHEAD + 1  # number of batches that the service keeps for one consumer
# Largest number of batches in the object stores. The object stores hold batches that the service keeps, batches in
# workers, batches in the loader's queues (see test_consumers.PREFETCHED), and batches that Ray is about to free. A
# batch can be on two nodes: on the node of the worker and on the node of the loader.
MOST = 2 * (KEPT + 2 * WORKERS) + PREFETCHED + 5


SETTLED_S = 3.0  # the object stores must not change for this time before a test measures them


def settled_bytes(cluster: TestCluster) -> int:
    """Return the number of bytes in the object stores, after Ray has freed the objects of other tests.

    Ray may keep a lost object whose owner has died, for example after another test killed a coordinator.
    """
    begun_s, used = time.monotonic(), cluster.used_bytes()
    while used and time.monotonic() - begun_s < SETTLED_S:
        time.sleep(0.1)
        if (now := cluster.used_bytes()) != used:
            begun_s, used = time.monotonic(), now
    return used


def wait_until_free(cluster: TestCluster, service: Service, before: int) -> None:
    """Wait until the service keeps no batch, and the object stores hold at most `before` bytes."""
    begun_s = time.monotonic()
    while cluster.used_bytes() > before or service.status()["kept_bytes"] or service.status()["consumers"]:
        assert time.monotonic() - begun_s < DEADLINE_S, (before, cluster.used_bytes(), service.status())
        time.sleep(0.1)


def test_shared_memory_is_bounded_during_a_stream_and_given_back_after_it(
    cluster: TestCluster, store: Path, serve: Serve
) -> None:
    """The loop of the test keeps all batches that it receives. It takes at most 20 batches a second."""
    before = settled_bytes(cluster)
    service = serve(store, WORKERS, ahead=AHEAD)
    most_used, most_kept, batches = 0, 0, []
    with train_loader(store, BATCH, service=service.at, threads=1) as loader:
        for _ in range(90):
            batches += take_batches(loader, 1)
            time.sleep(0.05)
            most_used = max(most_used, cluster.used_bytes() - before)
            most_kept = max(most_kept, service.status()["kept_bytes"])
    assert 0 < most_kept <= KEPT * BATCH_BYTES
    assert BATCH_BYTES <= most_used <= MOST * (BATCH_BYTES + 4096)
    wait_until_free(cluster, service, before)
    assert len(batches) == 90


def test_a_closed_loader_gives_back_blocks_that_it_has_read_in_part(
    cluster: TestCluster, store: Path, serve: Serve
) -> None:
    before = settled_bytes(cluster)
    service = serve(store, WORKERS, ahead=16)  # a block has four batches
    gc.disable()  # the memory must be freed without Python's garbage collector
    try:
        with train_loader(store, BATCH, service=service.at, threads=1) as loader:
            take_batches(loader, 1)
        wait_until_free(cluster, service, before)
    finally:
        gc.enable()
    assert loader.epoch == 0  # the loader still exists


def test_memory_of_a_consumer_that_is_killed_is_given_back(cluster: TestCluster, store: Path, serve: Serve) -> None:
    before = settled_bytes(cluster)
    service = serve(store, 1, ahead=AHEAD, forget_s=2.0)
    consumer = ConsumerProcess(store, BATCH, 0)
    try:
        consumer.do(f"open {service.at}")
        consumer.do("take 2")
        service.wait_for("kept batches", lambda status: status["kept_bytes"] >= BATCH_BYTES)
        assert cluster.used_bytes() >= before + BATCH_BYTES
    finally:
        consumer.end()
    wait_until_free(cluster, service, before)


def scraped(cluster: TestCluster, service: Service) -> dict[str, float]:
    """Return the service's metrics as Prometheus reads them: {name: sum of the values of all nodes}."""
    values: dict[str, float] = {}
    for node in cluster.ray.nodes():
        if not node["Alive"]:
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            text = answer.read().decode()
        for name, labels, value in re.findall(r"^ray_alexstream_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            if f'service="{service.name}"' in labels:
                values[name] = values.get(name, 0.0) + float(value)
    return values


def test_metrics_that_prometheus_reads(cluster: TestCluster, store: Path, serve: Serve) -> None:
    service = serve(store, 1, ahead=AHEAD)
    with train_loader(store, BATCH, service=service.at, threads=1) as loader:
        take_batches(loader, 6)
        # The test waits until metrics and status agree: the loader still reads ahead, and metrics are sent once a
        # second.
        deadline, values, status = time.monotonic() + DEADLINE_S, dict[str, float](), service.status()
        names = {"consumers", "consumer_wait_seconds_total"}

        def agree() -> bool:
            pairs = {"images_made_total": "images_made", "kept_bytes": "kept_bytes", "queue": "queue"}
            return names <= values.keys() and all(values.get(name) == status[key] for name, key in pairs.items())

        while not agree() or status["queue"]:
            assert time.monotonic() < deadline, values
            time.sleep(0.5)
            status = service.status()
            values = scraped(cluster, service)
    assert status["images_made"] >= 6 * BATCH
    assert values["bytes_made_total"] == status["images_made"] * (3 * 224**2 + 8)
    assert 6 * BATCH <= values["images_served_total"] <= values["images_made_total"]
    assert values["bytes_served_total"] == values["images_served_total"] * (3 * 224**2 + 8)
    assert values["workers"] == 1 and values["consumers"] == 1 and values["queue"] == 0
    assert values["kept_bytes"] == status["kept_bytes"]
    assert values.get("retries_total", 0.0) == 0
    assert values["consumer_wait_seconds_total"] > 0
