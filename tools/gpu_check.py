"""Check that stream and network compute the same results on a GPU as on the CPU, and measure their speed on the GPU.

    python -m tools.gpu_check --make-stores stores --out gpu.json --table table.md

Run the command from the root of a checkout, or with the checkout on PYTHONPATH. The project need not be installed.
Triton needs a C compiler. Without a compiler, the network uses PyTorch's operators. The printed line `triton` then
gives the reason for not using Triton. The checks and timings are called parts. All parts together should take less than
five minutes on an H200 with 16 CPU cores. --help lists the parts with their planned times, and --only chooses parts. At
the end, the program names the parts that took longer than planned.

--make-stores FOLDER makes a store of 24,000 JPEG records and a store of 24,000 PPM records. Stores that FOLDER already
has are not made again. Without --make-stores, --store and --ppm-store name the stores. A store of 3,200 records is
enough for every part except `runs`, because the stream starts a new epoch when an epoch ends. In `runs` each epoch ends
with a checkpoint, so an epoch should have at least 20 steps.

Each check prints ok or FAILED, the measured value and the limit. The checks:

-   Batches of the stream on the GPU are compared with batches on the CPU, from the same records and random parameters.
    The batches are in NCHW and NHWC, with each kind of mean (channel, image, aligned). A larger difference is allowed
    for JPEG records, because nvJPEG and libjpeg-turbo upsample chroma differently. For PPM records, only differences
    by the rounding of float32 are allowed.
-   Windows that the GPU resizes (RandomResizedCrop) are compared with windows that the CPU resizes. The windows are
    compared with and without jitter, grey, blur and erase. For PPM records, the bits must be equal. For JPEG records,
    larger differences are allowed, because DALI resizes with other weights.
-   The batches of a resumed stream on the GPU must be equal, bit for bit, to those of an uninterrupted stream.
-   Logits and gradients of the network in each precision are compared with logits and gradients in float64 on the CPU.
    The network runs on one GPU, and on two GPUs if there are two.
-   The implementation of local response normalization for this device is compared with torch's layer in float64.
-   The kernels between the convolutions are compared with operators in float64, for 512 images in float32 and bfloat16
    (tools/gpu/epilogues.py).
-   Three training steps are run twice with the same seed, and the velocities after the steps are compared.
-   The checkpoints of two runs of `alextrain run --deterministic` must be equal, bit for bit. One run is killed with
    SIGKILL and resumed. The other run is not interrupted.
-   A training step must never make the host wait for the GPU.

Several contestants are timed: the stream, the decoder, and kinds of training steps. Each rate is the median of several
turns. A turn is one timed run of 0.6 seconds. The devices are idle before and after each turn. In each round, every
contestant has one turn. The first round is not counted (tools/bench/harness.py). The contestants are:

    stream of jpeg       the stream alone; its batches are discarded
    decoder of jpeg      DALI's decoder alone, with records in memory
    fp32, tf32, bf16     training steps on one batch that stays on the GPU
    bf16 from jpeg       steps on batches of the stream. The column `of ours` is this rate divided by the rate of bf16.
                         The goal is at least 0.95 of the rate of bf16 or of the decoder, whichever is smaller
    bf16 from ppm        the same with PPM records. The goal is at least 0.98 of the rate of bf16
    bf16, one GPU        the same step as bf16, with both columns on the first GPU; measured if there are two GPUs

The rate of `alextrain run` comes from its metrics.jsonl (tools/gpu/runs.py), without the time of checkpoints and
validations. The goal is 0.95 or more of the rate of steps on batches of the stream.

The time of each kernel between the convolutions is compared with the time of a copy that reads and writes the same
number of bytes (tools/gpu/epilogue_times.py). The goal is at most twice the time of the copy.

With --cudnn-benchmark, cuDNN tries its algorithms for each new shape of tensors and then uses the fastest algorithm.
To measure the effect, run the tool once with and once without this option.

The tool also measures steps on batches of sizes other than --batch, the time that a step spends in each kind of kernel
(torch.profiler), and the memory of a step's tensors. The tool measures the time for which a step occupies the host
(goal: at most 200 µs). The tool also compares a step that is launched kernel by kernel with a step that is replayed
from a CUDA graph, as in `alextrain run`. All other rates of steps are measured with the step of `alextrain run`, which
also updates the counters of the metrics.

The share of the peak rate counts two operations for each multiply-add. A step has three times the multiply-adds of a
forward pass, except that the gradient of the image is not computed. The peak rate is the rate for dense matrix products
in bfloat16 on the data sheet of the GPU. The hours are the time of 90 epochs of 1,281,167 images. The goal is less than
2 hours.

The tool prints the table of docs/measurements.md with the measured values in the column `after`. --table also writes
this table to a file. The exit code is 0 if every check is ok, and 1 if a check failed or there is no GPU. `--device cpu
--quick` runs the same code without a GPU, to try the tool. Each convolutional layer then has only eight maps. The rates
of this trial have no meaning.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from prep.console import UserError, print_json, say, store_option
from prep.files import write_atomic
from prep.store.manifest import Store
from tools.bench.harness import BenchmarkCommand, Row, table
from tools.gpu.epilogue_times import kernel_lines
from tools.gpu.machine import describe_machine
from tools.gpu.parts import PART_NAMES, Times, parts_text, run_checks, run_timings
from tools.gpu.result_table import ratios, result_table
from tools.gpu.settings import Check, GpuCheckSettings
from tools.gpu.stores import make_stores
from tools.gpu.timings import summarize_rates
from train.config.devices import parse_devices


def parse_settings(
    store: Path, ppm_store: Path | None, device: str, gpus: str | None, batch: int, quick: bool
) -> GpuCheckSettings:
    """Return the settings for these options. Raises UserError if no GPU is available or a store is unsuitable."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} sees no GPU on this machine. Run the tool on a machine with a GPU, "
            "or try the tool on a CPU with --device cpu --quick."
        )
    devices = parse_devices("cpu" if device == "cpu" else gpus)
    records = Store.open(store).split("train").records
    if ppm_store is not None:
        format = Store.open(ppm_store).settings.format
        if format != "ppm":
            raise UserError(
                f"--ppm-store {ppm_store} holds {format} records, not ppm. Build the store with --format ppm."
            )
    return GpuCheckSettings(store, ppm_store, devices, min(batch, records), quick)


