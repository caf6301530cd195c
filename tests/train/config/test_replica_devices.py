"""Tests of `--gpus` under torchrun, and of the number of threads of a replica."""

from __future__ import annotations

import pytest

from prep.console import WrongArgument
from train.config.replica_devices import count_of, parse_replica_devices, threads_per_replica


def set_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def test_a_number_of_gpus_gives_each_replica_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 8)
    assert [parse_replica_devices("1", 2, rank, 4) for rank in (0, 3)] == [("cuda:0", "cuda:0"), ("cuda:3", "cuda:3")]
    assert [parse_replica_devices("2", 2, rank, 4) for rank in (0, 3)] == [("cuda:0", "cuda:1"), ("cuda:6", "cuda:7")]
    assert parse_replica_devices("cpu", 2, 3, 4) == ("cpu", "cpu")


def test_the_default_takes_pairs_single_gpus_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, columns, expected in (
        (8, 2, ("cuda:2", "cuda:3")),
        (8, 1, ("cuda:1", "cuda:1")),
        (7, 2, ("cuda:1", "cuda:1")),
        (0, 2, ("cpu", "cpu")),
    ):
        set_gpus(monkeypatch, count)
        assert parse_replica_devices(None, columns, 1, 4) == expected


@pytest.mark.parametrize(("gpus", "meant"), [("0", "1"), ("0,1", "2"), ("3", "1"), ("all", "1")])
def test_gpu_numbers_are_refused_with_the_command_to_type(
    monkeypatch: pytest.MonkeyPatch, gpus: str, meant: str
) -> None:
    set_gpus(monkeypatch, 8)
    for given, typed in ((["--gpus", gpus], f"--gpus {meant}"), ([f"--gpus={gpus}"], f"--gpus={meant}")):
        monkeypatch.setattr("sys.argv", ["train", "run", *given, "--store", "my store"])
        with pytest.raises(WrongArgument) as error:
            parse_replica_devices(gpus, 2, 0, 4)
        assert str(error.value).startswith(f"--gpus {gpus}: torchrun has started 4 processes on this machine")
        assert str(error.value).endswith(f"Type: torchrun --nproc-per-node 4 -m train run {typed} --store 'my store'")


@pytest.mark.parametrize(
    ("gpus", "count", "message"),
    [
        (
            "2",
            6,
            "--gpus 2: 4 replicas on this machine need 8 GPUs, but the machine has 6. Pass --nproc-per-node 3 or "
            "--gpus 1 or",
        ),
        ("1", 2, "need 4 GPUs, but the machine has 2. Pass --nproc-per-node 2 or --gpus cpu."),
        ("1", 0, "need 4 GPUs, but the machine has 0. Pass --gpus cpu."),
    ],
)
def test_too_few_gpus_are_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, gpus: str, count: int, message: str
) -> None:
    set_gpus(monkeypatch, count)
    with pytest.raises(WrongArgument, match=message):
        parse_replica_devices(gpus, 2, 0, 4)


def test_a_pair_for_one_column_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gpus(monkeypatch, 8)
    with pytest.raises(WrongArgument, match="this network has one column"):
        parse_replica_devices("2", 1, 0, 4)


def test_the_saved_devices_of_a_run_become_a_number_of_gpus() -> None:
    assert [count_of(devices) for devices in (("cuda:5", "cuda:5"), ("cuda:0", "cuda:1"), ("cpu", "cpu"))] == [
        *("1", "2", "cpu"),
    ]


def test_replicas_divide_the_cores_that_they_share() -> None:
    all_cores = list(range(8))
    assert threads_per_replica(all_cores, [all_cores] * 4) == 2
    assert threads_per_replica(all_cores, [all_cores] * 16) == 1
    # If each process is bound to cores of its own, each process uses all of its cores.
    assert threads_per_replica([0, 1, 2, 3], [[0, 1, 2, 3], [4, 5, 6, 7]]) == 4
