"""Devices of the network's columns: parses and describes the value of `--gpus`.

The module imports torch only to count GPUs.
"""

from __future__ import annotations

import re

from prep import console
from prep.console import WrongArgument

Devices = tuple[str, str]  # device of column 0 and device of column 1, which can be the same


def parse_devices(gpus: str | None, columns: int = 2) -> Devices:
    """Return the devices that a value of `--gpus` selects for a network of `columns` columns.

    `0,1`  column 0 on GPU 0, column 1 on GPU 1
    `0`    both columns on GPU 0
    `cpu`  both columns on the CPU
    None   as `0,1` if the machine has at least two GPUs and the network has two columns; otherwise as `0` if the
           machine has a GPU, and as `cpu` if it has none

    `0,1` and `0` are examples; other GPU numbers are also valid. Raises UserError in three cases: the value is neither
    `cpu` nor one or two GPU numbers; the machine has no GPU with one of these numbers; the value names two GPUs, but
    the network has one column.
    """
    import torch

    count = torch.cuda.device_count()
    if gpus is None:
        gpus = "0,1" if count >= columns == 2 else "0" if count else "cpu"
    if gpus == "cpu":
        return "cpu", "cpu"
    indices = gpus.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", index) for index in indices):
        raise WrongArgument(f"--gpus {gpus:.60}: expected two GPUs (0,1), one GPU for both columns (0), or cpu.")
    check_device_count(gpus)
    if len(indices) > columns:
        raise WrongArgument(f"--gpus {gpus}: this network has one column. Name one device (0), or cpu.")
    missing = [index.strip() for index in indices if int(index) >= count]
    if missing:
        raise WrongArgument(
            f"--gpus {gpus}: there is no GPU {missing[0]}: this machine has {console.count_noun(count, 'GPU')}. "
            + (f"Name a number below {count}, or cpu." if count else "Pass --gpus cpu.")
        )
    return f"cuda:{int(indices[0])}", f"cuda:{int(indices[-1])}"


def check_device_count(gpus: str) -> None:
    """Raise UserError if a value of `--gpus` names more than two devices."""
    if gpus.count(",") > 1:
        raise WrongArgument(
            f"--gpus {gpus:.60}: AlexNet has two columns. Name two devices (0,1), one device for both columns (0), or "
            "cpu."
        )


def describe_devices(devices: Devices, columns: int = 2) -> str:
    """Return a text such as `one column on cpu`, `both columns on cpu` or `column 0 on cuda:0, column 1 on cuda:1`."""
    if columns == 1:
        return f"one column on {devices[0]}"
    if devices[0] == devices[1]:
        return f"both columns on {devices[0]}"
    return f"column 0 on {devices[0]}, column 1 on {devices[1]}"


def keep_freed_memory() -> None:
    """Let the C library keep up to 2 GiB of freed memory for reuse, which makes training on a CPU faster."""
    console.keep_freed_memory(2**31 - 1, map_large_blocks=False)
