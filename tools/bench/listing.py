"""Benchmark of listing the inputs: time and memory of each step that a build makes before it decodes an image.

The names of the inputs are generated as CLASS/CLASS_NUMBER.JPEG. The names are as long as ImageNet's names, and there
are 21,841 classes as in ImageNet-21k. The program runs these steps of prep/build/split.py in one process, in this
order:

    add          call Listing.add for each input, as list_folder and list_archive do
    plan         make a BuildPlan: shard boundaries and digest of the inputs
    permutation  compute the record order: sort the keyed hashes of all paths
    tasks        pickle the tasks of 100 shards one after another, as for worker processes
    save, load   write and read the file inputs.npz, which a resumed build compares with its own list
    compare      compare the loaded list with the list in memory

`peak MB` is the largest resident memory of the process so far (VmHWM in /proc/self/status). With --tree N, the program
also creates N empty files in class folders, and lists them with list_folder. The operating system has the new files in
its caches, so listing files on a network file system takes longer than this measurement shows.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from prep.console import bytes_text, print_json, say
from tools.bench.harness import BenchmarkCommand

CLASSES = 21_841
_PER_FOLDER = 650  # number of files in a class folder of --tree; the average for classes of ImageNet-21k
T = TypeVar("T")


def peak_mb() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


class Steps:
    """Wall time and CPU time of the steps in seconds, and the peak memory after each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float | str]] = []

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Run `work` as the step `name`, and return its result."""
        started, cpu_started = time.perf_counter(), time.process_time()
        result = work()
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        row = {"seconds": round(seconds, 2), "cpu_s": round(cpu_s, 2), "peak_mb": round(peak_mb(), 1)}
        self.rows.append({"step": name, **row})
        say(f"{name}: {seconds:.1f} s, peak {row['peak_mb']:,.0f} MB")
        return result


def measure(inputs: int, work_dir: Path, steps: Steps) -> dict[str, float]:
    """Run the steps for `inputs` generated names.

    Returns the number of shards, the size of the largest pickled task and the size of inputs.npz.
    """
    from prep.build.plan import BuildPlan
    from prep.inputs.folder import FolderReader
    from prep.inputs.listing import Listing
    from prep.inputs.reader import Source
    from prep.store.manifest import Settings

    def make() -> Listing:
        listing = Listing()
        for number in range(inputs):
            label = number * CLASSES // inputs
            wnid = b"n%08d" % (1440764 + 601 * label)
            listing.add(b"%b/%b_%d.JPEG" % (wnid, wnid, number * 37 % 99991), label, 110_000 + number % 997, 10**18)
        return listing

    listing = steps.run("add", make)
    classes = tuple(f"n{1440764 + 601 * label:08d}" for label in range(CLASSES))
    source = Source(FolderReader(Path("/data")), "train", classes, listing)
    settings = Settings(256, False, "jpeg", 90, "area", 0)
    plan = steps.run("plan", lambda: BuildPlan(source, work_dir / "train", settings, False))
    steps.run("permutation", lambda: plan.permutation)
    task_bytes = steps.run("tasks", lambda: [len(pickle.dumps(plan.task(n))) for n in range(plan.shard_count)[:100]])
    path = work_dir / "inputs.npz"
    steps.run("save", lambda: listing.save(path))
    loaded = steps.run("load", lambda: Listing.load(path, CLASSES, "Run the benchmark again."))
    assert steps.run("compare", lambda: loaded.same_as(listing))
    return {"shards": plan.shard_count, "largest_task_bytes": max(task_bytes), "inputs_npz_bytes": path.stat().st_size}


def list_tree(files: int, work_dir: Path, steps: Steps) -> None:
    """Create `files` empty files in class folders, and list them."""
    from prep.inputs.folder import list_folder

    root = work_dir / "tree"
    for first in range(0, files, _PER_FOLDER):
        folder = root / f"n{first:08d}"
        folder.mkdir(parents=True)
        for number in range(first, min(first + _PER_FOLDER, files)):
            (folder / f"{folder.name}_{number}.JPEG").touch()
    found = steps.run("list_folder", lambda: list_folder(root, "train", False))
    assert len(found.listing) == files


@click.command(cls=BenchmarkCommand)
@click.option(
    "--inputs",
    type=click.IntRange(1),
    default=14_197_122,
    show_default=True,
    help="Number of inputs with generated names.",
)
@click.option(
    "--tree",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of empty files to create and list; with 0, this step is left out.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def main(inputs: int, tree: int, as_json: bool) -> None:
    """Measure time and memory of listing, sorting and planning as many inputs as ImageNet-21k has.

    \b
    Example:
      python -m tools.bench.listing
      python -m tools.bench.listing --inputs 1281167 --tree 200000
    """
    steps = Steps()
    with tempfile.TemporaryDirectory() as temporary:
        if tree:
            list_tree(tree, Path(temporary), steps)
        facts = measure(inputs, Path(temporary), steps)
    if as_json:
        print_json({"inputs": inputs, "files": tree, "steps": steps.rows, **facts})
        return
    click.echo(f"{'step':<14} {'s':>8} {'CPU s':>8} {'peak MB':>10}")
    for row in steps.rows:
        click.echo(f"{row['step']:<14} {row['seconds']:8.1f} {row['cpu_s']:8.1f} {row['peak_mb']:10,.0f}")
    click.echo(
        f"{facts['shards']:,} shards, largest task {bytes_text(facts['largest_task_bytes'])}, inputs.npz "
        f"{bytes_text(facts['inputs_npz_bytes'])}"
    )


if __name__ == "__main__":
    main()
