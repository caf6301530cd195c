"""Timings of tools.gpu_check: rates of the stream, of steps, and of steps that the stream feeds; times of kernels."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pipeline.device import Placement, dali
from pipeline.engines.dali_shutdown import shut_down
from pipeline.loader import Batch, TrainLoader, train_loader
from prep.console import UserError, usable_cores
from prep.store.manifest import Store
from tools.bench.harness import Contestant, Row, race
from tools.bench.loaders import train_records
from tools.gpu.checks import STEPS_BEFORE_REPLAY, make_counted_step, make_step
from tools.gpu.machine import elapsed_s, imagenet_hours, peak_tflops, synchronize
from tools.gpu.settings import GpuCheckSettings
from train.model.precision import set_precision
from train.model.summary import summarize

# Number of batches that are discarded before each timed run, because the stream may have prefetched them.
MAX_PREFETCHED = 8
GOAL_RATIO, GOAL_HOURS = 0.98, 2.0
# Batch sizes at which the last precision is measured. The other precisions are measured only at the first size.
BATCHES = (128, 256, 512, 1024, 2048)
GOAL_JPEG_RATIO = 0.95
PROFILED_STEPS = 3
_HOST_STEPS = 20
DECODER = "decoder of jpeg"
_DECODED_BATCHES = 4  # number of different batches that `decoder_alone` decodes, again and again

# Rules (kind, whether callers count, pattern) that give the kind of a kernel or operation. The kind is a JSON key.
# A call chain is a list of names: the kernel (only on a GPU), the operation, and the operation's callers. The first
# rule whose pattern occurs in a name of the call chain gives the kind. If callers do not count, only the first two
# names are searched. "copies" stands before "convolution", so that a type conversion in a convolution counts as a copy.
_KINDS = (
    ("update", True, r"Optimizer\.step"),
    ("normalisation", True, r"_Lrn|lrn"),
    ("copies", False, r"(?i)memcpy|memset|aten::copy_|direct_copy"),
    ("convolution", True, r"(?i)conv|cudnn"),
    ("matrix product", True, r"(?i)addmm|aten::mm|matmul|linear|gemm"),
    ("pooling", True, r"(?i)pool"),
)
OTHER_KIND = "elementwise and others"

Work = Callable[[], object]


def measure_rates(settings: GpuCheckSettings) -> list[Row]:
    """Return images/s of the stream, of steps on one batch that stays on the GPU, and of steps that the stream feeds.

    The steps that the stream feeds, such as "bf16 from jpeg", use the last of settings.precisions. The rates
    of these steps are compared with the rate of steps on one batch in the same precision.
    """
    with ExitStack() as streams:
        contestants = []
        loaders = {}
        for format, store in settings.stores_by_format().items():
            batch = min(settings.batch, Store.open(store).split("train").records)
            stream = streams.enter_context(train_loader(store, batch, settings.devices[0], seed=1))
            loaders[format] = loader = EndlessLoader(stream)
            name = f"stream of {format}"
            contestants.append(make_contestant(settings, name, batch, loader.next_batch, MAX_PREFETCHED))
            if format == "jpeg":
                with suppress(UserError):  # raised if DALI is not installed or sees no GPU
                    decode = decoder_alone(streams, store, batch, settings.devices[0])
                    contestants.append(make_contestant(settings, DECODER, batch, decode, MAX_PREFETCHED))
        for precision in settings.precisions:
            step, images, labels = make_counted_step(settings, precision)
            alone = make_contestant(settings, precision, settings.batch, _step_on(step, images, labels), 1, precision)
            contestants.append(alone)
            for format, loader in loaders.items() if precision == settings.precisions[-1] else ():
                name, work = f"{precision} from {format}", _step_from(step, loader)
                contestants.append(
                    make_contestant(settings, name, loader.batch_size, work, MAX_PREFETCHED, precision, ours=alone.name)
                )
        last = settings.precisions[-1]
        if settings.devices[0] != settings.devices[1]:
            step, images, labels = make_counted_step(settings, last, (settings.devices[0],) * 2)
            name, work = f"{last}, one GPU", _step_on(step, images, labels)
            contestants.append(make_contestant(settings, name, settings.batch, work, 1, last, ours=last))
        return race(contestants, settings.rounds, settings.pause_s)


class EndlessLoader:
    """An endless sequence of the batches of a loader, epoch after epoch."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader, self.batch_size = loader, loader.batch_size
        self._batches = self._forever()

    def _forever(self) -> Iterator[Batch]:
        while True:
            yield from self.loader

    def next_batch(self) -> Batch:
        """Return the next batch."""
        return next(self._batches)


def _step_on(step: Callable[..., object], *batch: torch.Tensor) -> Work:
    return lambda: step(*batch)


def _step_from(step: Callable[..., object], loader: EndlessLoader) -> Work:
    return lambda: step(*loader.next_batch())


