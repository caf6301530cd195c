"""Settings of tools.gpu_check, the numbers of images and rounds that follow from the settings, and class Check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prep.store.manifest import Store
from train.config.architecture import ALEXNET, Architecture, Widths
from train.config.devices import Devices


@dataclass(frozen=True)
class Check:
    """Result of one check. The fields are JSON keys of the report."""

    name: str
    ok: bool
    found: str
    wanted: str


@dataclass(frozen=True)
class GpuCheckSettings:
    """Settings from the command line. A run with `--device cpu --quick` is called the trial on a CPU."""

    store: Path
    ppm_store: Path | None
    devices: Devices  # devices of the network's columns 0 and 1
    batch: int  # number of images in a step
    quick: bool

    @property
    def device(self) -> torch.device:
        """The device of the network's column 0, which also computes the batches of the stream and the logits."""
        return torch.device(self.devices[0])

    @property
    def on_gpu(self) -> bool:
        """True if `device` is a GPU."""
        return self.device.type == "cuda"

    @property
    def is_cpu_trial(self) -> bool:
        """True if this run is the trial on a CPU, in which all amounts of work are as small as possible."""
        return self.quick and not self.on_gpu

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions to check. On a GPU, tf32 and bf16 need compute capability 8.0."""
        if not self.on_gpu:
            return "fp32", "bf16"
        return ("fp32", "tf32", "bf16") if torch.cuda.get_device_capability(self.device) >= (8, 0) else ("fp32",)

    @property
    def architecture(self) -> Architecture:
        """The network of the paper. In the trial on a CPU, each convolutional layer has only eight maps."""
        return replace(ALEXNET, widths=Widths(8, 8, 8, 8, 8, 16, 16)) if self.is_cpu_trial else ALEXNET

    @property
    def rounds(self) -> int:
        """Number of counted rounds. In a round, each rate is measured once (tools/bench/harness.py)."""
        return 1 if self.is_cpu_trial else 3

    @property
    def turn_s(self) -> float:
        """Approximate duration of a measurement of a rate, in seconds. 0 means a single step or batch."""
        return 0.0 if self.is_cpu_trial else 0.3 if self.quick else 0.6

    @property
    def pause_s(self) -> float:
        """Pause before each measurement of a rate, in seconds."""
        return 0.1 if self.on_gpu else 0.0

    @property
    def compared_images(self) -> int:
        """Number of images in a batch of the stream checks and step checks.

        The network checks use an eighth of this number, but at least 2 images.
        """
        return min(self.batch, 16 if self.quick else 64)

    @property
    def kernel_images(self) -> int:
        """Number of images in the checks and timings of single kernels."""
        return 2 if self.is_cpu_trial else 64 if self.quick else 512

    def stores_by_format(self) -> dict[str, Path]:
        """Return {format of the records ("jpeg" or "ppm"): path of the store}."""
        stores = {Store.open(self.store).settings.format: self.store}
        if self.ppm_store is not None:
            stores.setdefault(Store.open(self.ppm_store).settings.format, self.ppm_store)
        return stores
