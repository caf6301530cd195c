"""Tests of train.replicas.group: exchanges of values, errors of single ranks, and ranks that never join or hang."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from torch import distributed

from prep.console import Terminated, UserError, WrongArgument
from tests.train.replicas.ranks import run_ranks
from train.replicas.errors import OtherReplicaFailed, ReplicaLost
from train.replicas.group import ReplicaGroup, group_from_environment, joined
from train.replicas.session import has_ended

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_the_group_is_the_one_of_torchruns_environment() -> None:
    assert group_from_environment(TORCHRUN) == ReplicaGroup(5, 8, 1, 4, launched=True)
    assert group_from_environment({"PATH": "/bin", "RANK": "3"}) == ReplicaGroup()


def test_the_variables_that_a_notebook_sets_for_one_process_start_no_group() -> None:
    notebook = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert group_from_environment(notebook) == ReplicaGroup()
    with pytest.raises(WrongArgument, match="no LOCAL_RANK"):
        group_from_environment({**notebook, "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": None}, "no LOCAL_RANK"),
        ({"MASTER_PORT": None}, "no MASTER_PORT"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four: expected a whole number"),
        ({"RANK": "8"}, "RANK=8 of WORLD_SIZE=8"),
    ],
)
def test_an_incomplete_environment_is_refused(changes: dict[str, str | None], message: str) -> None:
    environ = {name: value for name, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(WrongArgument, match=message):
        group_from_environment(environ)


def test_a_group_of_one_replica_exchanges_nothing_and_loads_no_torch() -> None:
    script = (
        "import sys, numpy as np\nfrom train.replicas.group import group_from_environment, joined\n"
        "with joined(group_from_environment({})) as group:\n"
        "    assert group.sum(np.array([3.5])) == [3.5] and group.broadcast_json({'a': 1}) == {'a': 1}\n"
        "    assert len(group.gather(np.zeros(2))) == 1 and group.gather_json(7) == [7] and group.is_first\n"
        "    group.barrier()\n    with group.together(): pass\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_ranks_exchange_sums_arrays_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    floats = generator.normal(size=(3, 50)) * 10.0 ** generator.integers(-8, 8, (3, 50))
    counts = generator.integers(-(2**60), 2**60, (3, 2, 2))

    def work(group: ReplicaGroup) -> tuple[Any, ...]:
        rank = group.rank
        array = np.full((2, 3), rank, dtype=np.float32)
        group.broadcast(array)
        group.barrier()
        return (
            group.sum(floats[rank]),
            group.sum(counts[rank]),
            group.gather(np.arange(2 * rank, dtype=np.int16).reshape(rank, 2)),
            group.gather_json({"rank": rank}),
            group.broadcast_json([rank, "ä" * 70000]),
            array,
            group.on_first(lambda: {"by": rank}),
        )

    for sums, exact, parts, values, text, array, by_first in run_ranks(monkeypatch, 3, work):
        np.testing.assert_array_equal(sums, (floats[0] + floats[1]) + floats[2])
        np.testing.assert_array_equal(exact, counts.sum(0))
        assert [part.shape for part in parts] == [(0, 2), (1, 2), (2, 2)] and parts[2].tolist() == [[0, 1], [2, 3]]
        assert values == [{"rank": 0}, {"rank": 1}, {"rank": 2}] and text == [0, "ä" * 70000]
        assert not array.any() and by_first == {"by": 0}


def test_a_shared_failure_is_raised_by_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: ReplicaGroup) -> None:
        with group.together():
            if group.rank > 0:
                raise WrongArgument(f"--gpus 1: rank {group.rank} has no GPU.")

    quiet, printed, also_quiet = run_ranks(monkeypatch, 3, work)
    assert isinstance(printed, WrongArgument) and str(printed) == "rank 1 of 3: --gpus 1: rank 1 has no GPU."
    for outcome in (quiet, also_quiet):
        assert isinstance(outcome, OtherReplicaFailed) and outcome.code == 2


def test_a_stop_in_a_shared_block_ends_all_ranks_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: ReplicaGroup) -> None:
        with group.together():
            if group.rank == 1:
                raise Terminated(15)

    other, stopped = run_ranks(monkeypatch, 2, work)
    assert isinstance(stopped, Terminated) and isinstance(other, OtherReplicaFailed) and other.code == 143


def test_an_error_of_one_rank_ends_the_others_without_a_second_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: ReplicaGroup) -> None:
        if group.rank == 1:
            raise UserError("the record is damaged.")
        group.barrier()

    for rank, outcome in enumerate(run_ranks(monkeypatch, 3, work)):
        if rank == 1:
            assert str(outcome) == "rank 1 of 3: the record is damaged."
        else:
            assert isinstance(outcome, OtherReplicaFailed) and str(outcome) == "the record is damaged."


def test_an_error_of_one_rank_ends_a_rank_that_is_still_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    connect_gloo = distributed.ProcessGroupGloo

    def slow_on_rank_0(store: object, rank: int, size: int, timeout: object) -> object:
        connection = connect_gloo(store, rank, size, timeout)
        if rank == 0:
            time.sleep(1.5)  # meanwhile, rank 1 ends
            raise RuntimeError("Connection closed by peer")
        return connection

    def work(group: ReplicaGroup) -> None:
        raise UserError("the record is damaged.")

    monkeypatch.setattr(distributed, "ProcessGroupGloo", slow_on_rank_0)
    connecting, ended = run_ranks(monkeypatch, 2, work)
    assert isinstance(connecting, OtherReplicaFailed) and str(connecting) == "the record is damaged."
    assert str(ended) == "rank 1 of 2: the record is damaged."


def test_the_rank_that_ends_without_an_error_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: ReplicaGroup) -> None:
        if group.rank == 1:
            raise ReplicaLost("not written into the store")
        group.barrier()

    printed, _, quiet = run_ranks(monkeypatch, 3, work)
    assert isinstance(printed, ReplicaLost) and isinstance(quiet, OtherReplicaFailed)
    assert "rank 1 of 3 (host " in str(printed) and " has ended, so the other replicas stop. " in str(printed)
    assert str(printed).endswith("Run the same command again.")


def test_the_rank_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: ReplicaGroup) -> None:
        group.barrier()
        if group.rank == 0:
            time.sleep(6)  # longer than the time-out of 3 s
        group.barrier()

    _, printed, quiet = run_ranks(monkeypatch, 3, work, timeout_s=3)
    assert isinstance(printed, ReplicaLost) and isinstance(quiet, OtherReplicaFailed)
    assert "rank 0 of 3 (host " in str(printed) and "did not take part in an exchange within 3 s" in str(printed)


def test_a_process_of_this_machine_that_has_ended_is_recognized() -> None:
    host = f"host {platform.node()}"
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not has_ended(f"{host}, process {process.pid}")
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(f"{host}, process {process.pid}")  # a zombie process counts as ended
    assert has_ended(f"{host}, process {process.pid}") and not has_ended(f"{host}, process {os.getpid()}")
    assert not has_ended(f"{host}-2, process {process.pid}")


def test_a_rank_that_never_starts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list TCPStore in __all__

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    server.set("alextrain/process/1", '{"name": "old", "place": "of an earlier group"}')
    with (
        pytest.raises(ReplicaLost, match=r"rank 2 of 3 did not start within 0.2 s"),
        joined(ReplicaGroup(0, 3, 0, 3, launched=True), 0.2),
    ):
        pass
