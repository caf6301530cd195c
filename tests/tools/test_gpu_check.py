"""The tool end to end on the CPU; that a fault is reported as one; and the arithmetic of its report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import tools.gpu.checks as checks
import tools.gpu.timings as timings
from pipeline.loader import Batch
from prep.console import UserError
from tools.gpu.machine import Plan, hours_of_imagenet, peak_tflops
from tools.gpu_check import main, planned
from tools.bench.harness import Row
from train.model import alexnet
from train.model.alexnet import AlexNet


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """The global ones, as they were; one thread, for tensors this small."""
    matmul, cudnn, threads = torch.backends.cuda.matmul, torch.backends.cudnn, torch.get_num_threads()
    before = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark = before


@pytest.fixture
def plan(stores: dict[str, Path]) -> Plan:
    return planned(stores["jpeg"], stores["ppm"], "cpu", None, 2, True)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words), "--device", "cpu", "--quick", "--batch", "2"])


def failed(plan: Plan, part: Any, *more: Any) -> list[str]:
    return [check.name for check in part(plan, *more) if not check.ok]


def test_end_to_end_on_a_cpu(stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "PROFILED_STEPS", 1)
    out = tmp_path / "gpu.json"
    result = run("--store", stores["jpeg"], "--ppm-store", stores["ppm"], "--out", out)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["failed"] == [] and report["machine"]["torch"] == torch.__version__
    assert all(check["ok"] for check in report["checks"]) and len(report["checks"]) == 5 + 5 + 2 + 4 + 1
    names = ["stream of jpeg", "stream of ppm"]
    names += [f"{p}{rest}" for p in ("fp32", "bf16") for rest in ("", " from jpeg", " from ppm")]
    assert [row["name"] for row in report["rates"]] == names
    assert {row["ours"] for row in report["rates"] if row["name"].startswith("bf16")} == {"bf16"}
    for entry in report["conclusions"].values():
        fed = entry["from_jpeg"]
        assert fed["of_network_alone"] == pytest.approx(fed["images_per_s"] / entry["images_per_s"], rel=0.02)
    assert [row["batch"] for row in report["batches"]] == [4, 4]
    for kinds in report["kernels"].values():
        assert {"convolution", "pooling", "update"} < set(kinds) and min(kinds.values()) >= 0
    for line in ("ok ", "rates, batch 2", "bf16 from ppm", "fp32  ms a step: ", "All 17 checks are ok."):
        assert line in result.output, line


def test_a_failed_check_is_exit_code_1_and_the_rest_goes_on(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(plan: Plan) -> Iterator[checks.Check]:
        raise RuntimeError("no kernel image\nis available")
        yield

    def nothing(plan: Plan, *_: object) -> Iterator[checks.Check]:
        return iter([checks.Check("nothing", True, "0", "0")])

    for name in ("stream_checks", "network_checks", "repeat_checks"):
        monkeypatch.setattr(checks, name, nothing)
    monkeypatch.setattr(checks, "lrn_checks", broken)
    monkeypatch.setattr("tools.gpu_check.timings", lambda plan: iter([(n, "not measured") for n in PARTS]))
    result = run("--store", stores["jpeg"], "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["failed"] == ["local response normalisation"]
    assert [check["ok"] for check in report["checks"]] == [True, True, False, True]
    assert "FAILED  local response normalisation: RuntimeError: no kernel image (wanted: no error)" in result.stderr


PARTS = ("rates", "batches", "kernels", "memory_gib")


def test_a_timing_that_fails_is_said_and_the_others_are_taken(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: busy")

    for name in ("rates", "batch_sizes"):
        monkeypatch.setattr(timings, name, broken)
    monkeypatch.setattr(timings, "kernels", lambda plan, precision: {"convolution": 1.0})
    found = dict(timings.timings(plan))
    assert found["rates"] == found["batches"] == "not measured: RuntimeError: CUDA error: busy"
    assert found["kernels"]["bf16"] == {"convolution": 1.0} and tuple(found) == PARTS


# ---- faults, each in what would be the GPU's


@pytest.mark.parametrize("fault", ["shifted", "mirrored", "brighter", "labels"])
@pytest.mark.parametrize("format", ["jpeg", "ppm"])
def test_a_stream_that_serves_something_else_fails(
    plan: Plan, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, fault: str, format: str
) -> None:
    def wrong(batch: Batch) -> Batch:
        images, labels = batch
        return {
            "shifted": Batch(images.roll(1, 2), labels),
            "mirrored": Batch(images.flip(2), labels),
            "brighter": Batch(images + 2.0, labels),
            "labels": Batch(images, labels + 1),
        }[fault]

    calls, serve = [], checks.served

    def served(*words: Any) -> Any:
        calls.append(words)
        batches, state = serve(*words)
        return ([wrong(batch) for batch in batches] if len(calls) % 2 == 0 and len(calls) < 9 else batches), state

    monkeypatch.setattr(checks, "served", served)
    found = failed(plan, checks.stream_checks, stores[format], format)
    assert len(found) == 4 and not any("continued" in name for name in found)


def test_a_stream_that_is_continued_wrongly_fails(
    plan: Plan, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.loader import TrainLoader

    monkeypatch.setattr(TrainLoader, "load_state_dict", lambda self, state: self.seek(0, 0))
    (name,) = failed(plan, checks.stream_checks, stores["jpeg"], "jpeg")
    assert "continued from a state" in name


@pytest.mark.parametrize("fault", ["input", "no normalisation", "gradient"])
def test_a_network_that_computes_something_else_fails(plan: Plan, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The reference is float64: a fault of everything else is that of a device."""
    forward, pool, drop = AlexNet._inputs, alexnet.max_pool, AlexNet._drop
    exact = torch.float64
    if fault == "input":
        monkeypatch.setattr(AlexNet, "_inputs", lambda s, x: forward(s, x if x.dtype == exact else 1.2 * x))
    elif fault == "no normalisation":
        monkeypatch.setattr(
            alexnet, "max_pool", lambda x, norm, *more: pool(x, norm if x.dtype == exact else None, *more)
        )
    else:  # the same values, half the gradient
        halved = lambda x: x if x.dtype == exact else 0.2 * x + 0.8 * x.detach()  # noqa: E731
        monkeypatch.setattr(AlexNet, "_drop", lambda s, x: drop(s, halved(x)))
    assert failed(plan, checks.network_checks) == [
        "network in fp32 on cpu against float64",
        "network in bf16 on cpu against float64",
    ]


