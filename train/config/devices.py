"""Which devices the two columns are on: the words of `--gpus`."""

from __future__ import annotations

import torch

from prep import console
from prep.console import UserError

Devices = tuple[str, str]


def parse_devices(gpus: str | None, columns: int = 2) -> Devices:
    """`0,1`: column 0 and column 1; `0`: both on one GPU; `cpu`; None: what the machine has and the columns need.

    Raises UserError for other words, for a GPU that is not there, and for two devices where there is one column.
    """
    there = torch.cuda.device_count()
    if gpus is None:
        gpus = "0,1" if there >= columns == 2 else "0" if there else "cpu"
    if gpus == "cpu":
        return "cpu", "cpu"
    numbers = gpus.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise UserError(f"--gpus {gpus}: expected two GPUs (0,1), one for both columns (0), or cpu.")
    if len(numbers) > 2:
        raise UserError(f"--gpus {gpus}: AlexNet has two columns. Name two devices (0,1), one for both (0), or cpu.")
    if len(numbers) > columns:
        raise UserError(f"--gpus {gpus}: this network has one column. Name one device (0), or cpu.")
    missing = [number for number in numbers if int(number) >= there]
    if missing:
        raise UserError(
            f"--gpus {gpus}: there is no GPU {missing[0].strip()}, this machine shows {there}. "
            + ("Name one that is there, or cpu." if there else "Pass --gpus cpu.")
        )
    return f"cuda:{int(numbers[0])}", f"cuda:{int(numbers[-1])}"


def describe_devices(devices: Devices, columns: int = 2) -> str:
    """`one column on cpu`, `both columns on cpu`, `column 0 on cuda:0, column 1 on cuda:1`."""
    if columns == 1:
        return f"one column on {devices[0]}"
    if devices[0] == devices[1]:
        return f"both columns on {devices[0]}"
    return f"column 0 on {devices[0]}, column 1 on {devices[1]}"


def keep_freed_memory() -> None:
    """Have the C library keep up to 2 GiB of freed tensors for the next, for training on a CPU."""
    console.keep_freed_memory(2**31 - 1, map_large_blocks=False)
