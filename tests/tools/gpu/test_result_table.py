"""Tests of the table that the GPU check prints for docs/measurements.md, and of the ratios in its report."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from tests.helpers.project import ROOT
from tools.bench.harness import Row
from tools.gpu.epilogue_times import KernelTime
from tools.gpu.result_table import HEAD, ROWS, ratios, result_table
from tools.gpu.settings import Check


def rate(name: str, images_per_s: float) -> Row:
    return Row(name, images_per_s, images_per_s, images_per_s, "bf16", 1.0, None)


REPORT = {
    "batch": 512,
    "rates": [
        *(rate("bf16", 50_000.0), rate("fp32", 9_000.0), rate("stream of jpeg", 38_000.0)),
        *(rate("stream of ppm", 70_000.0), rate("bf16 from jpeg", 37_000.0), rate("bf16 from ppm", 49_500.0)),
    ],
    "batches": [
        {"precision": "fp32", "batch": 128, "images_per_s": 8_000.4},
        {"precision": "bf16", "batch": 128, "images_per_s": 40_000.0},
        {"precision": "bf16", "batch": 1024, "images_per_s": 52_000.0},
        {"precision": "bf16", "batch": 2048, "images_per_s": None},
    ],
    "epilogue_times": {
        "images": 512,
        "copy_tb_per_s": 4.251,
        "kernels": [
            KernelTime("layer 1, forward", 0.21, 0.4, 0.1, 2.1),
            KernelTime("layer 1, backward", 0.3, 0.8, 0.2, 1.5),
        ],
    },
    "host_us": 150.6,
    "runs": [
        {"format": "jpeg", "batch": 512, "images_per_s": 36_000.0},
        {"format": "ppm", "batch": 512, "images_per_s": 48_000.0},
        {"format": "ppm", "batch": 1024, "error": "out of memory"},
    ],
    "checks": [
        Check("run with --deterministic killed and resumed on cuda:0", True, "all 32 are bit-identical", "…"),
        Check("network", False, "a | b", "…"),
    ],
}


def after(report: dict[str, object]) -> list[str]:
    return [line.split(" | ")[2].removesuffix(" |") for line in result_table(report).splitlines()[2:]]


def test_the_column_after_has_the_values_of_the_report() -> None:
    assert after(REPORT) == [
        "40,000; not measured; 50,000; 52,000; not measured",
        "8,000; not measured",
        "38,000; 70,000 (batch 512)",
        "37,000 (0.74; batch 512)",
        "49,500 (0.99; batch 512)",
        "36,000 (0.72; batch 512)",
        "48,000 (0.96; batch 512)",
        "0.973; 0.97",
        "0.67 hours",
        "0.21 ms (2.1); 0.3 ms (1.5)",
        *["not measured"] * 4,
        "151 µs",
        "4.25 TB/s",
        "all 32 are bit-identical",
    ]


def test_the_table_of_the_json_file_is_the_same() -> None:
    assert result_table(json.loads(json.dumps(REPORT, default=asdict))) == result_table(REPORT)


@pytest.mark.parametrize("report", [{}, {"batch": 128, "rates": "not measured: RuntimeError", "runs": "not measured"}])
def test_a_report_without_results_gives_a_table_of_values_that_were_not_measured(report: dict[str, object]) -> None:
    assert set(after(report)) == {"not measured"} and ratios(report) == {}


def test_a_failed_check_and_other_numbers_of_images_are_named() -> None:
    failed = Check("run with --deterministic killed and resumed on cuda:0", False, "2 of 32 differ | x", "…")
    report = {"checks": [failed], "epilogue_times": {**REPORT["epilogue_times"], "images": 64}}  # type: ignore[dict-item]
    assert after(report)[-1] == "FAILED: 2 of 32 differ / x"
    assert after(report)[9] == "0.21 ms (2.1) for 64 images; 0.3 ms (1.5) for 64 images"


def test_ratios_compare_rates_of_the_same_batch_and_format() -> None:
    assert ratios(REPORT) == {
        "from jpeg / bf16": 0.74,
        "run from jpeg / from jpeg": 0.973,
        "from ppm / bf16": 0.99,
        "run from ppm / from ppm": 0.97,
    }
    assert "run from ppm / from ppm" not in ratios({**REPORT, "runs": [{**REPORT["runs"][1], "batch": 1024}]})  # type: ignore[index]


def test_the_documentation_has_the_table_with_the_same_column_before() -> None:
    lines = (ROOT / "docs/measurements.md").read_text().splitlines()
    first = lines.index(HEAD[0])
    for line, row in zip(lines[first + 2 :], ROWS, strict=False):
        assert line.startswith(f"| {row.name} | {row.before} | "), row.name
