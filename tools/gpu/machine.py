"""What is to be checked, and on what machine."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.placement import dali
from prep.console import UserError, usable_cores
from prep.store.manifest import Store
from train.config.architecture import ALEXNET, Architecture, Widths
from train.config.devices import Devices
from train.model.lrn import triton_fault

IMAGENET_IMAGES, PAPER_EPOCHS = 1_281_167, 90
_GIB = 2**30

# Dense peaks of the matrix units by the vendor's data sheets, TFLOP/s: bfloat16, on a V100 float16.
_PEAKS = (
    (r"H[12]00 NVL", 835.0),  # a card of 400 or 600 W
    (r"GH200|H200|H100.*HBM3|H100 SXM", 989.0),
    (r"H100.*PCIe", 756.0),
    (r"A100", 312.0),
    (r"V100", 125.0),
)


@dataclass(frozen=True)
class Plan:
    """What a run of the tool is given, and how much of everything follows from it."""

    store: Path
    ppm_store: Path | None
    devices: Devices  # of column 0, which is the one that the stream is on, and of column 1
    batch: int
    quick: bool

    @property
    def device(self) -> torch.device:
        """Where the stream is, and the logits."""
        return torch.device(self.devices[0])

    @property
    def on_gpu(self) -> bool:
        """False where the tool tries itself on a CPU."""
        return self.device.type == "cuda"

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that the device has."""
        if not self.on_gpu:
            return "fp32", "bf16"
        return ("fp32", "tf32", "bf16") if torch.cuda.get_device_capability(self.device) >= (8, 0) else ("fp32",)

    @property
    def model(self) -> Architecture:
        """The paper's; on a quick CPU of eight maps."""
        small = replace(ALEXNET, widths=Widths(8, 8, 8, 8, 8, 16, 16))
        return small if self.quick and not self.on_gpu else ALEXNET

    @property
    def rounds(self) -> int:
        """Counted turns of each contestant."""
        return 1 if self.quick and not self.on_gpu else 3 if self.quick else 5

    @property
    def turn_s(self) -> float:
        """About how long a turn is; 0: one step."""
        return 0.0 if self.quick and not self.on_gpu else 0.3 if self.quick else 1.0

    @property
    def pause_s(self) -> float:
        """Before each turn."""
        return 0.1 if self.on_gpu else 0.0

    @property
    def compared(self) -> int:
        """Images in a batch of the stream that is compared; of the network's, an eighth."""
        return min(self.batch, 16 if self.quick else 64)

    def stores(self) -> dict[str, Path]:
        """By the format of their records."""
        found = {Store.open(self.store).settings.format: self.store}
        if self.ppm_store is not None:
            found.setdefault(Store.open(self.ppm_store).settings.format, self.ppm_store)
        return found


def synchronise(devices: Devices) -> None:
    """Wait until all that was queued on the devices is done."""
    for device in set(devices):
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


def seconds(devices: Devices, work: Callable[[], object]) -> float:
    """How long `work` and all that it queues take. The devices are idle before and after, so the host's clock tells it
    for two as for one, which an event of one device does not.
    """
    synchronise(devices)
    started = time.perf_counter()
    work()
    synchronise(devices)
    return time.perf_counter() - started


def machine(devices: Devices) -> dict[str, Any]:
    """The environment table."""
    try:
        dali_version = str(dali().__version__)
    except UserError:
        dali_version = "not installed"
    table: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dali": dali_version,
        "triton": _triton(devices),
        "driver": _driver(),
        "cores": usable_cores(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
        "devices": list(devices),
    }
    for device in dict.fromkeys(devices):
        if device.startswith("cuda"):
            about = torch.cuda.get_device_properties(device)
            name = f"{about.name}, {about.total_memory / _GIB:.0f} GiB, {about.multi_processor_count} processors"
            table[device] = f"{name}, compute capability {about.major}.{about.minor}"
    if devices[0] != devices[1]:
        table["peer_to_peer"] = torch.cuda.can_device_access_peer(devices[0], devices[1])
    return table


def peak_tflops(devices: Devices) -> float | None:
    """Of the devices together; None for a GPU that the table does not know."""
    total = 0.0
    for device in set(devices):
        if not device.startswith("cuda"):
            return None
        name = torch.cuda.get_device_name(device)
        known = next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)
        if known is None:
            return None
        total += known
    return total


def hours_of_imagenet(images_per_s: float) -> float:
    """Of 90 epochs of 1,281,167 images."""
    return PAPER_EPOCHS * IMAGENET_IMAGES / images_per_s / 3600


def _triton(devices: Devices) -> str:
    """Its version, or why the normalization goes without it."""
    if not devices[0].startswith("cuda"):
        return "not used on a CPU"
    return triton_fault(torch.device(devices[0])) or version("triton")


def _driver() -> str | None:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] if told else None
