"""Tests of complete runs of tools.gpu_check on a CPU: report, exit code and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import tools.gpu.parts as parts
import tools.gpu.timings as timings
from prep.console import UserError
from tools.gpu.parts import PART_NAMES
from tools.gpu.result_table import HEAD
from tools.gpu.settings import Check, GpuCheckSettings
from tools.gpu_check import main, parse_settings

pytestmark = pytest.mark.usefixtures("global_switches")


def run(*options: object) -> Result:
    return CliRunner().invoke(main, [*map(str, options), "--device", "cpu", "--quick", "--batch", "2"])


def test_the_report_of_a_cpu_has_all_checks_and_timings(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "PROFILED_STEPS", 1)
    out, table = tmp_path / "gpu.json", tmp_path / "table.md"
    chosen = [option for name in PART_NAMES if name not in ("resume", "runs") for option in ("--only", name)]
    files = ["--store", stores["jpeg"], "--ppm-store", stores["ppm"], "--out", out, "--table", table]
    result = run(*files, *chosen)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["failed"] == [] and report["machine"]["torch"] == torch.__version__
    assert all(check["ok"] for check in report["checks"]) and len(report["checks"]) == 5 + 5 + 4 + 4 + 2 + 4 + 10 + 1
    names = ["stream of jpeg", "stream of ppm", "fp32", "bf16", "bf16 from jpeg", "bf16 from ppm"]
    assert [row["name"] for row in report["rates"] if row["name"] != "decoder of jpeg"] == names
    assert {row["ours"] for row in report["rates"] if row["name"].startswith("bf16")} == {"bf16"}
    entry = report["conclusions"]["bf16"]
    from_jpeg = entry["from_jpeg"]
    ratio = from_jpeg["images_per_s"] / entry["images_per_s"]
    assert from_jpeg["of_network_alone"] == pytest.approx(ratio, rel=0.02)
    assert report["ratios"]["from jpeg / bf16"] == pytest.approx(ratio, rel=0.02)
    assert [row["batch"] for row in report["batches"]] == [4, 4]
    for kinds in report["kernels"].values():
        assert {"convolution", "pooling", "update"} < set(kinds) and min(kinds.values()) >= 0
    assert list(report["seconds"]) == [name for name in PART_NAMES if name not in ("resume", "runs", "graph")]
    for line in ("ok ", "rates, batch 2", "bf16 from ppm", "fp32  ms a step: ", "All 35 checks are ok."):
        assert line in result.output, line
    assert table.read_text() in result.output and table.read_text().startswith(HEAD[0])


def test_a_failed_check_gives_exit_code_1_and_the_other_checks_still_run(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_check(settings: GpuCheckSettings) -> Iterator[Check]:
        raise RuntimeError("no kernel image\nis available")
        yield

    def passing_check(settings: GpuCheckSettings, *_: object) -> Iterator[Check]:
        return iter([Check("nothing", True, "0", "0")])

    timings = ("rates", "batches", "kernels", "memory_gib", "runs")
    for name in (
        "stream_checks",
        "window_checks",
        "network_checks",
        "epilogue_checks",
        "repeat_checks",
        "resume_checks",
    ):
        monkeypatch.setattr(parts, name, passing_check)
    monkeypatch.setattr(parts, "lrn_checks", failing_check)
    monkeypatch.setattr("tools.gpu_check.run_timings", lambda *_: iter([(name, "not measured") for name in timings]))
    result = run("--store", stores["jpeg"], "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["failed"] == ["local response normalization"]
    assert [check["ok"] for check in report["checks"]] == [True, True, True, False, True, True, True]
    assert "FAILED  local response normalization: RuntimeError: no kernel image (wanted: no error)" in result.stderr


def test_without_a_gpu_the_error_names_the_trial_on_a_cpu(stores: dict[str, Path]) -> None:
    result = CliRunner().invoke(main, ["--store", str(stores["jpeg"])])
    assert result.exit_code == 1 and "sees no GPU" in result.stderr and "--device cpu --quick" in result.stderr


def test_a_ppm_store_of_jpeg_records_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="holds jpeg records, not ppm"):
        parse_settings(stores["jpeg"], stores["jpeg"], "cpu", None, 2, True)
