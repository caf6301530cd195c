"""How fast a store is built, beside FFCV's writer, a Pillow script, libvips and the bound.

ours    `alexprep build-lmdb` as a user calls it, a process of its own: decode, area average to 256 px, central square,
        JPEG of quality 90, Datums with a CRC-32, sharded LMDB with SHA-256 digests, exact colour moments, mean image,
        everything synced to the disk, manifest.
FFCV    its DatasetWriter, JPEG of quality 90 (tools/bench/peers/ffcv_writer.py). It has no rescaling to a shorter side, so
        Pillow's bicubic filter does that in the data set, as torchvision's Resize would.
Pillow  what one writes in an afternoon: a pool of processes that rescale by Pillow's bicubic filter, one plain LMDB
        written by the parent in one commit (tools/bench/peers/pillow_script.py).
libvips the same with libvips' thumbnail (tools/bench/peers/vips_thumbnail.py).
bound   libjpeg-turbo decodes each photograph and encodes a square, and nothing else (tools/bench/peers/jpeg_bound.py).

Everyone has --jobs worker processes, is held to as many cores, and reads the same files from the page cache, which is
read through before each turn. Ours is timed from starting the command to its end, with the imports and the listing of
the folder. The others are programs that have done both and, but for FFCV, have started their workers when they are
given the word; they are timed from that to their answer that all is written, which is kind to them. Only ours and
LMDB sync. Not timed: deleting what the last turn wrote.

The photographs are repeated, by hard links where the disk allows it, until they are --pictures in number: choose so
many that each works for ten seconds and ours loses little by starting. The bound goes through them twice for that.
Repeating also means that every size of photograph comes again: what a contestant keeps by size pays sooner than it
would on as many different photographs.

With --steps nothing is raced; instead the steps of ours are timed one by one on one core, in this process, with one
BLAS thread, beside libjpeg-turbo alone. A round is one pass through at most 320 photographs, none repeated.
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
from typing import Any

import click

from prep.console import UserError, count_noun, print_json, say
from tools.bench.harness import (
    INTERPRETER,
    Benchmark,
    Contestant,
    Program,
    common_options,
    ours_over,
    photo_digits,
    race,
    ratio_lines,
    show,
    timed,
)

SIDE_PX, QUALITY, FILTER = 256, 90, "area"
_ENDINGS = (".jpeg", ".jpg", ".png")
_BOUND = "bound: decode and encode alone"
_BOUND_PASSES = 2
_STEP_PICTURES = 320
_ALONE = ("libjpeg-turbo alone, decode", "libjpeg-turbo alone, encode")


def photographs(folder: Path) -> list[Path]:
    """The pictures below `folder`, by the endings of their names, in order. Raises UserError for none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file())
    if not found:
        raise UserError(f"--source {folder}: no {', '.join(_ENDINGS)} file in it. Name a folder of photographs.")
    return found


