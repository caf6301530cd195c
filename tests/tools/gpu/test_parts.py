"""Tests of the parts of tools.gpu_check: the choice of parts, failing parts, and the sum of the planned times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import tools.gpu.parts as parts
from tools.gpu.settings import Check, GpuCheckSettings


def test_a_timing_that_raises_is_reported_and_the_others_are_measured(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_error(*_: object) -> None:
        raise RuntimeError("CUDA error: busy")

    for name in ("measure_rates", "rates_by_batch_size"):
        monkeypatch.setattr(parts, name, raise_error)
    monkeypatch.setattr(parts, "kernel_times_ms", lambda settings, precision: {"convolution": 1.0})
    monkeypatch.setattr(parts, "peak_memory_gib", lambda settings, precision: {})
    chosen = ("rates", "batches", "kernels", "memory_gib")
    results = dict(parts.run_timings(settings, chosen))
    assert results["rates"] == results["batches"] == "not measured: RuntimeError: CUDA error: busy"
    assert results["kernels"]["bf16"] == {"convolution": 1.0}
    assert tuple(results) == chosen


def test_the_planned_times_sum_to_less_than_five_minutes() -> None:
    planned = [part.budget_s for part in (parts.STORES, *parts.CHECKS, *parts.TIMINGS)]
    assert sum(planned) < parts.MOST_S == 300
    assert f"({sum(planned)} s in all, under five minutes)" in parts.parts_text()
    assert all(f"  {name} " in parts.parts_text() for name in parts.PART_NAMES)


def test_only_the_chosen_parts_run_and_their_times_are_kept(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checks_of_part(settings: GpuCheckSettings, *rest: object) -> Iterator[Check]:
        yield Check("a check", True, "0", "0")

    for name in ("stream_checks", "network_checks", "lrn_checks", "epilogue_checks", "repeat_checks", "resume_checks"):
        monkeypatch.setattr(parts, name, checks_of_part)
    monkeypatch.setattr(parts, "measure_epilogues", lambda settings: "measured")
    times = parts.Times({})
    assert len(list(parts.run_checks(settings, ["stream", "resume"], times))) == 2 + 1
    assert list(parts.run_timings(settings, ["epilogue_times"], times)) == [("epilogue_times", "measured")]
    assert list(times.seconds) == ["stream", "resume", "epilogue_times"]


def test_a_part_that_takes_longer_than_planned_is_named() -> None:
    times = parts.Times({"lrn": 4.9, "runs": 61.25, "stores": 41.0})
    assert times.over_budget() == ["runs took 61.2 s; planned were 46 s", "stores took 41.0 s; planned were 40 s"]
