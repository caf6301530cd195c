"""How fast a GPU trains: the stream alone, the network alone, and both, turn by turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch

from pipeline.loader import Batch, TrainLoader, train_loader
from prep.store.manifest import Store
from tools.gpu.checks import prepared
from tools.gpu.machine import Plan, hours_of_imagenet, peak_tflops, seconds
from tools.bench.harness import Contestant, Row, race
from train.model.precision import set_precision
from train.model.summary import summarize
from train.trainer.step import TrainingStep

AHEAD = 8  # batches that a stream may have ready when its turn comes: taken first, not counted
GOAL_RATIO, GOAL_HOURS = 0.98, 2.0
PROFILED_STEPS = 3

# The first rule that fits. Of the chain from an operation to its outermost caller: all names, or its own and those of
# its kernels alone (a type's conversion inside a convolution is a copy).
_KINDS = (
    ("update", True, r"Optimizer\.step"),
    ("normalisation", True, r"_Lrn|lrn"),
    ("copies", False, r"(?i)memcpy|memset|aten::copy_|direct_copy"),
    ("convolution", True, r"(?i)conv|cudnn"),
    ("matrix product", True, r"(?i)addmm|aten::mm|matmul|linear|gemm"),
    ("pooling", True, r"(?i)pool"),
)
OTHERS = "elementwise and others"

Work = Callable[[], object]


def timings(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Named results, as they are done. One that raises is the text of its error; the others go on."""
    parts: dict[str, Callable[[], Any]] = {
        "rates": lambda: rates(plan),
        "batches": lambda: batch_sizes(plan),
        "kernels": lambda: {precision: kernels(plan, precision) for precision in plan.precisions},
        "memory_gib": lambda: {precision: memory(plan, precision) for precision in plan.precisions},
    }
    if plan.on_gpu and plan.devices[0] == plan.devices[1]:
        parts["graph"] = lambda: graph(plan)  # last: what a failed capture leaves behind is unknown
    for name, part in parts.items():
        try:
            yield name, part()
        except Exception as error:  # as in checks: the others are worth having
            yield name, f"not measured: {type(error).__name__}: {error}".splitlines()[0][:300]


def rates(plan: Plan) -> list[Row]:
    """Stream, network on a batch that is there, and both; a row "… from …" stands beside its network alone."""
    with ExitStack() as streams:
        contestants = []
        feeds = {}
        for format, store in plan.stores().items():
            batch = min(plan.batch, Store.open(store).split("train").records)
            feeds[format] = feed = Endless(streams.enter_context(train_loader(store, batch, plan.devices[0], seed=1)))
            contestants.append(_contestant(plan, f"stream of {format}", batch, feed.take, AHEAD))
        for precision in plan.precisions:
            step, images, labels = prepared(plan, precision)
            alone = _contestant(plan, precision, plan.batch, _on(step, images, labels), 1, step)
            contestants.append(alone)
            for format, feed in feeds.items():
                name = f"{precision} from {format}"
                contestants.append(_contestant(plan, name, feed.batch, _fed(step, feed), AHEAD, step, ours=alone.name))
        last = plan.precisions[-1]
        if plan.devices[0] != plan.devices[1]:
            step, images, labels = prepared(plan, last, (plan.devices[0],) * 2)
            name = f"{last}, one GPU"
            contestants.append(_contestant(plan, name, plan.batch, _on(step, images, labels), 1, step, ours=last))
        return race(contestants, plan.rounds, plan.pause_s)


