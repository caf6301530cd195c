"""Devices and CPU threads of a replica under torchrun, where `--gpus` is the number of GPUs of a process."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from prep.console import WrongArgument, count_noun
from train.config.devices import Devices


def parse_replica_devices(gpus: str | None, columns: int, local_rank: int, local_size: int) -> Devices:
    """Return the devices that a value of `--gpus` gives to one of the replicas of a machine.

    `1`    both columns on the GPU with the number local_rank
    `2`    column 0 on GPU 2 · local_rank, column 1 on GPU 2 · local_rank + 1
    `cpu`  both columns on the CPU
    None   as `2` if the machine has two GPUs for each replica and the network has two columns; otherwise as `1` if the
           machine has a GPU, and as `cpu` if it has none

    local_rank  index of this replica among the replicas of this machine, from 0
    local_size  number of replicas on this machine

    Raises WrongArgument in three cases: the value is none of these, such as the GPU numbers `0` or `0,1`; the value is
    `2`, but the network has one column; the machine has too few GPUs.
    """
    import torch

    count = torch.cuda.device_count()
    if gpus is None:
        gpus = "2" if count >= 2 * local_size and columns == 2 else "1" if count else "cpu"
    if gpus == "cpu":
        return "cpu", "cpu"
    if gpus not in ("1", "2"):
        _refuse(gpus, local_size)
    if int(gpus) > columns:
        raise WrongArgument(f"--gpus {gpus}: this network has one column. Pass --gpus 1, or cpu.")
    needed = int(gpus) * local_size
    if needed > count:
        fitting = [f"--nproc-per-node {count // int(gpus)}"] if count >= int(gpus) else []
        fitting += ["--gpus 1"] if gpus == "2" and local_size <= count else []
        raise WrongArgument(
            f"--gpus {gpus}: {count_noun(local_size, 'replica')} on this machine "
            f"{'needs' if local_size == 1 else 'need'} {count_noun(needed, 'GPU')}, but the machine has {count}. Pass "
            f"{' or '.join([*fitting, '--gpus cpu'])}."
        )
    first = int(gpus) * local_rank
    return f"cuda:{first}", f"cuda:{first + int(gpus) - 1}"


def _refuse(gpus: str, local_size: int) -> None:
    """Raise WrongArgument for a value that is not 1, 2 or cpu."""
    meant = "2" if gpus.count(",") == 1 else "1"
    command = f"torchrun --nproc-per-node {local_size} -m train {shlex.join(with_gpus(sys.argv[1:], meant))}"
    raise WrongArgument(
        f"--gpus {gpus}: torchrun has started {count_noun(local_size, 'process', 'processes')} on this machine, and "
        "under torchrun --gpus is the number of GPUs of each process: 1, 2 (one column on each), or cpu. GPU numbers "
        f"would give the same GPUs to all processes. Type: {command}"
    )


def with_gpus(arguments: list[str], gpus: str) -> list[str]:
    """Return the arguments of a command, with `gpus` as the value of --gpus."""
    replaced, is_value = [], False
    for argument in arguments:
        if is_value:
            argument, is_value = gpus, False
        elif argument.startswith("--gpus="):
            argument = f"--gpus={gpus}"
        is_value = argument == "--gpus"
        replaced.append(argument)
    return replaced


def count_of(devices: Sequence[str]) -> str:
    """Return the value of --gpus that gives a replica as many GPUs as `devices` has."""
    gpus = [device for device in dict.fromkeys(devices) if device != "cpu"]
    return str(len(gpus)) if gpus else "cpu"


def threads_per_replica(own: list[int], cores_of_all: list[list[int]]) -> int:
    """Return a replica's number of CPU threads: its usable cores, divided by the number of replicas that share them.

    own           numbers of the cores that this process may use
    cores_of_all  numbers of the usable cores of each replica on this machine, this replica included

    If each replica has been bound to cores of its own, the replicas share no cores, and each uses all of its own.
    """
    sharing = sum(not set(own).isdisjoint(cores) for cores in cores_of_all)
    return max(1, len(own) // max(sharing, 1))
