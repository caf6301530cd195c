"""Tests of tools.gpu_check, run completely on a CPU: report, exit code and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import tools.gpu.checks as checks
import tools.gpu.timings as timings
from prep.console import UserError
from tools.gpu.settings import GpuCheckSettings
from tools.gpu_check import main, parse_settings

pytestmark = pytest.mark.usefixtures("global_switches")


def run(*options: object) -> Result:
    return CliRunner().invoke(main, [*map(str, options), "--device", "cpu", "--quick", "--batch", "2"])


def test_the_report_of_a_cpu_has_all_checks_and_timings(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "PROFILED_STEPS", 1)
    out = tmp_path / "gpu.json"
    result = run("--store", stores["jpeg"], "--ppm-store", stores["ppm"], "--out", out)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["failed"] == [] and report["machine"]["torch"] == torch.__version__
    assert all(check["ok"] for check in report["checks"]) and len(report["checks"]) == 5 + 5 + 2 + 4 + 1
    names = ["stream of jpeg", "stream of ppm"]
    names += [f"{precision}{rest}" for precision in ("fp32", "bf16") for rest in ("", " from jpeg", " from ppm")]
    assert [row["name"] for row in report["rates"]] == names
    assert {row["ours"] for row in report["rates"] if row["name"].startswith("bf16")} == {"bf16"}
    for entry in report["conclusions"].values():
        from_jpeg = entry["from_jpeg"]
        ratio = from_jpeg["images_per_s"] / entry["images_per_s"]
        assert from_jpeg["of_network_alone"] == pytest.approx(ratio, rel=0.02)
    assert [row["batch"] for row in report["batches"]] == [4, 4]
    for kinds in report["kernels"].values():
        assert {"convolution", "pooling", "update"} < set(kinds) and min(kinds.values()) >= 0
    for line in ("ok ", "rates, batch 2", "bf16 from ppm", "fp32  ms a step: ", "All 17 checks are ok."):
        assert line in result.output, line


def test_a_failed_check_gives_exit_code_1_and_the_other_checks_still_run(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_check(settings: GpuCheckSettings) -> Iterator[checks.Check]:
        raise RuntimeError("no kernel image\nis available")
        yield

    def passing_check(settings: GpuCheckSettings, *_: object) -> Iterator[checks.Check]:
        return iter([checks.Check("nothing", True, "0", "0")])

    parts = ("rates", "batches", "kernels", "memory_gib")
    for name in ("stream_checks", "network_checks", "repeat_checks"):
        monkeypatch.setattr(checks, name, passing_check)
    monkeypatch.setattr(checks, "lrn_checks", failing_check)
    monkeypatch.setattr("tools.gpu_check.run_timings", lambda settings: iter([(n, "not measured") for n in parts]))
    result = run("--store", stores["jpeg"], "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["failed"] == ["local response normalization"]
    assert [check["ok"] for check in report["checks"]] == [True, True, False, True]
    assert "FAILED  local response normalization: RuntimeError: no kernel image (wanted: no error)" in result.stderr


def test_without_a_gpu_the_error_names_the_trial_on_a_cpu(stores: dict[str, Path]) -> None:
    result = CliRunner().invoke(main, ["--store", str(stores["jpeg"])])
    assert result.exit_code == 1 and "sees no GPU" in result.stderr and "--device cpu --quick" in result.stderr


def test_a_ppm_store_of_jpeg_records_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="holds jpeg records, not ppm"):
        parse_settings(stores["jpeg"], stores["jpeg"], "cpu", None, 2, True)
