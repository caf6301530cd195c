"""Tests of a cluster with TLS and a token. Programs without the certificate or the token must be refused.

openssl makes the certificates: one certificate authority, and one certificate for all nodes and programs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.loader import train_loader
from prep.cluster import ray_module
from tests.pipeline.service.conftest import DEADLINE_S
from tests.pipeline.service.consumer import digests
from tests.pipeline.service.faults import TOKEN, Machine, free_port, head_commands
from tests.pipeline.streaming import take_batches

# With these settings, a program that Ray refuses ends soon. Without these settings, it takes two minutes to end.
_SHORT = ("RAY_NUM_REDIS_GET_RETRIES=1", "RAY_py_gcs_connect_timeout_s=5")
PROGRAM = """
import sys
from pathlib import Path
from pipeline import train_loader
from pipeline.service.control import make_config, start_service
from prep.cluster import connected
from prep.console import UserError
from tests.pipeline.service.consumer import digests
from tests.pipeline.streaming import take_batches

store, address = Path(sys.argv[1]), sys.argv[2]
try:
    with connected(address) as ray:
        start_service(ray, make_config(store, "s", 1, 1, 1))
        with train_loader(store, 4, service=f"s@{address}", threads=1) as loader:
            print(*digests(take_batches(loader, 10)))
except UserError as error:
    print("refused:", error)
"""


def node_address() -> str:
    """Return the address that Ray uses for this machine instead of localhost.

    The certificate of a node must name this address.
    """
    address: str = ray_module().util.get_node_ip_address()
    return address


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ray's environment variables for TLS, with paths of new certificates."""
    folder = tmp_path_factory.mktemp("certificates")

    host = node_address()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=DEADLINE_S)

    new = ["-newkey", "rsa:2048", "-nodes", "-days", "2"]
    openssl("req", "-x509", *new, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.crt")
    openssl("req", *new, "-subj", f"/CN={host}", "-keyout", "node.key", "-out", "node.csr")
    (folder / "names").write_text(f"subjectAltName=IP:{host},IP:127.0.0.1,DNS:localhost\n")
    signed_by = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
    openssl("x509", "-req", "-in", "node.csr", *signed_by, "-out", "node.crt")
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
    }


@pytest.fixture(scope="module")
def machine(store: Path, certificates: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with the outputs of four runs of the program on the head node."""
    folder, host, port = tmp_path_factory.mktemp("outputs"), node_address(), free_port()
    (folder / "program.py").write_text(PROGRAM)
    run = f"timeout 100 {sys.executable} {folder}/program.py {store} {host}:{port}"
    clients = {
        "no-certificate": " ".join([*(f"-u {name}" for name in certificates), *_SHORT]),
        "no-token": f"-u RAY_AUTH_TOKEN HOME={folder}",
        "wrong-token": "RAY_AUTH_TOKEN=another-token-of-the-same-length-",
    }
    commands = [
        f"({head_commands(port, host=host)}) & sleep 3",
        f"until {run} > {folder}/good 2> {folder}/good.err && grep -qv refused {folder}/good; do sleep 1; done",
        *(
            f"(env {change} {run} > {folder}/{name} 2> {folder}/{name}.err; touch {folder}/{name}.ended) &"
            for name, change in clients.items()
        ),
        f"until [ $(ls {folder}/*.ended 2>/dev/null | wc -l) = {len(clients)} ]; do sleep 0.2; done",
    ]
    started = Machine("\n".join(commands), **TOKEN, **certificates)
    try:
        started.wait(2 * DEADLINE_S)
        yield folder
    finally:
        started.switch_off()


@pytest.mark.soak
def test_a_service_works_with_tls_and_a_token(store: Path, machine: Path) -> None:
    with train_loader(store, 4, threads=1) as local:
        assert (machine / "good").read_text().split() == digests(take_batches(local, 10))


@pytest.mark.soak
@pytest.mark.parametrize("client", ["no-certificate", "no-token", "wrong-token"])
def test_a_program_without_certificate_or_token_is_refused_in_one_line(machine: Path, client: str) -> None:
    lines = (machine / client).read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"refused: cluster {node_address()}:"), lines
    assert (
        client == "no-certificate"
        or "Check that this machine (~/.ray/auth_token or RAY_AUTH_TOKEN) has the token" in lines[0]
    )
