"""Options that several subcommands of `alexprep` share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.console import FiniteRange, json_option, usable_cores
from prep.files import no_lock_option
from prep.images.limits import MAX_PIXELS, TIME_LIMIT_S
from prep.store.manifest import BACKGROUNDS, DEFAULT_BACKGROUND, FILTERS, FORMATS, SPLITS

if TYPE_CHECKING:
    from prep.cluster_runner import ClusterRunner
    from prep.workers import WorkerPool

split_option = click.option(
    "--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Name of the split."
)
jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Number of worker processes.  [default: number of usable cores of this machine or of the cluster]",
)
cluster_option = click.option(
    "--cluster",
    metavar="auto|ADDRESS|local",
    help="Ray cluster that does the work. auto: the cluster to which this machine belongs. HOST:PORT: the cluster with "
    "this address. local: a new cluster of this machine alone.  [default: worker processes without Ray]",
)

allow_empty_option = click.option(
    "--allow-empty-classes",
    is_flag=True,
    help="Accept classes without a photograph; such classes keep their labels.  [default: the command ends with an "
    "error that names such classes]",
)

_RECORD_OPTIONS = (
    click.option(
        "--side",
        type=click.IntRange(32, 4096),
        default=256,
        show_default=True,
        help="Shorter side of the stored images, in pixels.",
    ),
    click.option("--keep-aspect", is_flag=True, help="Store the whole rescaled image instead of its central square."),
    click.option(
        "--format",
        type=click.Choice(FORMATS),
        default="jpeg",
        show_default=True,
        help="Format of the stored records.",
    ),
    click.option(
        "--quality",
        type=click.IntRange(1, 100),
        default=90,
        show_default=True,
        help="JPEG quality of the stored records; ignored for ppm.",
    ),
    click.option(
        "--filter",
        type=click.Choice(FILTERS),
        default="area",
        show_default=True,
        help="Rescaling filter; with area, images that are smaller than --side are enlarged by bicubic.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        default=0,
        show_default=True,
        help="Seed of the record order.",
    ),
    click.option(
        "--background",
        type=click.Choice(BACKGROUNDS),
        help="Colour behind transparent pixels.  "
        f"[default: {DEFAULT_BACKGROUND}; for an existing store, the colour of that store]",
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(1),
        default=MAX_PIXELS,
        show_default=True,
        metavar="N",
        help="Largest number of pixels of an input; an input with more pixels is bad. Decoding needs 3 to 8 bytes of "
        "memory for each pixel.",
    ),
    click.option(
        "--reduce-above",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        metavar="N",
        help="Decode JPEGs with more than N pixels at 1/2, 1/4 or 1/8 of their size. The shorter side keeps at "
        "least 2 × --side pixels. Decoding at reduced size limits the memory for large photographs and changes their "
        "pixels slightly. 0: never.",
    ),
    click.option(
        "--time-limit",
        type=FiniteRange(0, 1e9),
        default=TIME_LIMIT_S,
        show_default=True,
        metavar="SECONDS",
        help="Longest CPU time for decoding one input; an input that takes longer is bad. 0: no limit.",
    ),
    click.option(
        "--on-warning",
        type=click.Choice(["keep", "bad"]),
        default="keep",
        show_default=True,
        help="What to do with an input that is decoded, but with warnings (such as a truncated JPEG): keep it "
        "and list it, or treat it as a bad input.",
    ),
    click.option(
        "--on-bad",
        type=click.Choice(["fail", "skip"]),
        default="fail",
        show_default=True,
        help="What to do with an input that is not an image: stop (fail), or leave it out and list it (skip).",
    ),
    click.option(
        "--max-bad",
        type=click.IntRange(0),
        metavar="N",
        help="Largest number of bad inputs to leave out; with more bad inputs the build stops. Implies --on-bad skip.  "
        "[default: no limit]",
    ),
    click.option("--restart", is_flag=True, help="Discard an unfinished build of the split and start again."),
    no_lock_option,
    jobs_option,
    cluster_option,
    json_option,
)


def record_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the commands that build a split: record format, bad inputs, worker processes, --json."""
    for option in reversed(_RECORD_OPTIONS):
        command = option(command)
    return command


def make_runner(cluster: str | None, jobs: int | None, preload: str = "") -> WorkerPool | ClusterRunner:
    """Return the runner that --cluster and --jobs describe, for use in a `with` block.

    `preload` is described in WorkerPool.
    """
    if cluster is None:
        from prep.workers import WorkerPool

        return WorkerPool(jobs or usable_cores(), preload)
    from prep.cluster_runner import ClusterRunner

    return ClusterRunner(cluster, jobs, preload)


def path_for(cluster: str | None, path: Path) -> Path:
    """Return `path`, made absolute for a cluster, because a cluster's processes have other working directories."""
    return path if cluster is None else Path(os.path.abspath(path))