def decoder_alone(cleanup: ExitStack, store: Path, batch: int, device: str) -> Work:
    """Return a function that decodes a batch of JPEG records with DALI, and does nothing else.

    The records are read into memory first. When `cleanup` exits, the decoder is stopped. Raises UserError if DALI is
    not installed.
    """
    placement, fn, types = Placement.parse(device), dali().fn, dali().types
    records = islice(train_records(Store.open(store)), _DECODED_BATCHES * batch)
    files = [np.frombuffer(record.data, np.uint8) for record in records]
    batches = cycle([files[start : start + batch] for start in range(0, len(files) - batch + 1, batch)])
    pipe = dali().Pipeline(batch_size=batch, num_threads=usable_cores(), device_id=placement.device_id)
    with pipe:
        jpeg = fn.external_source(lambda: next(batches), dtype=types.UINT8, ndim=1, no_copy=True)
        pipe.set_outputs(fn.decoders.image(jpeg, device=placement.decoder_device, output_type=types.RGB))
    pipe.build()
    cleanup.callback(shut_down, pipe)
    run: Work = pipe.run
    return run


def make_contestant(
    settings: GpuCheckSettings,
    name: str,
    batch: int,  # number of images that one call of `work` processes
    work: Work,
    warm_up: int,  # number of calls of `work` before each turn; these calls are not counted
    precision: str | None = None,  # precision of the training steps in `work`, set before each turn
    ours: str | None = None,
) -> Contestant:
    """Return a contestant. In each turn (timed run), `work` is called again and again for about settings.turn_s."""
    calls: list[int] = []  # [number of calls in a turn]; empty until `prepare` has measured this number

    def prepare() -> None:
        if precision is not None:
            set_precision(precision, settings.devices)  # other contestants change the precision
        if settings.turn_s:
            repeat(work, warm_up)
        if not calls:
            calls.append(_calls_per_turn(settings, work) if settings.turn_s else 1)

    def rate() -> float:
        turn_s = elapsed_s(settings.devices, lambda: repeat(work, calls[0]))
        return batch * calls[0] / turn_s

    return Contestant(name, rate, prepare=prepare, ours=ours or name)


def _calls_per_turn(settings: GpuCheckSettings, work: Work) -> int:
    """Return the number of calls of `work` that take settings.turn_s seconds; at least 3."""
    repeat(work, 3)  # the first calls are slow, because they load kernels and choose algorithms
    return max(3, round(3 * settings.turn_s / elapsed_s(settings.devices, lambda: repeat(work, 3))))


def repeat(work: Work, times: int) -> None:
    """Call `work` several times."""
    for _ in range(times):
        work()


def rates_by_batch_size(settings: GpuCheckSettings) -> list[dict[str, Any]]:
    """Return a row with the images/s of training steps for each precision and each batch size of `other_batches`.

    For the first batch size that does not fit in memory, images_per_s is None; larger batches are not measured.
    """
    rows: list[dict[str, Any]] = []
    for precision in settings.precisions:
        for batch in other_batches(settings, precision):
            try:
                step, images, labels = make_counted_step(settings, precision, batch=batch)
                work = _step_on(step, images, labels)
                contestant = make_contestant(settings, precision, batch, work, 1, precision)
                rates = []
                for _ in range(settings.rounds):
                    contestant.prepare()
                    rates.append(contestant.rate())
                rows.append({"precision": precision, "batch": batch, "images_per_s": round(median(rates), 1)})
            except torch.OutOfMemoryError:
                rows.append({"precision": precision, "batch": batch, "images_per_s": None})
                break
            finally:  # free the memory before the next network is made
                step = images = labels = work = contestant = None  # type: ignore[assignment]
                if settings.on_gpu:
                    torch.cuda.empty_cache()
    return rows


def other_batches(settings: GpuCheckSettings, precision: str) -> list[int]:
    """Return the batch sizes that rates_by_batch_size measures, from the smallest to the largest."""
    if settings.is_cpu_trial:
        return [2 * settings.batch]
    sizes = BATCHES[: 3 if settings.quick else None] if precision == settings.precisions[-1] else BATCHES[:1]
    return [size for size in sizes if size != settings.batch]


def peak_memory_gib(settings: GpuCheckSettings, precision: str) -> dict[str, float]:
    """Return {GPU: peak memory of tensors in GiB} for steps on settings.batch images; empty on a CPU."""
    gpus = [device for device in dict.fromkeys(settings.devices) if settings.on_gpu]
    for device in gpus:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    repeat(_step_on(*make_step(settings, precision)), 3 if settings.on_gpu else 1)
    return {device: round(torch.cuda.max_memory_allocated(device) / 2**30, 2) for device in gpus}