@click.command(cls=BenchmarkCommand, epilog="\b\n" + parts_text())
@store_option
@click.option(
    "--ppm-store",
    type=click.Path(path_type=Path),
    help="Second store, of PPM records, which is also checked and measured.  [default: none]",
)
@click.option(
    "--make-stores",
    "stores_folder",
    type=click.Path(path_type=Path),
    help="Folder with two stores of synthetic photographs, which are used instead of --store and --ppm-store. Stores "
    "that the folder does not have are made.  [default: none]",
)
@click.option(
    "--only",
    type=click.Choice(PART_NAMES),
    multiple=True,
    help="Part to run. Repeat the option for several parts.  [default: all]",
)
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    show_default=True,
    help="Kind of device to check. `cpu` is for trying the tool without a GPU.",
)
@click.option(
    "--gpus",
    metavar="0|0,1",
    help="GPUs of the two columns of the network.  [default: 0,1 if there are two GPUs, else 0]",
)
@click.option("--batch", type=click.IntRange(1), default=512, show_default=True, help="Number of images in a step.")
@click.option("--quick", is_flag=True, help="Use fewer images, and measure for a shorter time.")
@click.option("--cudnn-benchmark", is_flag=True, help="Let cuDNN search for its fastest algorithms.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output instead of tables.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File for the JSON object, rewritten after each check and timing.  [default: none]",
)
@click.option(
    "--table",
    "table_file",
    type=click.Path(path_type=Path),
    help="File for the Markdown table of docs/measurements.md.  [default: none]",
)
def main(
    store: Path,
    ppm_store: Path | None,
    stores_folder: Path | None,
    only: tuple[str, ...],
    device: str,
    gpus: str | None,
    batch: int,
    quick: bool,
    cudnn_benchmark: bool,
    as_json: bool,
    out: Path | None,
    table_file: Path | None,
) -> None:
    """Check the stream and the training step on a GPU, and measure their speed, in under five minutes.

    \b
    Example:
      python -m tools.gpu_check --make-stores stores --out gpu.json --table table.md
      python -m tools.gpu_check --store store --only epilogues --only epilogue_times
      python -m tools.gpu_check --store store --device cpu --quick
    """
    parts, times = only or PART_NAMES, Times({})
    if stores_folder is not None:
        started = time.perf_counter()
        store, ppm_store = make_stores(stores_folder).values()
        times.seconds["stores"] = round(time.perf_counter() - started, 1)
    settings = parse_settings(store, ppm_store, device, gpus, batch, quick)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    report: dict[str, Any] = {
        "machine": describe_machine(settings.devices),
        "batch": settings.batch,
        "quick": quick,
        "cudnn_benchmark": cudnn_benchmark,
        "seconds": times.seconds,
        "checks": [],
    }

    def save_report() -> None:
        if out is not None:
            write_atomic(out, json.dumps(report, indent=1, default=asdict).encode())

    print_machine(report["machine"])
    for check in run_checks(settings, parts, times):
        click.echo(check_line(check), err=as_json)
        report["checks"].append(check)
        save_report()
    for name, result in run_timings(settings, parts, times):
        say(f"{name}: {result if isinstance(result, str) else 'measured'}")
        report[name] = result
        if name == "rates" and not isinstance(result, str):
            report["conclusions"] = summarize_rates(settings, result)
        save_report()
    failed = [check.name for check in report["checks"] if not check.ok]
    report["failed"], report["ratios"] = failed, ratios(report)
    save_report()
    if table_file is not None:
        write_atomic(table_file, f"{result_table(report)}\n".encode())
    if as_json:
        print_json(json.loads(json.dumps(report, default=asdict)))
    else:
        print_report(report)
    for line in times.over_budget() if settings.on_gpu else ():
        say(line)
    if failed:
        say(f"{len(failed)} of {len(report['checks'])} checks FAILED: {'; '.join(failed)}")
        raise SystemExit(1)
    say(f"All {len(report['checks'])} checks are ok.")