def chosen(paths: Sequence[Path], wanted: int) -> list[Path]:
    """`wanted` of them, evenly spread; all and from the first again where there are fewer."""
    if wanted < len(paths):
        return [paths[len(paths) * index // wanted] for index in range(wanted)]
    return list(itertools.islice(itertools.cycle(paths), wanted))


def lay_out(paths: Sequence[Path], source: Path, folder: Path) -> None:
    """Links to `paths`, copies where there can be none, in class folders after the folders below `source`."""
    for index, path in enumerate(paths):
        parts = path.relative_to(source).parent.parts
        link = folder / ("_".join(parts) or "photographs") / f"{index:06d}_{path.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), link)
        except OSError:  # another disk, or no right to link
            shutil.copyfile(path, link)


class Field:
    """Where everyone reads and writes, and everyone who runs there."""

    def __init__(self, pictures: Path, work: Path, jobs: int) -> None:
        self.pictures, self.work, self.jobs = pictures, work, jobs
        self.out = work / "out"
        self.versions: dict[str, str] = {}
        self.programs: list[Program] = []
        files = {path.stat().st_ino: path for path in sorted(pictures.glob("*/*"))}
        self.files = list(files.values())  # one path for each file

    def clear(self) -> None:
        """Wait for whoever still runs, delete what was written, sync, have all files in the page cache."""
        for program in self.programs:
            program.wait()
        shutil.rmtree(self.out, ignore_errors=True)
        os.sync()
        for path in self.files:
            path.read_bytes()

    def _program(self, name: str, command: Sequence[str]) -> Program:
        program = Program(name, command, self.work / "errors.txt")
        self.programs.append(program)
        return program

    def ours(self, name: str) -> Contestant:
        """`alexprep build-lmdb`, from its start to its end."""
        alexprep = Path(sysconfig.get_path("scripts")) / "alexprep"
        if not alexprep.exists():
            raise UserError("alexprep is not installed beside this Python. Install it with: pip install -e .")
        told = ("--store", str(self.out), "--jobs", str(self.jobs), "--json")
        command = (str(alexprep), "build-lmdb", str(self.pictures), *told)
        program = self._program(name, command)

        def turn() -> int:
            program.start()
            built = json.loads(program.line())
            program.wait()
            return int(built["records"])

        return Contestant(name, timed(turn), _BOUND, self.clear)

    def peer(self, name: str, python: str | Path, module: str, *more: str) -> Contestant:
        """One of tools.bench.peers under the interpreter `python`, from the word to its end. Raises UserError if it fails."""
        command = [str(Path(python).absolute()), "-m", f"tools.bench.peers.{module}"]
        command += [str(self.pictures), str(self.out), str(self.jobs), *more]
        program = self._program(name, command)

        def prepare() -> None:
            self.clear()
            program.start()
            self.versions[name] = program.line()

        def turn() -> int:
            program.go()
            return int(program.line())

        prepare()  # what is missing shall be said before the race
        program.stop()
        return Contestant(name, timed(turn), _BOUND, prepare)

    def stop(self) -> None:
        """End whoever still runs."""
        for program in self.programs:
            program.stop()


def contestants(field: Field, ffcv: Path | None, vips: Path | None, more: bool) -> list[Contestant]:
    """Everyone who can run here; says who cannot, and why."""
    racing = [field.ours("ours")]
    if ffcv is None:
        say("FFCV is left out: name an interpreter that has it with --ffcv-python")
    else:
        racing.append(field.peer("FFCV, Pillow bicubic", ffcv, "ffcv_writer", "jpg"))
        if more:
            racing.append(field.peer("FFCV, its own rescaling", ffcv, "ffcv_writer", "own"))
            racing.append(field.peer("FFCV, Pillow bicubic, raw", ffcv, "ffcv_writer", "raw"))
    racing.append(field.peer("Pillow script, bicubic", sys.executable, "pillow_script", "BICUBIC"))
    if more:
        racing.append(field.peer("Pillow script, BOX", sys.executable, "pillow_script", "BOX"))
    if vips is None:
        say("libvips is left out: name an interpreter that has pyvips and lmdb with --vips-python")
    else:
        racing.append(field.peer("libvips thumbnail", vips, "vips_thumbnail"))
    racing.append(field.peer(_BOUND, sys.executable, "jpeg_bound", str(_BOUND_PASSES)))
    for name, versions in field.versions.items():
        say(f"{name}: {versions}")
    return racing


def ms_by_step(paths: Sequence[Path], out: Path, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds for one picture in each step of ours, and in libjpeg-turbo alone: medians over the rounds."""
    import numpy as np
    import simplejpeg
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

    from prep.images import codec, color_stats, rescale
    from prep.store import datum, lmdb_shard

    taken: dict[str, float] = {}
    square_sum = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint32)

    def timed(step: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        done = work()
        taken[step] = taken.get(step, 0.0) + time.perf_counter() - started
        return done

    def moments(square: Any) -> None:
        np.add(square_sum, square, out=square_sum)
        color_stats.Moments.of(square)

    def one(path: Path) -> bytes:
        content = timed("read", path.read_bytes)
        pixels = timed("decode", lambda: codec.decode_image(content).pixels)
        square = timed("rescale", lambda: rescale.rescale(pixels, SIDE_PX, False, FILTER))
        timed("moments", lambda: moments(square))
        file = timed("encode", lambda: codec.encode(square, "jpeg", QUALITY))
        with contextlib.suppress(ValueError):  # CMYK, PNG
            timed(_ALONE[0], lambda: simplejpeg.decode_jpeg(content))
        timed(_ALONE[1], lambda: simplejpeg.encode_jpeg(square, quality=QUALITY, colorsubsampling="420"))
        record = datum.Datum(SIDE_PX, SIDE_PX, file, 0, os.fsencode(path.name))
        return bytes(timed("Datum and LMDB", record.encode))

    found: dict[str, list[float]] = {}
    with threadpool_limits(1):
        for number in range(rounds):
            taken.clear()
            square_sum[:] = 0
            records = [one(path) for path in paths]
            keyed = [(lmdb_shard.record_key(index), record) for index, record in enumerate(records)]
            timed("Datum and LMDB", partial(lmdb_shard.write, out / str(number), iter(keyed)))
            for step, seconds in taken.items():
                found.setdefault(step, []).append(1000 * seconds / len(paths))
    middle = {step: round(median(all_ms), 3) for step, all_ms in found.items()}
    return {k: ms for k, ms in middle.items() if k not in _ALONE}, {k: middle[k] for k in _ALONE if k in middle}


def show_steps(paths: Sequence[Path], work: Path, rounds: int, as_json: bool) -> None:
    """The table of steps, or one JSON object."""
    say(f"{count_noun(len(paths), 'picture')}, one core, {count_noun(rounds, 'round')}")
    steps, alone = ms_by_step(paths, work / "steps", rounds)
    if as_json:
        print_json({"pictures": len(paths), "rounds": rounds, "ours_ms_by_step": steps, "libjpeg_turbo_ms": alone})
        return
    click.echo(f"{'one picture on one core':<28} {'ms':>6}")
    for step, ms in {**steps, "together": sum(steps.values()), **alone}.items():
        click.echo(f"{step:<28} {ms:6.2f}")


@click.command(cls=Benchmark)
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of photographs, at any depth.  [default: the photo digits, made now]",
)
@click.option(
    "--pictures",
    type=click.IntRange(1),
    default=8000,
    show_default=True,
    metavar="N",
    help="How many everyone works through: the photographs again and again, or some of them. Have each contestant "
    "work for ten seconds or more, so that starting is a small share.",
)
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Workers, and cores, of everyone.")
@click.option("--ffcv-python", type=INTERPRETER, metavar="PATH", help="Interpreter that has FFCV; else left out.")
@click.option(
    "--vips-python", type=INTERPRETER, metavar="PATH", help="Interpreter that has pyvips and lmdb; else left out."
)
@click.option("--more", is_flag=True, help="Also Pillow's BOX filter, FFCV's own rescaling and FFCV's raw records.")
@click.option("--steps", is_flag=True, help="Instead: what each step of ours takes on one core.")
@common_options
def main(
    source: Path | None,
    pictures: int,
    jobs: int,
    ffcv_python: Path | None,
    vips_python: Path | None,
    more: bool,
    steps: bool,
    rounds: int,
    as_json: bool,
) -> None:
    """Measure building a store of photographs, beside FFCV's writer, a Pillow script, libvips and bare libjpeg-turbo.

    FFCV wants an environment of its own: the system's libopencv-dev, libturbojpeg0-dev and pkg-config; in a new venv
    `pip install 'numpy<2.3' torch setuptools wheel pillow lmdb 'pyvips[binary]'`, then `pip install
    --no-build-isolation ffcv`. The same environment then does for libvips.

    \b
    Example:
      python -m tools.bench.build --source ilsvrc/train --rounds 3
      python -m tools.bench.build --ffcv-python peers/bin/python --vips-python peers/bin/python
      python -m tools.bench.build --source ilsvrc/train --steps
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = source or photo_digits(work / "digits")
        paths = photographs(folder)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: 1 if steps else jobs])
        if steps:
            show_steps(chosen(paths, min(len(paths), _STEP_PICTURES)), work, rounds, as_json)
            return
        lay_out(chosen(paths, pictures), folder, work / "pictures")
        count = f"{count_noun(pictures, 'picture')} of {count_noun(len(paths), 'photograph')}"
        say(f"{count}, {count_noun(jobs, 'worker')}")
        field = Field(work / "pictures", work, jobs)
        try:
            rows = race(contestants(field, ffcv_python, vips_python, more), rounds)
        finally:
            field.stop()
    data = {"pictures": pictures, "photographs": len(paths), "jobs": jobs, "rounds": rounds}
    show(rows, as_json, {**data, "ours_over": ours_over(rows), "versions": field.versions}, ratio_lines(rows))


if __name__ == "__main__":
    main()
