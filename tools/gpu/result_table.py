"""The table of docs/measurements.md with rates on an H200, before and after kernels and stream were rewritten.

`before` was measured at commit 595f19d on one H200, on 2026-11-27. `after` comes from the report of tools.gpu_check. A
value that the report does not have is "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

from tools.gpu.machine import imagenet_hours

NOT_MEASURED = "not measured"
HEAD = ("| on one GPU, bfloat16, in images/s unless noted | before | after |", "| --- | --- | --- |")
_BATCHES = (128, 256, 512, 1024, 2048)
_IMAGES = 512
_KERNELS = ("layer 1", "layer 2", "conv3", "conv4", "conv5")

Report = Mapping[str, Any]


class TableRow(NamedTuple):
    """A row of the table."""

    name: str
    before: str
    after: Callable[[Report], str]


def result_table(report: Report) -> str:
    """Return the table as Markdown.

    `report` is the JSON report of tools.gpu_check, or the same report as Python objects.
    """
    plain: dict[str, Any] = _plain(report)
    rows = [f"| {row.name} | {row.before} | {row.after(plain) or NOT_MEASURED} |" for row in ROWS]
    return "\n".join((*HEAD, *rows))


def ratios(report: Report) -> dict[str, float]:
    """Return ratios of the rates in bf16, such as {"from jpeg / bf16": …, "run from jpeg / from jpeg": …}.

    A run is compared only with steps on batches of the same record format and size. Ratios of rates that the report
    does not have are left out.
    """
    plain = _plain(report)
    rates, runs = _rates(plain), _runs(plain)
    resident, found = rates.get("bf16"), {}
    for format in ("jpeg", "ppm"):
        fed, run = rates.get(f"bf16 from {format}"), runs.get((format, plain.get("batch")))
        if fed and resident:
            found[f"from {format} / bf16"] = round(fed / resident, 3)
        if fed and run:
            found[f"run from {format} / from {format}"] = round(run / fed, 3)
    return found


def _plain(data: Any) -> Any:
    """Return `data` with dicts instead of dataclasses, as in the JSON file."""
    if is_dataclass(data) and not isinstance(data, type):
        return asdict(data)
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, list | tuple) else data


def _part(report: Report, name: str) -> Any:
    """Return the result of a timing; empty if the timing did not run or failed."""
    result = report.get(name)
    return () if result is None or isinstance(result, str) else result


def _rates(report: Report) -> dict[str, float]:
    return {row["name"]: row["images_per_s"] for row in _part(report, "rates")}


def _steps(report: Report) -> dict[tuple[str, int], float]:
    """Return {(precision, batch): images/s of steps on one batch}."""
    rows = _part(report, "batches")
    rates = {(row["precision"], row["batch"]): row["images_per_s"] for row in rows if row["images_per_s"]}
    alone = {(name, report["batch"]): rate for name, rate in _rates(report).items() if name in ("fp32", "tf32", "bf16")}
    return {**rates, **alone}


def _runs(report: Report) -> dict[tuple[str, int], float]:
    """Return {(format, batch): images/s of `alextrain run`}."""
    rows = _part(report, "runs")
    return {(row["format"], row["batch"]): row["images_per_s"] for row in rows if "images_per_s" in row}


def _joined(values: Sequence[float | None]) -> str:
    """Return a text of the numbers, separated by semicolons. The text is empty if all numbers are missing."""
    if not any(values):
        return ""
    return "; ".join(f"{value:,.0f}" if value else NOT_MEASURED for value in values)


def _at_batch(report: Report, values: Sequence[float | None]) -> str:
    text = _joined(values)
    return text and f"{text} (batch {report['batch']})"


def _step_rates(report: Report) -> str:
    steps = _steps(report)
    return _joined([steps.get(("bf16", batch)) for batch in _BATCHES])


def _float32_rates(report: Report) -> str:
    steps = _steps(report)
    return _joined([steps.get((precision, 128)) for precision in ("fp32", "tf32")])


def _stream_rates(report: Report) -> str:
    rates = _rates(report)
    return _at_batch(report, [rates.get(f"stream of {format}") for format in ("jpeg", "ppm")])


def _fed(format: str) -> Callable[[Report], str]:
    def text(report: Report) -> str:
        rate, ratio = _rates(report).get(f"bf16 from {format}"), ratios(report).get(f"from {format} / bf16")
        return f"{rate:,.0f} ({ratio:.3g}; batch {report['batch']})" if rate and ratio else ""

    return text


def _run(format: str) -> Callable[[Report], str]:
    def text(report: Report) -> str:
        resident = _steps(report)
        parts = []
        for (of, batch), rate in _runs(report).items():
            if of == format:
                alone = resident.get(("bf16", batch))
                share = f"{rate / alone:.3g}; " if alone else ""
                parts.append(f"{rate:,.0f} ({share}batch {batch})")
        return "; ".join(parts)

    return text


def _run_of_fed(report: Report) -> str:
    found = ratios(report)
    values = [found.get(f"run from {format} / from {format}") for format in ("jpeg", "ppm")]
    return "; ".join(f"{value:.3g}" if value else NOT_MEASURED for value in values) if any(values) else ""


def _hours(report: Report) -> str:
    rates = _runs(report).values()
    return f"{imagenet_hours(max(rates)):.2g} hours" if rates else ""


def _epilogue(layer: str) -> Callable[[Report], str]:
    def text(report: Report) -> str:
        result = dict(_part(report, "epilogue_times"))
        times = {time["kernel"]: time for time in result.get("kernels", ())}
        found = [times.get(f"{layer}, {direction}") for direction in ("forward", "backward")]
        images = result.get("images", _IMAGES)
        other = f" for {images} images" if images != _IMAGES else ""
        return "; ".join(f"{time['ms']:.3g} ms ({time['share']:.2g}){other}" for time in found if time)

    return text


def _host_time(report: Report) -> str:
    host_us = report.get("host_us")
    return "" if host_us is None or isinstance(host_us, str) else f"{host_us:,.0f} µs"


def _copy_speed(report: Report) -> str:
    speed = dict(_part(report, "epilogue_times")).get("copy_tb_per_s")
    return f"{speed:.3g} TB/s" if speed else ""


def _check(beginning: str) -> Callable[[Report], str]:
    def text(report: Report) -> str:
        """Return the findings of the checks whose names begin with `beginning`.

        If some of these checks failed, return only the findings of the failed checks.
        """
        checks = [check for check in report.get("checks", ()) if check["name"].startswith(beginning)]
        failed = [check for check in checks if not check["ok"]]
        if failed:
            return "; ".join(f"FAILED: {check['found']}" for check in failed).replace("|", "/")
        return "; ".join(dict.fromkeys(check["found"] for check in checks)).replace("|", "/")

    return text


ROWS = (
    TableRow(
        "training step on a batch that stays on the GPU, batch 128; 256; 512; 1,024; 2,048",
        "16,000; 18,400; 21,000; 22,300; not measured",
        _step_rates,
    ),
    TableRow("the same training step in fp32; tf32, batch 128", "5,700; 14,500", _float32_rates),
    TableRow("stream alone, JPEG; PPM", "29,200; 31,400 (batch 128)", _stream_rates),
    TableRow("step fed by the stream, JPEG (÷ rate of the step alone)", "11,050 (0.69; batch 128)", _fed("jpeg")),
    TableRow("step fed by the stream, PPM (÷ rate of the step alone)", "11,600 (0.72; batch 128)", _fed("ppm")),
    TableRow("`alextrain run`, JPEG (÷ rate of the step alone)", "7,900 (0.49; batch 128)", _run("jpeg")),
    TableRow("`alextrain run`, PPM (÷ rate of the step alone)", "11,100 (0.60; batch 256)", _run("ppm")),
    TableRow("`alextrain run` ÷ step fed by the stream, JPEG; PPM", "0.71; not measured", _run_of_fed),
    TableRow("90 epochs of ImageNet by the fastest `alextrain run`", "2.9 hours", _hours),
    *(
        TableRow(
            f"kernels of {layer} for {_IMAGES} images, forward; backward (time ÷ memory floor)",
            "no such kernels",
            _epilogue(layer),
        )
        for layer in _KERNELS
    ),
    TableRow("time for which a step occupies the host", "not measured", _host_time),
    TableRow("copy within the GPU's memory", "4.25 TB/s", _copy_speed),
    TableRow("run with `--deterministic`, killed and resumed", "no such option", _check("run with --deterministic")),
)
