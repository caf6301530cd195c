"""Test with Ray's autoscaler: a service under load makes the cluster grow, and without load the cluster shrinks again.

The cluster is a simulated machine. The head node of the cluster has no cores. Ray's node provider `fake_multinode` adds
nodes with one core each.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from pipeline.loader import train_loader
from tests.pipeline.service.conftest import DEADLINE_S
from tests.pipeline.service.consumer import digests
from tests.pipeline.service.faults import HOST, TOKEN, Machine, free_port, head_commands
from tests.pipeline.streaming import take_batches

MOST, SEED, BATCHES = 2, 4, 7
_COMMANDS = (  # keys that Ray requires in the configuration of an autoscaler
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
)
PROGRAM = """
import json, os, signal, sys, threading, time
from pathlib import Path
from pipeline import train_loader
from pipeline.service.control import make_config, service_status, start_service
from prep.cluster import connected
from tests.pipeline.service.consumer import digests
from tests.pipeline.streaming import take_batches

store, address, most = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def nodes():
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) for node in ray.nodes())

def pids():
    return [worker["pid"] for worker in service_status(ray, "s", address)["workers"]]

with connected(address) as ray:
    start_service(ray, make_config(store, "s", 0, most, 1, idle_s=1.0))
    seen = [nodes()]
    with train_loader(store, 4, seed=SEED, service=f"s@{address}", threads=1) as loader:
        taken = digests(take_batches(loader, BATCHES))
        is_enough = threading.Event()
        consumer = threading.Thread(target=lambda: [take_batches(loader, 1) for _ in iter(is_enough.is_set, True)])
        consumer.start()
        first = pids()[0]
        os.kill(first, signal.SIGSTOP)  # the requests of the loader now wait, as if the worker were too slow
        while len(pids()) < most:
            seen.append(nodes())
            time.sleep(0.1)
        os.kill(first, signal.SIGCONT)
        for _ in range(40):  # the load continues, and the cluster must not grow further
            seen.append(nodes())
            time.sleep(0.1)
        is_enough.set()
        consumer.join()
    while nodes():
        time.sleep(0.2)
    print(json.dumps({"taken": taken, "seen": seen, "left": [len(pids()), nodes()]}))
"""


@pytest.mark.soak
def test_the_cluster_grows_and_shrinks_with_the_load(store: Path, tmp_path: Path) -> None:
    address = f"{HOST}:{free_port()}"
    settings = tmp_path / "autoscaler.json"
    settings.write_text(
        json.dumps(
            {
                "cluster_name": "fake",
                "max_workers": MOST + 3,
                "upscaling_speed": 100,
                "idle_timeout_minutes": 0.05,
                "provider": {
                    "type": "fake_multinode",
                    "gcs_address": address,
                    "use_node_id_as_ip": True,
                    "disable_node_updaters": True,
                    "disable_launch_config_check": True,
                },
                "head_node_type": "ray.head.default",
                "auth": {},
                "docker": {},
                "file_mounts": {},
                **{key: [] for key in _COMMANDS},
                "available_node_types": {
                    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                    "one-core": {
                        "resources": {"CPU": 1, "object_store_memory": 100_000_000},
                        "node_config": {},
                        "max_workers": MOST + 3,
                    },
                },
            }
        )
    )
    program = PROGRAM.replace("SEED", str(SEED)).replace("BATCHES", str(BATCHES))
    run = shlex.join([sys.executable, "-c", program, str(store), address, str(MOST)])
    head = head_commands(int(address.partition(":")[2]), cores=0, options=f"--autoscaling-config {settings}")
    machine = Machine(
        f"({head}) & until {run}; do sleep 1; done",
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        **TOKEN,
    )
    try:
        code, stdout, stderr = machine.wait(2 * DEADLINE_S)
    finally:
        machine.switch_off()
    assert code == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    with train_loader(store, 4, seed=SEED, threads=1) as local:
        assert result["taken"] == digests(take_batches(local, BATCHES))
    assert result["seen"][0] == 0 and max(result["seen"]) == MOST
    assert result["left"] == [0, 0]
