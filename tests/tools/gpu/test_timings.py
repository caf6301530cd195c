"""Tests of the timings of tools.gpu_check: how long a rate is measured, kinds of kernels, derived figures, failures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tools.gpu.timings as timings
from tools.bench.harness import Row
from tools.gpu.settings import GpuCheckSettings


def test_a_turn_is_as_long_as_asked_and_does_not_count_prefetched_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated clock, a call takes 10 ms. After calls that are not counted, 50 calls are timed (0.5 s)."""
    calls: list[int] = []
    settings = SimpleNamespace(devices=("cpu", "cpu"), turn_s=0.5)

    def elapsed_s(devices: object, work: Any) -> float:
        before = len(calls)
        work()
        return 0.01 * (len(calls) - before)

    monkeypatch.setattr(timings, "elapsed_s", elapsed_s)
    contestant = timings.make_contestant(settings, "stream", 16, lambda: calls.append(1), 8)
    contestant.prepare()
    assert len(calls) == 8 + 3 + 3
    assert contestant.rate() == pytest.approx(1600) and len(calls) == 14 + 50
    contestant.prepare()
    assert len(calls) == 14 + 50 + 8


def test_each_turn_sets_its_precision(settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The precision switches are global. Timings of another precision may have changed them before a timing begins."""
    calls: list[Any] = []
    monkeypatch.setattr(timings, "set_precision", lambda *arguments: calls.append(arguments))
    timings.make_contestant(settings, "bf16", 2, lambda: None, 1, "bf16").prepare()
    assert calls == [("bf16", settings.devices)]


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_batches_grow_until_memory_is_exhausted(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch, out_of_memory: bool
) -> None:
    def make_step(settings: GpuCheckSettings, precision: str, batch: int) -> Any:
        if out_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda *_: None, None, None

    monkeypatch.setattr(timings, "make_counted_step", make_step)
    monkeypatch.setattr(timings, "make_contestant", lambda *_: SimpleNamespace(prepare=lambda: None, rate=lambda: 7.0))
    large = GpuCheckSettings(settings.store, None, ("cpu", "cpu"), 512, False)
    rows = timings.rates_by_batch_size(large)
    sizes = (128,) if out_of_memory else (128, 256, 1024, 2048)
    rate = None if out_of_memory else 7.0
    expected = [("fp32", 128), *(("bf16", batch) for batch in sizes)]
    assert rows == [{"precision": p, "batch": n, "images_per_s": rate} for p, n in expected]


def test_an_endless_loader_continues_with_the_next_epoch(settings: GpuCheckSettings) -> None:
    with timings.train_loader(settings.store, 13) as loader:
        endless = timings.EndlessLoader(loader)
        assert len(loader) == 2 and [len(endless.next_batch().labels) for _ in range(5)] == [13] * 5
        assert loader.epoch == 2


def test_conclusions_have_the_share_of_the_peak_and_the_hours_of_imagenet(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    gpu = GpuCheckSettings(settings.store, None, ("cuda:0", "cuda:0"), 128, False)

    def row(name: str, rate: float, of_ours: float) -> Row:
        return Row(name, rate, rate, rate, name, of_ours, None)

    rows = [row("stream of jpeg", 30_000, 1.0), row("decoder of jpeg", 19_900, 1.0)]
    rows += [row("bf16 from jpeg", 19_000, 0.95), row("bf16 from ppm", 19_000, 0.95), row("stream of ppm", 60_000, 1.0)]
    rows += [row(precision, 20_000.0, 1.0) for precision in gpu.precisions]
    summary = timings.summarize_rates(gpu, rows)["bf16"]
    assert summary["tflops"] == pytest.approx(20_000 * 2 * (3 * 724_406_816 - 105_415_200) / 1e12, rel=1e-3)
    assert summary["share_of_bf16_peak"] == pytest.approx(summary["tflops"] / 989, abs=1e-3)
    assert summary["from_jpeg"] == {
        "images_per_s": 19_000,
        "of_network_alone": 0.95,
        "of_bound": 0.955,  # 19,000 / 19,900; the decoder is the bound, because it is slower than the step
        "stream_of_network": 1.5,
        "hours_for_90_epochs": 1.69,
        "within_goal": True,
    }
    assert summary["from_ppm"]["of_bound"] == 0.95 and not summary["from_ppm"]["within_goal"]


def test_the_step_of_a_run_is_compared_with_the_launched_step_and_its_host_time_measured(
    settings: GpuCheckSettings,
) -> None:
    assert [row.name for row in timings.cuda_graph_rates(settings)] == ["bf16, launched", "bf16, replayed"]
    assert timings.host_time_us(settings) > 0


@pytest.mark.parametrize(
    ("call_chain", "kind"),
    [
        (["sm90_xmma_fprop_implicit_gemm", "aten::cudnn_convolution", "aten::conv2d"], "convolution"),
        (["void elementwise_kernel<direct_copy>", "aten::copy_", "aten::_to_copy", "aten::conv2d"], "copies"),
        (["nvjet_tst_128x256", "aten::addmm", "aten::linear"], "matrix product"),
        (["elementwise_kernel", "aten::mul", "_LrnTritonBackward"], "normalisation"),
        (["multi_tensor_apply", "aten::_foreach_add_", "Optimizer.step#PaperSGD.step"], "update"),
        (["max_pool_backward_nhwc", "aten::max_pool2d_with_indices_backward"], "pooling"),
        (["Memcpy PtoP (Device -> Device)", "aten::to"], "copies"),
        (["elementwise_kernel", "aten::threshold_backward"], "elementwise and others"),
    ],
)
def test_kernels_are_sorted_into_kinds_by_their_names_and_callers(call_chain: list[str], kind: str) -> None:
    assert timings.kernel_kind(call_chain) == kind


def test_a_kernel_counts_once_and_the_span_of_an_annotation_does_not(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of a kernel counts once, for the operation that launched it, but not for an annotation."""

    def event(name: str, parent: Any = None, kernels: Any = ()) -> SimpleNamespace:
        launched = [SimpleNamespace(name=kernel, duration=time_us) for kernel, time_us in kernels]
        return SimpleNamespace(name=name, cpu_parent=parent, kernels=launched)

    update = event("Optimizer.step#PaperSGD.step", kernels=[("Optimizer.step#PaperSGD.step", 900.0)])
    events = [update, event("aten::_foreach_add_", update, [("multi_tensor_apply", 300.0)])]
    events.append(event("aten::addmm", kernels=[("nvjet", 600.0)]))
    gpu = GpuCheckSettings(settings.store, None, ("cuda:0", "cuda:0"), 2, True)
    step = SimpleNamespace(precision="fp32")
    monkeypatch.setattr(timings, "make_step", lambda *_: (lambda *batch: step, None, None))
    monkeypatch.setattr(timings, "elapsed_s", lambda *_: 0.0)
    monkeypatch.setattr(timings, "PROFILED_STEPS", 3)

    class Profile:
        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None: ...
        def events(self) -> list[SimpleNamespace]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert timings.kernel_times_ms(gpu, "fp32") == {"matrix product": 0.2, "update": 0.1}