class Endless:
    """A loader whose epochs follow each other."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader, self.batch = loader, loader.batch_size
        self._batches = self._forever()

    def _forever(self) -> Iterator[Batch]:
        while True:
            yield from self.loader

    def take(self) -> Batch:
        """The next batch."""
        return next(self._batches)


def _on(step: TrainingStep, *batch: torch.Tensor) -> Work:
    return lambda: step(*batch)


def _fed(step: TrainingStep, feed: Endless) -> Work:
    return lambda: step(*feed.take())


def _contestant(
    plan: Plan,
    name: str,
    batch: int,
    work: Work,
    warm_up: int,
    step: TrainingStep | None = None,
    ours: str | None = None,
) -> Contestant:
    """Turns of as many steps as fill plan.turn_s; `warm_up` steps before each are not counted."""
    steps: list[int] = []

    def prepare() -> None:
        if step is not None:
            set_precision(step.precision, plan.devices)  # global, and the one before had another
        if plan.turn_s:
            repeat(work, warm_up)
        if not steps:
            steps.append(_fill(plan, work) if plan.turn_s else 1)

    def rate() -> float:
        took_s = seconds(plan.devices, lambda: repeat(work, steps[0]))
        return batch * steps[0] / took_s

    return Contestant(name, rate, prepare=prepare, ours=ours or name)


def _fill(plan: Plan, work: Work) -> int:
    """How often `work` is done in plan.turn_s; at least 3 times."""
    repeat(work, 3)  # the first launches load kernels and find algorithms
    return max(3, round(3 * plan.turn_s / seconds(plan.devices, lambda: repeat(work, 3))))


def repeat(work: Work, times: int) -> None:
    """Do it so often."""
    for _ in range(times):
        work()


def batch_sizes(plan: Plan) -> list[dict[str, Any]]:
    """The network alone at larger batches, each precision, until memory ends."""
    rows: list[dict[str, Any]] = []
    factors = (2,) if plan.quick else (2, 4, 8)
    for precision in plan.precisions:
        for batch in (factor * plan.batch for factor in factors):
            try:
                step, images, labels = prepared(plan, precision, batch=batch)
                contestant = _contestant(plan, precision, batch, _on(step, images, labels), 1, step)
                found = []
                for _ in range(plan.rounds):
                    contestant.prepare()
                    found.append(contestant.rate())
                rows.append({"precision": precision, "batch": batch, "images_per_s": round(median(found), 1)})
            except torch.OutOfMemoryError:
                rows.append({"precision": precision, "batch": batch, "images_per_s": None})
                break
            finally:
                step = images = labels = contestant = None  # type: ignore[assignment]  # before the next is made
                if plan.on_gpu:
                    torch.cuda.empty_cache()
    return rows


def memory(plan: Plan, precision: str) -> dict[str, float]:
    """By GPU: the most, in GiB, that the tensors of three steps at plan.batch take; nothing on a CPU."""
    gpus = [device for device in dict.fromkeys(plan.devices) if plan.on_gpu]
    for device in gpus:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    repeat(_on(*prepared(plan, precision)), 3 if plan.on_gpu else 1)
    return {device: round(torch.cuda.max_memory_allocated(device) / 2**30, 2) for device in gpus}


def kernels(plan: Plan, precision: str) -> dict[str, float]:
    """Milliseconds of a step at plan.batch by kind of kernel, most first: of the GPUs together, on a CPU of its
    operations.
    """
    step, images, labels = prepared(plan, precision)
    repeat(_on(step, images, labels), 3 if plan.on_gpu else 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if plan.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        seconds(plan.devices, lambda: repeat(_on(step, images, labels), PROFILED_STEPS))
    times_us: dict[str, float] = {}
    for event in profile.events():
        chain = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            chain.append(parent.name)
            parent = parent.cpu_parent
        if plan.on_gpu:
            for kernel in event.kernels:
                if kernel.name != event.name:  # the span of an annotation, over kernels that are counted
                    kind = kind_of([kernel.name, *chain])
                    times_us[kind] = times_us.get(kind, 0.0) + kernel.duration
        else:
            kind = kind_of(chain)
            times_us[kind] = times_us.get(kind, 0.0) + event.self_cpu_time_total
    ordered = sorted(times_us.items(), key=lambda item: -item[1])
    return {kind: round(time_us / PROFILED_STEPS / 1000, 3) for kind, time_us in ordered}


def kind_of(chain: list[str]) -> str:
    """The kind of the first of these names, which its callers' names follow."""
    for kind, of_any, pattern in _KINDS:
        if any(re.search(pattern, name) for name in (chain if of_any else chain[:2])):
            return kind
    return OTHERS


def graph(plan: Plan) -> list[Row]:
    """The step of the last precision as launched, and recorded once in a CUDA graph and replayed.

    A recorded step keeps its learning rates and its batch's place, so this is a measurement of what launching costs.
    """
    precision = plan.precisions[-1]
    step, images, labels = prepared(plan, precision)
    recorded_step, *batch = prepared(plan, precision)
    device = plan.device
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        repeat(_on(recorded_step, *batch), 3)
    torch.cuda.current_stream(device).wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(recorded):
        recorded_step(*batch)
    names = f"{precision}, launched", f"{precision}, replayed"
    works = _on(step, images, labels), recorded.replay
    contestants = [_contestant(plan, name, plan.batch, work, 1, step) for name, work in zip(names, works, strict=True)]
    return race(contestants, plan.rounds, plan.pause_s)


def conclusions(plan: Plan, rows: list[Row]) -> dict[str, Any]:
    """What the rates mean: by network fed from a stream, and for the network alone."""
    rate = {row.name: max(row.images_per_s, 0.1) for row in rows}  # they are rounded to tenths
    layers = [row.multiply_adds for row in summarize(1000)]
    multiply_adds = 3 * sum(layers) - layers[0]  # forward, gradients of weights, of inputs: the image wants none
    peak = peak_tflops(plan.devices) if plan.on_gpu else None
    found: dict[str, Any] = {}
    for precision in plan.precisions:
        tflops = rate[precision] * multiply_adds * 2 / 1e12
        entry: dict[str, Any] = {"images_per_s": rate[precision]}
        if plan.on_gpu:
            entry["tflops"] = round(tflops, 1)
            if peak is not None:
                entry["share_of_bf16_peak"] = round(tflops / peak, 4)
        for row in rows:
            if row.name.startswith(f"{precision} from "):
                format = row.name.removeprefix(f"{precision} from ")
                hours = hours_of_imagenet(rate[row.name])
                entry[f"from_{format}"] = {
                    "images_per_s": rate[row.name],
                    "of_network_alone": row.of_ours,
                    "stream_of_network": round(rate[f"stream of {format}"] / rate[precision], 2),
                    "hours_for_90_epochs": round(hours, 2),
                    "within_goal": row.of_ours >= GOAL_RATIO and hours < GOAL_HOURS,
                }
        found[precision] = entry
    return found
