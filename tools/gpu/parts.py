"""Parts of tools.gpu_check. A part is a check or a timing, with a name and a planned time on an H200."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tools.gpu.checks import (
    lrn_checks,
    network_checks,
    repeat_checks,
    stream_checks,
    synchronization_checks,
    window_checks,
)
from tools.gpu.epilogue_times import measure_epilogues
from tools.gpu.epilogues import epilogue_checks
from tools.gpu.runs import resume_checks, run_rates
from tools.gpu.settings import Check, GpuCheckSettings
from tools.gpu.timings import (
    cuda_graph_rates,
    host_time_us,
    kernel_times_ms,
    measure_rates,
    peak_memory_gib,
    rates_by_batch_size,
)

MOST_S = 300  # limit for the sum of the planned times of all parts, including the time to make the stores


@dataclass(frozen=True)
class Part:
    """A check, a timing, or the making of the stores. --only chooses checks and timings."""

    name: str  # value of --only; for timings also the JSON key of the result
    budget_s: int  # planned time on an H200, in seconds
    subject: str


CHECKS = (
    Part("stream", 25, "batches of the stream on the GPU against batches on the CPU; resumed streams"),
    Part("windows", 10, "resized windows, and windows with effects, on the GPU against the CPU"),
    Part("network", 20, "logits and gradients in each precision against float64"),
    Part("lrn", 5, "local response normalization against float64"),
    Part("epilogues", 30, "the kernels between the convolutions, at full size, against float64"),
    Part("repeat", 4, "three steps, run twice"),
    Part("waits", 4, "a step never makes the host wait for the GPU"),
    Part("resume", 38, "`alextrain run --deterministic`, killed and resumed, against a run that was not killed"),
)
TIMINGS = (
    Part("rates", 30, "images/s of the stream, of steps on one batch, and of steps that the stream feeds"),
    Part("batches", 15, "images/s of steps for several batch sizes"),
    Part("epilogue_times", 12, "times of the kernels between the convolutions, and of copies of as many bytes"),
    Part("kernels", 8, "time that a step spends in each kind of kernel"),
    Part("memory_gib", 4, "memory of a step's tensors"),
    Part("host_us", 3, "time for which a step occupies the host"),
    Part("runs", 46, "images/s of `alextrain run`"),
    Part("graph", 5, "images/s of a step launched kernel by kernel, and of a step replayed from a CUDA graph"),
)
STORES = Part("stores", 40, "making photographs and two stores (--make-stores)")
PART_NAMES = tuple(part.name for part in (*CHECKS, *TIMINGS))


def parts_text() -> str:
    """Return a text for --help: the sum of all planned times, and a line for each part."""
    lines = [f"  {part.name:15} {part.budget_s:3} s  {part.subject}" for part in (STORES, *CHECKS, *TIMINGS)]
    total = sum(part.budget_s for part in (STORES, *CHECKS, *TIMINGS))
    return "\n".join(
        [f"Parts, and the time planned for each on an H200 ({total} s in all, under five minutes):", *lines]
    )


@dataclass(frozen=True)
class Times:
    """Durations of the parts that have ended: {name of the part: seconds}."""

    seconds: dict[str, float]

    def over_budget(self) -> list[str]:
        """Return a text for each part that took longer than planned."""
        budgets = {part.name: part.budget_s for part in (STORES, *CHECKS, *TIMINGS)}
        return [
            f"{name} took {taken:.1f} s; planned were {budgets[name]} s"
            for name, taken in self.seconds.items()
            if taken > budgets[name]
        ]


def run_checks(
    settings: GpuCheckSettings, only: Sequence[str] = PART_NAMES, times: Times | None = None
) -> Iterator[Check]:
    """Run the chosen checks and yield their results one by one.

    only   names of parts
    times  object to which the duration of each chosen part is added

    A check that raises an exception counts as failed. After a failed check, the other checks still run.
    """
    streams = settings.stores_by_format().items()
    functions: dict[str, list[tuple[str, Callable[[], Iterator[Check]]]]] = {
        "stream": [(f"stream of {f} records", partial(stream_checks, settings, store, f)) for f, store in streams],
        "windows": [(f"windows of {f} records", partial(window_checks, settings, store, f)) for f, store in streams],
        "network": [("network", lambda: network_checks(settings))],
        "lrn": [("local response normalization", lambda: lrn_checks(settings))],
        "epilogues": [("epilogues", lambda: epilogue_checks(settings))],
        "repeat": [("three steps twice", lambda: repeat_checks(settings))],
        "waits": [("synchronization in a step", lambda: synchronization_checks(settings))] if settings.on_gpu else [],
        "resume": [("run killed and resumed", lambda: resume_checks(settings))],
    }
    for part in CHECKS:
        started = time.perf_counter()
        for name, function in functions[part.name] if part.name in only else ():
            try:
                yield from function()
            except Exception as error:  # a driver, library or kernel may raise any exception
                yield Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0][:300], "no error")
        if times is not None and part.name in only:
            times.seconds[part.name] = round(time.perf_counter() - started, 1)


def run_timings(
    settings: GpuCheckSettings, only: Sequence[str] = PART_NAMES, times: Times | None = None
) -> Iterator[tuple[str, Any]]:
    """Run the chosen timings and yield (JSON key, result) one by one.

    If a timing raises an exception, the error message is yielded as the result of this timing. The other timings still
    run.
    """
    precisions = settings.precisions
    budgets = {part.name: part.budget_s for part in TIMINGS}
    functions: dict[str, Callable[[], Any]] = {
        "rates": lambda: measure_rates(settings),
        "batches": lambda: rates_by_batch_size(settings),
        "epilogue_times": lambda: measure_epilogues(settings),
        "kernels": lambda: {precision: kernel_times_ms(settings, precision) for precision in precisions},
        "memory_gib": lambda: {precision: peak_memory_gib(settings, precision) for precision in precisions},
        "host_us": lambda: host_time_us(settings),
        "runs": lambda: run_rates(settings, budgets["runs"]),
    }
    if settings.on_gpu and settings.devices[0] == settings.devices[1]:
        functions["graph"] = lambda: cuda_graph_rates(settings)
    for name, function in functions.items():
        if name not in only:
            continue
        started = time.perf_counter()
        try:
            result = function()
        except Exception as error:  # a driver, library or kernel may raise any exception
            result = f"not measured: {type(error).__name__}: {error}".splitlines()[0][:300]
        if times is not None:
            times.seconds[name] = round(time.perf_counter() - started, 1)
        yield name, result
