"""Test of a run whose number of machines changes while torchrun runs (--nnodes 1:2).

tests/train/replicas/test_run_command.py changes the number of processes between two commands.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from tests.helpers.small_training import metrics_without_clock
from tests.helpers.torchrun.job import Job, TorchrunServer
from tests.train.replicas.small_runs import SMALL_ALEXTRAIN, run_arguments, start_training
from train.runs import checkpoint

# Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE, torchrun (PyTorch 2.13) shares its TCPStore with the ranks at its first
# start. A machine that joins later never gets the address of this store (DynamicRendezvousHandler.next_rendezvous).
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def assert_equal_up_to_rounding(run_dir: Path, expected_dir: Path) -> None:
    """Assert that two runs have the same steps, losses and parameters, up to rounding."""
    lines, expected_lines = metrics_without_clock(run_dir), metrics_without_clock(expected_dir)
    assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in expected_lines]
    for line, expected in zip(lines, expected_lines, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    state, reference = checkpoint.load(run_dir), checkpoint.load(expected_dir)
    assert state.step == reference.step == 9 and state.stream == reference.stream
    for name, tensor in state.parameters.items():
        torch.testing.assert_close(tensor, reference.parameters[name], rtol=1e-4, atol=1e-6)


@pytest.mark.soak
def test_a_machine_joins_and_another_is_lost_while_torchrun_runs(
    torchrun: TorchrunServer, stores: dict[str, Path], tmp_path: Path
) -> None:
    """The run begins on one machine.

    From step 4 or later, it continues on two machines. After step 7, one machine is lost.
    """
    run_dir = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def start(is_host: bool, fault: str) -> Job:
        rendezvous = f"is_host={is_host},last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=8"
        nodes = ("--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 3)
        meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", rendezvous)
        run = run_arguments(stores["ppm"], run_dir)
        return torchrun(*nodes, *meeting, "--rdzv-id", "run", SMALL_ALEXTRAIN, *run, env={"FAULT": fault, **OWN_STORE})

    first = start(True, "wait 0 4")
    first.wait_until(lambda: Path(f"{run_dir}.wait").exists())
    second = start(False, "lose-node any 7")
    first.wait_until(lambda: "closing signal SIGTERM" in first.stderr)
    Path(f"{run_dir}.go").touch()
    assert first.wait() == 0, first.stderr
    assert second.wait() == -9
    assert "on 2 replicas" in first.stderr + second.stderr
    alone = start_training(torchrun, 1, stores["ppm"], tmp_path / "alone")
    assert alone.wait() == 0, alone.stderr
    assert_equal_up_to_rounding(run_dir, tmp_path / "alone")
