"""For tools.gpu_check: facts about the machine (versions, GPUs, peak rates, speed of copies), and a timer."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.device import dali
from prep.console import UserError, usable_cores
from train.config.devices import Devices
from train.model.gpu.fault import triton_fault

IMAGENET_IMAGES, PAPER_EPOCHS = 1_281_167, 90
_GIB = 2**30

# (pattern for the name of a GPU, peak rate of this GPU in TFLOP/s). The rate is the one for dense matrix products in
# bfloat16 on the vendor's data sheet. For a V100, the rate is for float16.
_PEAKS_TFLOPS = (
    (r"H[12]00 NVL", 835.0),  # H100 NVL (400 W) and H200 NVL (600 W)
    (r"GH200|H200|H100.*HBM3|H100 SXM", 989.0),
    (r"H100.*PCIe", 756.0),
    (r"A100", 312.0),
    (r"V100", 125.0),
)


def synchronize(devices: Devices) -> None:
    """Wait until all work that is queued on the devices is done."""
    for device in set(devices):
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def elapsed_s(devices: Devices, work: Callable[[], object]) -> float:
    """Return the time in seconds that `work` takes, including all operations that it queues on the devices.

    The function waits before and after `work` until all devices are idle. The clock of the host therefore measures the
    work of all devices. A CUDA event would measure only one device.
    """
    synchronize(devices)
    started = time.perf_counter()
    work()
    synchronize(devices)
    return time.perf_counter() - started


def copy_bytes_per_s(device: str, size: int) -> float:
    """Return the bytes per second that a copy within the device's memory reads and writes, as the best of 3 trials.

    size  size of the copied tensor in bytes
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = 20 if device.startswith("cuda") else 1

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    copy()
    return 2 * size * copies / min(elapsed_s((device, device), copy) for _ in range(3))


def describe_machine(devices: Devices) -> dict[str, Any]:
    """Return the value of the JSON key "machine": {name of a fact: value}, for versions, cores and GPUs."""
    try:
        dali_version = str(dali().__version__)
    except UserError:
        dali_version = "not installed"
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # untyped in torch
        "dali": dali_version,
        "triton": _triton_version(devices),
        "driver": _driver_version(),
        "cores": usable_cores(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
        "devices": list(devices),
    }
    for device in dict.fromkeys(devices):
        if device.startswith("cuda"):
            gpu = torch.cuda.get_device_properties(device)
            size = f"{gpu.total_memory / _GIB:.0f} GiB, {gpu.multi_processor_count} processors"
            facts[device] = f"{gpu.name}, {size}, compute capability {gpu.major}.{gpu.minor}"
    if devices[0] != devices[1]:
        facts["peer_to_peer"] = torch.cuda.can_device_access_peer(devices[0], devices[1])
    return facts


def peak_tflops(devices: Devices) -> float | None:
    """Return the sum of the peak rates of the devices in TFLOP/s; None if a device is a CPU or an unknown GPU."""
    total = 0.0
    for device in set(devices):
        if not device.startswith("cuda"):
            return None
        name = torch.cuda.get_device_name(device)
        peak = next((peak for pattern, peak in _PEAKS_TFLOPS if re.search(pattern, name)), None)
        if peak is None:
            return None
        total += peak
    return total


def imagenet_hours(images_per_s: float) -> float:
    """Return the number of hours that 90 epochs of 1,281,167 images take at a rate of `images_per_s`."""
    return PAPER_EPOCHS * IMAGENET_IMAGES / images_per_s / 3600


def _triton_version(devices: Devices) -> str:
    """Return the version of Triton, or the reason why the network does not use Triton."""
    if not devices[0].startswith("cuda"):
        return "not used on a CPU"
    return triton_fault(torch.device(devices[0])) or version("triton")


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None
