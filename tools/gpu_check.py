"""The first thing to run on a machine with a GPU: is all of it right there, and how fast is it?

    python -m tools.gpu_check --store STORE --ppm-store PPM_STORE --out gpu.json

A checkout is enough, with PYTHONPATH or from its root: nothing of ours need be installed. Triton calls a C compiler;
where it finds none the table of the machine says so, and the normalization is PyTorch's operators.
A store of 3,200 records suffices: its epochs follow each other. Without --quick it takes under 6 minutes on one GPU.

Checks, each ok or FAILED with what was found and what was wanted:

-   the stream on the GPU against the CPU, same records, same draws: JPEG within what two decoders differ by (nvJPEG's
    chroma is not libjpeg-turbo's), PPM within float32 rounding; NCHW and NHWC; mean of the channel, of the image,
    aligned; a state continued on the GPU, to the bit;
-   the network's logits and gradients in each precision against float64 on the CPU; on two GPUs too, where there are;
-   local response normalization, whatever form of it this device gets, against torch's own in float64;
-   three steps twice from one seed; that a step makes the host wait for nothing.

Rates, as medians over turns: all contestants take turns of about a second, the devices idle before and after each, the
first time through not counted:

    stream of jpeg       batches that nobody uses
    fp32, tf32, bf16     training steps on one batch that lies on the GPU
    bf16 from jpeg       training steps on what the stream serves; `of ours` is its share of bf16, goal 0.98
    bf16, one GPU        where two are given: the same step with both columns on the first

--cudnn-benchmark lets cuDNN try its algorithms for each shape and keep the fastest; what it kept holds for the process,
so two runs are compared, one with it and one without.

Then the network at larger batches, the time of a step by kind of kernel (torch.profiler), the memory of its tensors,
and the step recorded in a CUDA graph. The share of the peak counts two operations for each multiply-add, three times a
forward's but for the gradient of the image, which nobody wants, against the data sheet's dense bfloat16 rate. The hours
are those of 90 epochs of 1,281,167 images, goal under 2.

Exit code 0: every check is ok; 1: one is not, or there is no GPU. `--device cpu --quick` runs the same code end to end
without a GPU, with eight maps a layer: it tries the tool, and its rates mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from prep.console import UserError, print_json, say, store_option
from prep.files import write_atomic
from prep.store.manifest import Store
from tools.gpu.checks import Check, all_checks
from tools.gpu.machine import Plan, machine
from tools.gpu.timings import conclusions, timings
from tools.bench.harness import BenchmarkCommand, Row, table
from train.config.devices import parse_devices


def planned(store: Path, ppm_store: Path | None, device: str, gpus: str | None, batch: int, quick: bool) -> Plan:
    """The plan; raises UserError where there is no GPU, and what Store.open raises."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} sees no GPU on this machine. Run this where there is one; "
            "--device cpu --quick tries the tool itself."
        )
    devices = parse_devices("cpu" if device == "cpu" else gpus)
    records = Store.open(store).split("train").records
    if ppm_store is not None and Store.open(ppm_store).settings.format != "ppm":
        raise UserError(f"--ppm-store {ppm_store}: its records are not ppm. Build it with --format ppm.")
    return Plan(store, ppm_store, devices, min(batch, records), quick)


@click.command(cls=BenchmarkCommand)
@store_option
@click.option("--ppm-store", type=click.Path(path_type=Path), help="A store of PPM records, checked and timed too.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--gpus", metavar="0|0,1", help="GPUs of the two columns.  [default: 0,1 where there are two, else 0]")
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images in a step.")
@click.option("--quick", is_flag=True, help="Fewer images and turns: under a minute.")
@click.option("--cudnn-benchmark", "search", is_flag=True, help="Let cuDNN search for its fastest algorithms.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output in place of the tables.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON object into this file too, part by part.")
def main(
    store: Path,
    ppm_store: Path | None,
    device: str,
    gpus: str | None,
    batch: int,
    quick: bool,
    search: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    """Check and measure everything that needs a GPU.

    \b
    Example:
      python -m tools.gpu_check --store store --out gpu.json
      python -m tools.gpu_check --store store --device cpu --quick
    """
    plan = planned(store, ppm_store, device, gpus, batch, quick)
    torch.backends.cudnn.benchmark = search
    report: dict[str, Any] = {
        "machine": machine(plan.devices),
        "batch": plan.batch,
        "quick": quick,
        "cudnn_benchmark": search,
        "checks": [],
    }

    def keep() -> None:
        if out is not None:
            write_atomic(out, json.dumps(report, indent=1, default=asdict).encode())

    show_machine(report["machine"])
    for check in all_checks(plan):
        click.echo(check_line(check), err=as_json)
        report["checks"].append(check)
        keep()
    for name, found in timings(plan):
        say(f"{name}: {found if isinstance(found, str) else 'measured'}")
        report[name] = found
        if name == "rates" and not isinstance(found, str):
            report["conclusions"] = conclusions(plan, found)
        keep()
    failed = [check.name for check in report["checks"] if not check.ok]
    report["failed"] = failed
    keep()
    if as_json:
        print_json(json.loads(json.dumps(report, default=asdict)))
    else:
        show_report(report)
    if failed:
        say(f"{len(failed)} of {len(report['checks'])} checks FAILED: {'; '.join(failed)}")
        raise SystemExit(1)
    say(f"All {len(report['checks'])} checks are ok.")


def check_line(check: Check) -> str:
    """`ok      name: found (wanted: …)`."""
    return f"{'ok' if check.ok else 'FAILED':7} {check.name}: {check.found} (wanted: {check.wanted})"


def show_machine(told: dict[str, Any]) -> None:
    """The environment, a line each."""
    for name, value in told.items():
        say(f"{name:14} {', '.join(value) if isinstance(value, list) else value}")


def show_report(report: dict[str, Any]) -> None:
    """The tables, on standard output."""
    for name in ("rates", "graph"):
        rows: Sequence[Row] | str | None = report.get(name)
        if rows is not None:
            click.echo(f"\n{name}, batch {report['batch']}")
            click.echo(rows if isinstance(rows, str) else table(rows))
    for precision, told in report.get("conclusions", {}).items():
        rest = {name: value for name, value in told.items() if not isinstance(value, dict)}
        click.echo(f"\n{precision:5} " + ", ".join(f"{name} {value:,}" for name, value in rest.items()))
        for name, value in told.items():
            if isinstance(value, dict):
                click.echo(f"      {name}: " + ", ".join(f"{key} {number}" for key, number in value.items()))
    click.echo("")
    if isinstance(report["batches"], str):
        click.echo(report["batches"])
    else:
        for row in report["batches"]:
            rate = "out of memory" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f} images/s"
            click.echo(f"{row['precision']:5} batch {row['batch']:5,}: {rate}")
    kernels = report["kernels"]
    for precision, kinds in {} if isinstance(kernels, str) else kernels.items():
        click.echo(f"{precision:5} ms a step: " + ", ".join(f"{kind} {ms:.2f}" for kind, ms in kinds.items()))
    if isinstance(kernels, str):
        click.echo(kernels)
    click.echo(f"tensors of a step at most, GiB: {json.dumps(report['memory_gib'])}")


if __name__ == "__main__":
    main()
