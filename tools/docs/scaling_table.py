"""Write the computed tables of docs/guides/many-gpus.md: the time of the gradient exchange, and the speed to expect.

    python -m tools.docs.scaling_table           # tests/tools/test_scaling_table.py fails if the page is not up to date

The computed time of a step is the time that one GPU needs for its part of the batch, plus the time of the exchange. The
exchange begins after the backward pass. In a ring all-reduce of S bytes over n GPUs, each GPU sends 2 (n − 1) / n · S
bytes at the rate of the slowest link. The time that one GPU needs is interpolated between measured times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np

from train.config.architecture import ALEXNET
from train.config.recipes import RELEASED
from train.model.summary import summarize

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "many-gpus.md"
BEGIN, END = "<!-- computed by `python -m tools.docs.scaling_table` -->", "<!-- end of the computed tables -->"

# {batch: images/s} of a training step on one H200 in bfloat16, measured with version 0.1.0 (docs/measurements.md).
MEASURED_RATES = {128: 16_000, 256: 18_400, 512: 21_000, 1024: 22_300}
# {link: bytes/s in one direction}. The rates are nominal: the overhead of the protocol is not subtracted.
LINKS: Mapping[str, float] = {
    "NVLink 4 (450 GB/s)": 450e9,  # 900 GB/s in both directions together
    "PCIe 5 x16 (63 GB/s)": 63e9,
    "100 GbE (12.5 GB/s)": 12.5e9,
    "10 GbE (1.25 GB/s)": 1.25e9,
}
GPUS = (2, 4, 8, 32)
BATCHES = (128, 256, 512, 1024, 2048, 4096, 8192)
# Columns of the second table: heading, number of GPUs, slowest link.
SYSTEMS = (
    ("8 GPUs, NVLink 4", 8, "NVLink 4 (450 GB/s)"),
    ("8 GPUs, PCIe 5", 8, "PCIe 5 x16 (63 GB/s)"),
    ("4 × 8 GPUs, 100 GbE", 32, "100 GbE (12.5 GB/s)"),
    ("4 × 8 GPUs, 10 GbE", 32, "10 GbE (1.25 GB/s)"),
)


def gradient_bytes() -> int:
    """Return the size of AlexNet's gradients for 1,000 classes, in float32."""
    return 4 * sum(row.parameters for row in summarize(1000, ALEXNET, RELEASED))


def exchange_s(size_bytes: int, gpus: int, bytes_per_s: float) -> float:
    """Return the time in s of a ring all-reduce."""
    return 2 * (gpus - 1) / gpus * size_bytes / bytes_per_s


def step_s(images: float) -> float:
    """Return the time in s of a training step with `images` images on one GPU.

    Straight lines connect the measured times. Below the smallest measured batch, the first line is extended. Above the
    largest measured batch, the rate in images/s stays the same.
    """
    batches = np.array(list(MEASURED_RATES), dtype=float)
    if images > batches[-1]:
        return float(images / MEASURED_RATES[int(batches[-1])])
    times = batches / np.array(list(MEASURED_RATES.values()))
    pair = int(np.clip(np.searchsorted(batches, images) - 1, 0, len(batches) - 2))
    slope = (times[pair + 1] - times[pair]) / (batches[pair + 1] - batches[pair])
    return float(times[pair] + slope * (images - batches[pair]))


def speed(batch: int, gpus: int, bytes_per_s: float) -> float:
    """Return the images/s of a group of GPUs that compute a batch together."""
    return batch / (step_s(batch / gpus) + exchange_s(gradient_bytes(), gpus, bytes_per_s))


def tables() -> str:
    """Return the computed tables of docs/guides/many-gpus.md, as Markdown."""
    size_bytes = gradient_bytes()
    exchange = [["link", *(f"{gpus} GPUs" for gpus in GPUS)]]
    for link, rate in LINKS.items():
        exchange.append([link, *(f"{1e3 * exchange_s(size_bytes, gpus, rate):.3g} ms" for gpus in GPUS)])
    speeds = [["`--batch`", "1 GPU", *(heading for heading, _, _ in SYSTEMS)]]
    for batch in BATCHES:
        alone = batch / step_s(batch)
        cells = []
        for _, gpus, link in SYSTEMS:
            together = speed(batch, gpus, LINKS[link])
            cells.append(f"{_thousands(together)} ({together / alone:.2g}×)")
        speeds.append([f"{batch:,}", _thousands(alone), *cells])
    return f"""\
Computed, not measured: the time in which the {size_bytes / 1e6:.0f} MB of a step's gradients are exchanged.

{_markdown(exchange)}

Computed, not measured: images per second, and in brackets the ratio to the rate of one GPU with the same batch.

{_markdown(speeds)}
"""


def _thousands(rate: float) -> str:
    return f"{round(rate, -2):,.0f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join(['---'] * len(rows[0]))} |", *lines[1:]])


def page(text: str) -> str:
    """Return the text of the page with newly computed tables."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


@click.command()
def main() -> None:
    """Write the computed tables into docs/guides/many-gpus.md."""
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
