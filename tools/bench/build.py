"""Benchmark of building a store: compares alexprep with FFCV's writer, a Pillow script, libvips and an upper bound.

The compared programs are called contestants. A turn is one timed run of a contestant.

ours    `alexprep build-lmdb` in a separate process. Each photograph is decoded, rescaled by area average to 256 px,
        cropped to the central square and encoded as a JPEG of quality 90. The command writes Datums, each with a
        CRC-32, into LMDB shards. It also writes digests, colour moments, mean image and manifest, and syncs all files.
FFCV    FFCV's DatasetWriter, JPEG of quality 90 (tools/bench/peers/ffcv_writer.py). FFCV cannot rescale the shorter
        side to a given length. ffcv_writer.py therefore rescales with Pillow's bicubic filter.
Pillow  a short script: a pool of processes rescales with Pillow's bicubic filter, and the parent process writes one
        LMDB in one commit (tools/bench/peers/pillow_script.py).
libvips the same script with libvips' thumbnail (tools/bench/peers/vips_thumbnail.py).
bound   upper bound: libjpeg-turbo only decodes each photograph and encodes a square (tools/bench/peers/jpeg_bound.py).

Every contestant has --jobs worker processes, may use --jobs cores, and reads the same files. Before each turn, the
benchmark deletes the output of the previous turn, and reads all files, so that they are in the page cache.

The time of `ours` includes starting the command, importing libraries and listing the folder. All other contestants
import libraries and list the folder before the timing starts. All other contestants except FFCV also start their
workers before the timing starts. Only `ours` and the scripts that write an LMDB (Pillow, libvips) sync their output.

--pictures N is the number of images in a turn. If the source has fewer than N photographs, the photographs are repeated
by hard links. If hard links fail, the photographs are copied. Choose N so large that each contestant works for at least
ten seconds. The start of alexprep then takes only a small share of the time. The bound is fast, so it processes the N
images twice. All copies of a photograph have the same size, which favours a contestant that caches data by image size.

With --steps, no contestants are compared. Instead, the process of the benchmark runs and times each step of our build,
and libjpeg-turbo alone, with one BLAS thread. A round is then one pass through at most 320 different photographs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import click

from prep.console import UserError, count_noun, print_json, say
from tools.bench.cluster_build import ClusterRace
from tools.bench.harness import (
    INTERPRETER,
    BenchmarkCommand,
    Contestant,
    LineProcess,
    common_options,
    make_photo_digits,
    print_results,
    race,
    speedup_lines,
    speedups,
    timed,
)

SIDE_PX, QUALITY, FILTER = 256, 90, "area"
_SUFFIXES = (".jpeg", ".jpg", ".png")
_BOUND = "bound: decode and encode alone"
_BOUND_PASSES = 2
_STEP_PICTURES = 320
_ALONE = ("libjpeg-turbo alone, decode", "libjpeg-turbo alone, encode")

T = TypeVar("T")


def find_photographs(folder: Path) -> list[Path]:
    """Return the sorted image files below `folder`, chosen by suffix. Raises UserError if there are no such files."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"--source {folder}: no {', '.join(_SUFFIXES)} file in this folder. Name another folder.")
    return paths


