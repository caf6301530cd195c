"""Tests that each check of tools.gpu_check fails if the device computes a wrong result. The tests run on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tools.gpu.checks as checks
from pipeline import loader_base
from pipeline.augment import Augmenter
from pipeline.device import Placement
from pipeline.engines.dali_engine import DaliEngine, OutputFormat
from pipeline.engines.dali_window_engine import DaliWindowEngine
from pipeline.engines.device_stream import open_stream
from pipeline.engines.engine import Engine
from pipeline.engines.raw_gpu_engine import RawGpuEngine
from pipeline.loader import Batch, TrainLoader
from tools.gpu.settings import GpuCheckSettings
from train.model import alexnet
from train.model.alexnet import AlexNet


def failed_checks(settings: GpuCheckSettings, part: Any, *arguments: Any) -> list[str]:
    return [check.name for check in part(settings, *arguments) if not check.ok]


@pytest.mark.parametrize("fault", ["shifted", "mirrored", "brighter", "labels"])
@pytest.mark.parametrize("format", ["jpeg", "ppm"])
def test_other_images_or_labels_on_the_device_fail_the_stream_checks(
    settings: GpuCheckSettings, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, fault: str, format: str
) -> None:
    def with_fault(batch: Batch) -> Batch:
        images, labels = batch
        return {
            "shifted": Batch(images.roll(1, 2), labels),
            "mirrored": Batch(images.flip(2), labels),
            "brighter": Batch(images + 2.0, labels),
            "labels": Batch(images, labels + 1),
        }[fault]

    calls, read_batches = [], checks.read_batches

    def read_with_fault(*arguments: Any) -> Any:
        """Add the fault to the batches of calls 2, 4, 6 and 8, which read the stream on the device.

        The other calls read on the CPU, or from a resumed stream.
        """
        calls.append(arguments)
        batches, state = read_batches(*arguments)
        is_device = len(calls) % 2 == 0 and len(calls) < 9
        return ([with_fault(batch) for batch in batches] if is_device else batches), state

    monkeypatch.setattr(checks, "read_batches", read_with_fault)
    failed = failed_checks(settings, checks.stream_checks, stores[format], format)
    assert len(failed) == 4 and not any("resumed" in name for name in failed)


@pytest.mark.parametrize(("fault", "failures"), [("regions", 4), ("jitter", 2), ("one level", 4)])
def test_other_windows_or_effects_on_the_device_fail_the_window_checks(
    settings: GpuCheckSettings, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, fault: str, failures: int
) -> None:
    calls, read_batches = [], checks.read_batches

    def read_with_fault(*arguments: Any) -> Any:
        """Add the fault to every second call, which reads the stream on the device."""
        calls.append(arguments)
        if len(calls) % 2:
            return read_batches(*arguments)
        *others, augmentation = arguments
        if fault == "regions":
            augmentation = replace(augmentation, scale=(0.5, 1.0))
        elif fault == "jitter":
            augmentation = replace(augmentation, jitter=None)
        batches, state = read_batches(*others, augmentation)
        if fault == "one level":
            batches[1].images[1, 2, 3, 2] += 1
        return batches, state

    monkeypatch.setattr(checks, "read_batches", read_with_fault)
    assert len(failed_checks(settings, checks.window_checks, stores["ppm"], "ppm")) == failures
    if fault != "one level":
        assert len(failed_checks(settings, checks.window_checks, stores["jpeg"], "jpeg")) == failures


@pytest.mark.parametrize("format", ["jpeg", "ppm"])
def test_the_engines_of_a_gpu_pass_the_window_checks_on_a_cpu(
    settings: GpuCheckSettings, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Every second loader, which is the loader of the device, has the engine of a GPU.

    The operators of this engine run on the CPU.
    """
    calls, choose_engine = [], loader_base.choose_engine

    def choose(augmenter: Augmenter, placement: Placement, output: OutputFormat, threads: int) -> Engine:
        calls.append(output)
        if len(calls) % 2:
            return choose_engine(augmenter, placement, output, threads)
        stream = open_stream(placement)
        if augmenter.is_raw:
            return RawGpuEngine(augmenter, stream, output, threads)
        return (DaliWindowEngine if output.has_effects else DaliEngine)(augmenter, placement, output, stream)

    monkeypatch.setattr(loader_base, "choose_engine", choose)
    found = list(checks.window_checks(replace(settings, batch=8), stores[format], format))
    assert len(found) == 4 and all(check.ok for check in found), found


def test_a_stream_that_resumes_at_another_position_fails(
    settings: GpuCheckSettings, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainLoader, "load_state_dict", lambda self, state: self.seek(0, 0))
    (name,) = failed_checks(settings, checks.stream_checks, stores["jpeg"], "jpeg")
    assert "resumed from a state" in name


@pytest.mark.parametrize("fault", ["input", "no normalization", "gradient"])
def test_a_network_that_computes_something_else_fails(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """All networks get the fault, except the reference, which is the only network in float64."""
    inputs, max_pool, drop = AlexNet._inputs, alexnet.max_pool, AlexNet._with_dropout
    exact = torch.float64
    if fault == "input":
        monkeypatch.setattr(AlexNet, "_inputs", lambda net, x: inputs(net, x if x.dtype == exact else 1.2 * x))
    elif fault == "no normalization":
        monkeypatch.setattr(
            alexnet, "max_pool", lambda x, norm, *rest: max_pool(x, norm if x.dtype == exact else None, *rest)
        )
    else:  # the outputs stay correct, but the gradient is a fifth of the correct gradient
        reduced = lambda x: x if x.dtype == exact else 0.2 * x + 0.8 * x.detach()  # noqa: E731
        monkeypatch.setattr(AlexNet, "_with_dropout", lambda net, layer, x: drop(net, layer, [reduced(t) for t in x]))
    assert failed_checks(settings, checks.network_checks) == [
        "network in fp32 on cpu against float64",
        "network in bf16 on cpu against float64",
    ]


def test_tf32_in_place_of_float32_fails(settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test rounds weights to the 10 mantissa bits of TF32, as PyTorch's convolutions on a GPU do by default."""
    make_network = checks.make_network
    calls: list[int] = []

    def make_rounded_network(*arguments: Any) -> AlexNet:
        model = make_network(*arguments)
        calls.append(0)
        if len(calls) > 1:  # the first network is the reference
            for parameter in model.parameters():
                bits = parameter.data.view(torch.int32)
                bits.add_(1 << 12).bitwise_and_(~((1 << 13) - 1))
        return model

    monkeypatch.setattr(checks, "make_network", make_rounded_network)
    assert failed_checks(settings, checks.network_checks) == ["network in fp32 on cpu against float64"]


def test_a_normalization_that_divides_alpha_by_the_size_fails(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lrn = checks.local_response_norm
    monkeypatch.setattr(checks, "local_response_norm", lambda x, size, alpha, beta, k: lrn(x, size, alpha / 5, beta, k))
    assert len(failed_checks(settings, checks.lrn_checks)) == 4


def test_two_runs_with_different_dropout_fail(settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    manual_seed = torch.manual_seed
    count = iter(range(100))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: manual_seed(seed + next(count) if seed == 7 else seed))
    assert len(failed_checks(settings, checks.repeat_checks)) == 1
