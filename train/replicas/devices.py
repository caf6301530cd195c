"""Devices of this process's columns, with or without torchrun."""

from __future__ import annotations

from train.config.devices import Devices, parse_devices
from train.config.replica_devices import parse_replica_devices
from train.replicas.group import ReplicaGroup


def devices_of_replica(gpus: str | None, columns: int, group: ReplicaGroup) -> Devices:
    """Return the devices of this process's columns, for a network of `columns` columns.

    `gpus` is the value of `--gpus`. Under torchrun, this value is `cpu` or the number of GPUs of each process. Raises
    the errors of parse_devices and parse_replica_devices.
    """
    if group.launched:
        return parse_replica_devices(gpus, columns, group.local_rank, group.local_size)
    return parse_devices(gpus, columns)