def resample(paths: Sequence[Path], count: int) -> list[Path]:
    """Return `count` paths, evenly spread over `paths`. If `paths` has fewer paths, some are repeated."""
    if count < len(paths):
        return [paths[len(paths) * index // count] for index in range(count)]
    return list(itertools.islice(itertools.cycle(paths), count))


def link_photographs(paths: Sequence[Path], source: Path, folder: Path) -> None:
    """Link each file into a class folder in `folder`. If linking fails, copy the file.

    The name of the class folder is the path of the file's folder relative to `source`, with _ between the parts. For
    files directly in `source`, the name is `photographs`.
    """
    for index, path in enumerate(paths):
        parts = path.relative_to(source).parent.parts
        link = folder / ("_".join(parts) or "photographs") / f"{index:06d}_{path.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), link)
        except OSError:  # the folders are on different file systems, or links are not permitted
            shutil.copyfile(path, link)


class BuildBenchmark:
    """Creates contestants and their processes. Contestants read the folder `pictures` and write below `work_dir`."""

    def __init__(self, pictures: Path, work_dir: Path, jobs: int) -> None:
        self.pictures, self.work_dir, self.jobs = pictures, work_dir, jobs
        self.out = work_dir / "out"
        self.versions: dict[str, str] = {}  # name of a contestant -> versions of its libraries
        self.processes: list[LineProcess] = []
        by_inode = {path.stat().st_ino: path for path in sorted(pictures.glob("*/*"))}
        self.distinct_files = list(by_inode.values())

    def reset(self) -> None:
        """Wait until all processes have ended, delete the output, sync the disk, and read all files into the cache."""
        for process in self.processes:
            process.wait()
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()
        for path in self.distinct_files:
            path.read_bytes()

    def process(self, name: str, command: Sequence[str]) -> LineProcess:
        """Return a process, not yet started, that runs `command`. BuildBenchmark.stop ends the process."""
        process = LineProcess(name, command, self.work_dir / "errors.txt")
        self.processes.append(process)
        return process

    def command(self) -> tuple[str, ...]:
        """Return the command line of `alexprep build-lmdb`. Raises UserError if alexprep is not installed."""
        alexprep = Path(sysconfig.get_path("scripts")) / "alexprep"
        if not alexprep.exists():
            raise UserError("alexprep is not installed beside this Python. Install alexprep with: pip install -e .")
        options = ("--store", str(self.out), "--jobs", str(self.jobs), "--json")
        return (str(alexprep), "build-lmdb", str(self.pictures), *options)

    def ours(self, name: str) -> Contestant:
        """Return `alexprep build-lmdb` as a contestant, timed from the start to the end of its process."""
        process = self.process(name, self.command())

        def turn() -> int:
            process.start()
            result = json.loads(process.read_line())
            process.wait()
            return int(result["records"])

        return Contestant(name, timed(turn), _BOUND, self.reset)

    def peer(self, name: str, python: str | Path, module: str, *arguments: str) -> Contestant:
        """Return a program of tools.bench.peers as a contestant. The interpreter `python` runs the program.

        The timing of a turn starts when the benchmark sends the line `go`, and ends when the program has printed the
        number of images. Raises UserError if the program fails to start.
        """
        command = [str(Path(python).absolute()), "-m", f"tools.bench.peers.{module}"]
        command += [str(self.pictures), str(self.out), str(self.jobs), *arguments]
        process = self.process(name, command)

        def prepare() -> None:
            self.reset()
            process.start()
            self.versions[name] = process.read_line()

        def turn() -> int:
            process.send()
            return int(process.read_line())

        prepare()  # a start before the first round reports missing libraries at once
        process.stop()
        return Contestant(name, timed(turn), _BOUND, prepare)

    def stop(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.stop()


def make_contestants(benchmark: BuildBenchmark, ffcv: Path | None, vips: Path | None, more: bool) -> list[Contestant]:
    """Return the contestants. FFCV and libvips take part only if their Python interpreters are given.

    `more` adds variants of FFCV and of the Pillow script. Prints each contestant that is left out, with the reason.
    """
    contestants = [benchmark.ours("ours")]
    if ffcv is None:
        say("FFCV is left out: --ffcv-python must name an interpreter that has FFCV")
    else:
        contestants.append(benchmark.peer("FFCV, Pillow bicubic", ffcv, "ffcv_writer", "jpg"))
        if more:
            contestants.append(benchmark.peer("FFCV, its own rescaling", ffcv, "ffcv_writer", "own"))
            contestants.append(benchmark.peer("FFCV, Pillow bicubic, raw", ffcv, "ffcv_writer", "raw"))
    contestants.append(benchmark.peer("Pillow script, bicubic", sys.executable, "pillow_script", "BICUBIC"))
    if more:
        contestants.append(benchmark.peer("Pillow script, BOX", sys.executable, "pillow_script", "BOX"))
    if vips is None:
        say("libvips is left out: --vips-python must name an interpreter that has pyvips and lmdb")
    else:
        contestants.append(benchmark.peer("libvips thumbnail", vips, "vips_thumbnail"))
    contestants.append(benchmark.peer(_BOUND, sys.executable, "jpeg_bound", str(_BOUND_PASSES)))
    for name, versions in benchmark.versions.items():
        say(f"{name}: {versions}")
    return contestants


def ms_by_step(paths: Sequence[Path], out: Path, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return {step of our build: ms per image} and {step of libjpeg-turbo alone: ms per image}.

    The times are medians over the rounds. `out` is a new folder for the shards.
    """
    import simplejpeg
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # installed with scikit-learn

    from prep.images import codec, color_stats, rescale
    from prep.store import datum, lmdb_shard

    seconds_by_step: dict[str, float] = {}  # times of the current round
    sums = color_stats.PixelSums(SIDE_PX)

    def timed(step: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        seconds_by_step[step] = seconds_by_step.get(step, 0.0) + time.perf_counter() - started
        return result

    def make_record(path: Path) -> bytes:
        content = timed("read", path.read_bytes)
        pixels = timed("decode", lambda: codec.decode_image(content).pixels)
        square = timed("rescale", lambda: rescale.rescale(pixels, SIDE_PX, False, FILTER))
        timed("moments", lambda: sums.add(square))
        file = timed("encode", lambda: codec.encode_image(square, "jpeg", QUALITY))
        with contextlib.suppress(ValueError):  # simplejpeg reads neither CMYK nor PNG
            timed(_ALONE[0], lambda: simplejpeg.decode_jpeg(content))
        timed(_ALONE[1], lambda: simplejpeg.encode_jpeg(square, quality=QUALITY, colorsubsampling="420"))
        record = datum.Datum(SIDE_PX, SIDE_PX, file, 0, os.fsencode(path.name))
        return timed("Datum and LMDB", record.encode)

    rounds_ms: dict[str, list[float]] = {}
    with threadpool_limits(1):
        for number in range(rounds):
            seconds_by_step.clear()
            records = [(lmdb_shard.record_key(index), make_record(path)) for index, path in enumerate(paths)]
            timed("Datum and LMDB", partial(lmdb_shard.write, out / str(number), records))
            for step, seconds in seconds_by_step.items():
                rounds_ms.setdefault(step, []).append(1000 * seconds / len(paths))
    median_ms = {step: round(median(values), 3) for step, values in rounds_ms.items()}
    ours = {step: ms for step, ms in median_ms.items() if step not in _ALONE}
    return ours, {step: median_ms[step] for step in _ALONE if step in median_ms}


def print_steps(paths: Sequence[Path], work_dir: Path, rounds: int, as_json: bool) -> None:
    """Time the steps of our build, and print a table or one JSON object."""
    say(f"{count_noun(len(paths), 'picture')}, one core, {count_noun(rounds, 'round')}")
    steps, alone = ms_by_step(paths, work_dir / "steps", rounds)
    if as_json:
        print_json({"pictures": len(paths), "rounds": rounds, "ours_ms_by_step": steps, "libjpeg_turbo_ms": alone})
        return
    click.echo(f"{'one picture on one core':<28} {'ms':>6}")
    for step, ms in {**steps, "together": sum(steps.values()), **alone}.items():
        click.echo(f"{step:<28} {ms:6.2f}")


@click.command(cls=BenchmarkCommand)
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with photographs at any depth.  [default: photo digits, made for this run]",
)
@click.option(
    "--pictures",
    type=click.IntRange(1),
    default=8000,
    show_default=True,
    metavar="N",
    help="Number of images that each contestant processes in a turn. If the folder has fewer than N photographs, some"
    " are repeated. If the folder has more photographs, N photographs are used. Choose N so large that a turn "
    "takes ten seconds or more.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Number of worker processes of each contestant, and of cores that each contestant may use.",
)
@click.option(
    "--ffcv-python", type=INTERPRETER, metavar="PATH", help="Python interpreter with FFCV.  [default: no FFCV]"
)
@click.option(
    "--vips-python",
    type=INTERPRETER,
    metavar="PATH",
    help="Python interpreter with pyvips and lmdb.  [default: no libvips]",
)
@click.option("--more", is_flag=True, help="Also measure Pillow's BOX filter, FFCV's rescaling and FFCV's raw records.")
@click.option("--steps", is_flag=True, help="Time each step of our build on one core, instead of comparing programs.")
@click.option("--cluster", is_flag=True, help="Measure only alexprep, with and without --cluster local.")
@common_options
def main(
    source: Path | None,
    pictures: int,
    jobs: int,
    ffcv_python: Path | None,
    vips_python: Path | None,
    more: bool,
    steps: bool,
    cluster: bool,
    rounds: int,
    as_json: bool,
) -> None:
    """Measure the speed of builds by alexprep, FFCV's writer, a Pillow script and libvips, and of libjpeg-turbo alone.

    FFCV needs a separate environment. Install libopencv-dev, libturbojpeg0-dev and pkg-config on the system; then, in a
    new virtual environment, `pip install 'numpy<2.3' torch setuptools wheel pillow lmdb 'pyvips[binary]'` and `pip
    install --no-build-isolation ffcv`. `--vips-python` may name the interpreter of the same environment.

    \b
    Example:
      python -m tools.bench.build --source ilsvrc/train --rounds 3
      python -m tools.bench.build --ffcv-python peers/bin/python --vips-python peers/bin/python
      python -m tools.bench.build --source ilsvrc/train --steps
      python -m tools.bench.build --source ilsvrc/train --cluster
    """
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = Path(temporary)
        folder = source or make_photo_digits(work_dir / "digits")
        paths = find_photographs(folder)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: 1 if steps else jobs])
        if steps:
            print_steps(resample(paths, min(len(paths), _STEP_PICTURES)), work_dir, rounds, as_json)
            return
        link_photographs(resample(paths, pictures), folder, work_dir / "pictures")
        count = f"{count_noun(pictures, 'picture')} of {count_noun(len(paths), 'photograph')}"
        say(f"{count}, {count_noun(jobs, 'worker')}")
        benchmark = BuildBenchmark(work_dir / "pictures", work_dir, jobs)
        cluster_race = ClusterRace(benchmark.command(), benchmark.process, benchmark.reset)
        try:
            peers = [] if cluster else make_contestants(benchmark, ffcv_python, vips_python, more)
            rows = race(peers or cluster_race.contestants(), rounds)
        finally:
            benchmark.stop()
    details = {"pictures": pictures, "photographs": len(paths), "jobs": jobs, "rounds": rounds}
    results = {"ours_over": speedups(rows), "versions": benchmark.versions, "start_s": cluster_race.start_s()}
    print_results(rows, as_json, {**details, **results}, speedup_lines(rows))


if __name__ == "__main__":
    main()