def check_line(check: Check) -> str:
    """Return the line of a check, such as `ok      name: found (wanted: …)`."""
    return f"{'ok' if check.ok else 'FAILED':7} {check.name}: {check.found} (wanted: {check.wanted})"


def print_machine(facts: dict[str, Any]) -> None:
    """Print the facts about the machine to standard error, one line for each fact."""
    for name, value in facts.items():
        say(f"{name:14} {', '.join(value) if isinstance(value, list) else value}")


def print_report(report: dict[str, Any]) -> None:
    """Print the tables to standard output. For a failed timing, the error message is printed instead of the table."""
    for name in ("rates", "graph"):
        rows: Sequence[Row] | str | None = report.get(name)
        if rows is not None:
            click.echo(f"\n{name}, batch {report['batch']}")
            click.echo(rows if isinstance(rows, str) else table(rows))
    for precision, summary in report.get("conclusions", {}).items():
        figures = {name: value for name, value in summary.items() if not isinstance(value, dict)}
        click.echo(f"\n{precision:5} " + ", ".join(f"{name} {value:,}" for name, value in figures.items()))
        for name, value in summary.items():
            if isinstance(value, dict):
                click.echo(f"      {name}: " + ", ".join(f"{key} {number}" for key, number in value.items()))
    print_rows(report)
    if report.get("ratios"):
        click.echo("ratios: " + ", ".join(f"{name} {ratio}" for name, ratio in report["ratios"].items()))
    click.echo(f"\n{result_table(report)}\n")


def print_rows(report: dict[str, Any]) -> None:
    """Print the results of the timings that have no ratios, one line for each row."""
    for name in ("batches", "epilogue_times", "kernels", "memory_gib", "host_us", "runs"):
        result = report.get(name)
        if isinstance(result, str):
            click.echo(f"{name}: {result}")
        elif result is not None:
            click.echo("")
            for line in _ROW_LINES[name](result):
                click.echo(line)


def batch_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each batch size of each precision."""
    lines = []
    for row in rows:
        rate = "out of memory" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f} images/s"
        lines.append(f"{row['precision']:5} batch {row['batch']:5,}: {rate}")
    return lines


def kind_lines(kinds_by_precision: dict[str, dict[str, float]]) -> list[str]:
    """Return a line for each precision: the time that a step spends in each kind of kernel."""
    return [
        f"{precision:5} ms a step: " + ", ".join(f"{kind} {ms:.2f}" for kind, ms in kinds.items())
        for precision, kinds in kinds_by_precision.items()
    ]


def run_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each run of `alextrain run`."""
    lines = []
    for row in rows:
        name = f"alextrain run, {row['format']}, {row['precision']}, batch {row['batch']:,}"
        lines.append(
            f"{name}: {row['error']}"
            if "error" in row
            else f"{name}: {row['images_per_s']:,.0f} images/s ({row['least']:,.0f} .. {row['most']:,.0f}, "
            f"{row['intervals']} intervals), waiting for the stream {100 * row['waiting_share']:.1f} %, "
            f"checkpoints and validations {row['outside_s']:.1f} s"
        )
    return lines


def memory_lines(memory_gib: dict[str, Any]) -> list[str]:
    """Return one line with the peak memory of each precision."""
    return [f"peak memory of the tensors of a step, GiB: {json.dumps(memory_gib)}"]


_ROW_LINES: dict[str, Callable[[Any], list[str]]] = {
    "batches": batch_lines,
    "epilogue_times": kernel_lines,
    "kernels": kind_lines,
    "memory_gib": memory_lines,
    "host_us": lambda host_us: [f"host time of a step: {host_us:,.0f} µs (goal: at most 200)"],
    "runs": run_lines,
}


if __name__ == "__main__":
    main()