def test_tf32_in_place_of_float32_fails(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights rounded to TF32's 10 bits: what PyTorch's convolutions do on a GPU unless told otherwise."""
    made = checks.network

    def rounded(*words: Any) -> AlexNet:
        model = made(*words)
        for parameter in model.parameters():
            bits = parameter.data.view(torch.int32)
            bits.add_(1 << 12).bitwise_and_(~((1 << 13) - 1))
        return model

    exact = checks.outcome

    def outcome(model: AlexNet, *words: Any) -> Any:
        return exact(model, *words)

    calls: list[int] = []
    monkeypatch.setattr(
        checks, "network", lambda *w: (calls.append(0), made(*w) if len(calls) == 1 else rounded(*w))[1]
    )
    monkeypatch.setattr(checks, "outcome", outcome)
    assert failed(plan, checks.network_checks) == ["network in fp32 on cpu against float64"]


def test_a_normalisation_that_divides_alpha_fails(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = checks.local_response_norm
    monkeypatch.setattr(
        checks, "local_response_norm", lambda x, size, alpha, beta, k: norm(x, size, alpha / 5, beta, k)
    )
    assert len(failed(plan, checks.lrn_checks)) == 4


def test_runs_that_part_fail(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.manual_seed
    count = iter(range(100))
    monkeypatch.setattr(torch, "manual_seed", lambda number: seed(number + next(count) if number == 7 else number))
    assert len(failed(plan, checks.repeat_checks)) == 1


# ---- arithmetic


def test_a_turn_is_as_long_as_asked_and_leaves_out_what_was_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 ms each by a clock of the test: 50 fill half a second; eight before each turn are not counted."""
    done: list[int] = []
    plan = SimpleNamespace(devices=("cpu", "cpu"), turn_s=0.5)

    def seconds(devices: object, work: Any) -> float:
        before = len(done)
        work()
        return 0.01 * (len(done) - before)

    monkeypatch.setattr(timings, "seconds", seconds)
    contestant = timings._contestant(plan, "stream", 16, lambda: done.append(1), 8)
    contestant.prepare()
    assert len(done) == 8 + 3 + 3 and contestant.rate() == pytest.approx(1600) and len(done) == 14 + 50
    contestant.prepare()
    assert len(done) == 14 + 50 + 8


def test_each_turn_sets_its_precision(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have set theirs since the step was made, and the switches are global."""
    told: list[Any] = []
    monkeypatch.setattr(timings, "set_precision", lambda *words: told.append(words))
    timings._contestant(plan, "bf16", 2, lambda: None, 1, SimpleNamespace(precision="bf16")).prepare()
    assert told == [("bf16", plan.devices)]


@pytest.mark.parametrize("broken", [False, True])
def test_larger_batches_until_memory_ends(plan: Plan, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    def prepared(plan: Plan, precision: str, batch: int) -> Any:
        if broken:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda *_: None, None, None

    monkeypatch.setattr(timings, "prepared", prepared)
    monkeypatch.setattr(timings, "_contestant", lambda *w: SimpleNamespace(prepare=lambda: None, rate=lambda: 7.0))
    large = Plan(plan.store, None, ("cpu", "cpu"), 128, False)
    rows = timings.batch_sizes(large)
    sizes = (256,) if broken else (256, 512, 1024)
    rate = None if broken else 7.0
    assert rows == [{"precision": p, "batch": n, "images_per_s": rate} for p in ("fp32", "bf16") for n in sizes]


def test_a_stream_for_timing_has_no_end(plan: Plan) -> None:
    with timings.train_loader(plan.store, 13) as loader:
        feed = timings.Endless(loader)
        assert len(loader) == 2 and [len(feed.take().labels) for _ in range(5)] == [13] * 5
        assert loader.epoch == 2


def test_without_a_gpu_it_says_so(stores: dict[str, Path]) -> None:
    result = CliRunner().invoke(main, ["--store", str(stores["jpeg"])])
    assert result.exit_code == 1 and "sees no GPU" in result.stderr and "--device cpu --quick" in result.stderr
    with pytest.raises(UserError, match="its records are not ppm"):
        planned(stores["jpeg"], stores["jpeg"], "cpu", None, 2, True)


def test_hours_and_shares_of_the_peak(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    assert hours_of_imagenet(16_014.5875) == pytest.approx(2.0)
    names = {"cuda:0": "NVIDIA H100 80GB HBM3", "cuda:1": "NVIDIA A100-SXM4-40GB", "cuda:2": "NVIDIA GeForce RTX 9090"}
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: names[str(device)])
    assert peak_tflops(("cuda:0", "cuda:0")) == 989 and peak_tflops(("cuda:0", "cuda:1")) == 989 + 312
    names |= {f"cuda:{n}": f"NVIDIA {name}" for n, name in enumerate(("H200", "H200 NVL", "H100 NVL", "H100 PCIe"), 3)}
    assert [peak_tflops((f"cuda:{n}",) * 2) for n in range(3, 7)] == [989, 835, 835, 756]
    assert peak_tflops(("cuda:0", "cuda:2")) is None and peak_tflops(("cpu", "cpu")) is None
    gpu = Plan(plan.store, None, ("cuda:0", "cuda:0"), 128, False)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))

    def row(name: str, rate: float, of_ours: float) -> Row:
        return Row(name, rate, rate, rate, name, of_ours, None)

    rows = [row("stream of jpeg", 30_000, 1.0), row("bf16 from jpeg", 19_800, 0.99)]
    rows += [row(name, 20_000.0, 1.0) for name in gpu.precisions]
    found = timings.conclusions(gpu, rows)["bf16"]
    assert found["tflops"] == pytest.approx(20_000 * 2 * (3 * 724_406_816 - 105_415_200) / 1e12, rel=1e-3)
    assert found["share_of_bf16_peak"] == pytest.approx(found["tflops"] / 989, abs=1e-3)
    assert found["from_jpeg"] == {
        "images_per_s": 19_800,
        "of_network_alone": 0.99,
        "stream_of_network": 1.5,
        "hours_for_90_epochs": 1.62,
        "within_goal": True,
    }


@pytest.mark.parametrize(
    ("chain", "kind"),
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
def test_kinds_of_kernels(chain: list[str], kind: str) -> None:
    assert timings.kind_of(chain) == kind


def test_a_kernel_counts_once_and_an_annotation_not(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: each kernel under the operation that launched it, and not again as the span of Optimizer.step."""

    def event(name: str, parent: Any = None, kernels: Any = ()) -> SimpleNamespace:
        told = [SimpleNamespace(name=name, duration=us) for name, us in kernels]
        return SimpleNamespace(name=name, cpu_parent=parent, kernels=told)

    update = event("Optimizer.step#PaperSGD.step", kernels=[("Optimizer.step#PaperSGD.step", 900.0)])
    events = [update, event("aten::_foreach_add_", update, [("multi_tensor_apply", 300.0)])]
    events.append(event("aten::addmm", kernels=[("nvjet", 600.0)]))
    gpu = Plan(plan.store, None, ("cuda:0", "cuda:0"), 2, True)
    step = SimpleNamespace(precision="fp32")
    monkeypatch.setattr(timings, "prepared", lambda *_: (lambda *batch: step, None, None))
    monkeypatch.setattr(timings, "seconds", lambda *_: 0.0)
    monkeypatch.setattr(timings, "PROFILED_STEPS", 3)

    class Profile:
        def __init__(self, **_: Any) -> None: ...
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None: ...
        def events(self) -> list[SimpleNamespace]:
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    assert timings.kernels(gpu, "fp32") == {"matrix product": 0.2, "update": 0.1}
