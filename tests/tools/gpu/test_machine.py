"""Tests of the figures that tools.gpu_check derives from the machine: peak rates of GPUs, hours of training."""

from __future__ import annotations

import pytest

from tools.gpu.machine import imagenet_hours, peak_tflops


def test_hours_are_those_of_90_epochs_of_imagenet() -> None:
    assert imagenet_hours(16_014.5875) == pytest.approx(2.0)


def test_peaks_of_two_gpus_are_added_and_an_unknown_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"cuda:0": "NVIDIA H100 80GB HBM3", "cuda:1": "NVIDIA A100-SXM4-40GB", "cuda:2": "NVIDIA GeForce RTX 9090"}
    names |= {f"cuda:{n}": f"NVIDIA {name}" for n, name in enumerate(("H200", "H200 NVL", "H100 NVL", "H100 PCIe"), 3)}
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: names[str(device)])
    assert peak_tflops(("cuda:0", "cuda:0")) == 989 and peak_tflops(("cuda:0", "cuda:1")) == 989 + 312
    assert [peak_tflops((f"cuda:{n}",) * 2) for n in range(3, 7)] == [989, 835, 835, 756]
    assert peak_tflops(("cuda:0", "cuda:2")) is None and peak_tflops(("cpu", "cpu")) is None