def kernel_times_ms(settings: GpuCheckSettings, precision: str) -> dict[str, float]:
    """Return {kind of kernel: milliseconds in a step on settings.batch images}, with the largest time first.

    On GPUs the times of kernels are summed over all GPUs. On a CPU the times of operations are summed.
    """
    step, images, labels = make_step(settings, precision)
    work = _step_on(step, images, labels)
    repeat(work, 3 if settings.on_gpu else 1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if settings.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        elapsed_s(settings.devices, lambda: repeat(work, PROFILED_STEPS))
    times_us: dict[str, float] = {}
    for event in profile.events():
        call_chain = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            call_chain.append(parent.name)
            parent = parent.cpu_parent
        if settings.on_gpu:
            for kernel in event.kernels:
                # A kernel with the name of its event is an annotation. Other kernels already account for its time.
                if kernel.name != event.name:
                    kind = kernel_kind([kernel.name, *call_chain])
                    times_us[kind] = times_us.get(kind, 0.0) + kernel.duration
        else:
            kind = kernel_kind(call_chain)
            times_us[kind] = times_us.get(kind, 0.0) + event.self_cpu_time_total
    largest_first = sorted(times_us.items(), key=lambda item: -item[1])
    return {kind: round(time_us / PROFILED_STEPS / 1000, 3) for kind, time_us in largest_first}


def kernel_kind(call_chain: list[str]) -> str:
    """Return the kind of the kernel or operation call_chain[0].

    The other names of `call_chain` are its callers, from the innermost to the outermost.
    """
    for kind, callers_count, pattern in _KINDS:
        if any(re.search(pattern, name) for name in (call_chain if callers_count else call_chain[:2])):
            return kind
    return OTHER_KIND


def cuda_graph_rates(settings: GpuCheckSettings) -> list[Row]:
    """Return images/s of the training step for two ways to launch the step, in the last of `settings.precisions`.

    The first way launches the step kernel by kernel. The second way is that of `alextrain run`, which replays a graph.
    """
    precision = settings.precisions[-1]
    steps: dict[str, tuple[Callable[..., object], torch.Tensor, torch.Tensor]] = {
        f"{precision}, launched": make_step(settings, precision),
        f"{precision}, replayed": make_counted_step(settings, precision),
    }
    contestants = [
        make_contestant(settings, name, settings.batch, _step_on(*step), 1, precision) for name, step in steps.items()
    ]
    return race(contestants, settings.rounds, settings.pause_s)


def host_time_us(settings: GpuCheckSettings) -> float:
    """Return the time in µs for which a step in the last precision occupies the host, without waits for the GPU."""
    precision = settings.precisions[-1]
    set_precision(precision, settings.devices)
    work = _step_on(*make_counted_step(settings, precision))
    repeat(work, STEPS_BEFORE_REPLAY if settings.on_gpu else 1)
    synchronize(settings.devices)
    steps = _HOST_STEPS if settings.on_gpu else 1
    started = time.perf_counter()
    repeat(work, steps)
    host_s = time.perf_counter() - started
    synchronize(settings.devices)
    return round(1e6 * host_s / steps, 1)


def summarize_rates(settings: GpuCheckSettings, rows: list[Row]) -> dict[str, Any]:
    """Return {precision: figures}, for the JSON key "conclusions".

    For steps on one batch, the figures are the TFLOP/s and the share of the peak rate. For steps on batches of the
    stream, the figures are ratios of rates, and the hours of 90 epochs of ImageNet.
    """
    # The rates in `rows` are rounded to tenths. A rate that is rounded to 0 could not be a divisor.
    rate = {row.name: max(row.images_per_s, 0.1) for row in rows}
    layers = [row.multiply_adds for row in summarize(1000)]
    # A step has three passes: forward, gradients of weights, gradients of inputs. No gradient of the image is computed.
    multiply_adds = 3 * sum(layers) - layers[0]
    peak = peak_tflops(settings.devices) if settings.on_gpu else None
    summary: dict[str, Any] = {}
    for precision in settings.precisions:
        tflops = rate[precision] * multiply_adds * 2 / 1e12
        entry: dict[str, Any] = {"images_per_s": rate[precision]}
        if settings.on_gpu:
            entry["tflops"] = round(tflops, 1)
            if peak is not None:
                entry["share_of_bf16_peak"] = round(tflops / peak, 4)
        for row in rows:
            if row.name.startswith(f"{precision} from "):
                format = row.name.removeprefix(f"{precision} from ")
                hours = imagenet_hours(rate[row.name])
                # Steps on JPEG records cannot be faster than the decoder.
                bound = (
                    min(rate[precision], rate.get(DECODER, rate[precision])) if format == "jpeg" else rate[precision]
                )
                goal = GOAL_JPEG_RATIO if format == "jpeg" else GOAL_RATIO
                entry[f"from_{format}"] = {
                    "images_per_s": rate[row.name],
                    "of_network_alone": row.of_ours,
                    "of_bound": round(rate[row.name] / bound, 3),
                    "stream_of_network": round(rate[f"stream of {format}"] / rate[precision], 2),
                    "hours_for_90_epochs": round(hours, 2),
                    "within_goal": rate[row.name] >= goal * bound and hours < GOAL_HOURS,
                }
        summary[precision] = entry
    return summary
