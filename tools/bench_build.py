"""How fast a store is built, beside a Pillow script and the bound.

ours    prep.build.build_split with prep.runners.run_local, as `alexprep build-lmdb` calls them: decode, area average
        to 256 px, central square, JPEG of quality 90, Datums with a CRC-32, sharded LMDB with SHA-256 digests, exact
        colour moments, mean image, everything synced to the disk, manifest.
Pillow  what one writes in an afternoon: a pool of processes that decode, resize the shorter side to 256 px by Pillow's
        bicubic filter, cut the central square and encode at quality 90; the parent puts the files into one plain LMDB.
        No labels, checksums or moments, one commit. Pillow's BOX would take 0.4 times as long to resize, LANCZOS 1.3.
bound   libjpeg-turbo (simplejpeg) alone, on threads: files held in memory are decoded and, cut to at most 256×256
        without resizing, encoded again. It leaves out the few pictures that simplejpeg cannot read: CMYK, PNG.

Everyone has as many workers as --jobs says and reads from the page cache. Timed for ours and for Pillow: starting the
pool of fresh interpreters (each imports this module, which imports little), all pictures, ending the pool, closing the
LMDB. Not timed: the imports of this process, listing the folder, deleting the last round's store. The bound starts no
process and opens no file. With few pictures the start is most of it: take a thousand or more.

Then ours by step, in this process with one BLAS thread: milliseconds for one picture. Rescaling keeps the weights of
the last sizes that it saw, so photographs of many sizes take longer than photographs of few.

FFCV's writer is not here, for it needs system packages.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import click
import lmdb
from PIL import Image

from prep.console import Progress, UserError, count_noun, say
from tools.side_by_side import Benchmark, Contestant, common_options, libjpeg_turbo, photo_digits, race, show

SIDE_PX, QUALITY, FILTER = 256, 90, "area"
_STEP_PICTURES = 300
_BOUND = "bound: decode and encode alone"


def photographs(folder: Path, limit: int | None) -> list[Path]:
    """All files below `folder`, relative to it, or `limit` of them evenly chosen. Raises UserError for none."""
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not paths:
        raise UserError(f"--source {folder}: no file in it. Name a folder of photographs.")
    wanted = min(limit or len(paths), len(paths))
    return [paths[len(paths) * index // wanted] for index in range(wanted)]


def ours(folder: Path, paths: Sequence[Path], store: Path, jobs: int) -> int:
    """A build, all pictures under one label."""
    from prep.build import build_split
    from prep.manifest import Settings
    from prep.runners import run_local
    from prep.sources import Input, Source

    source = Source(folder, "train", ("photographs",), tuple(Input(os.fsencode(path), 0) for path in paths))
    settings = Settings(SIDE_PX, False, "jpeg", QUALITY, FILTER, 0)
    built = build_split(source, store, settings, jobs, False, run_local, Progress(len(paths), "pictures"))
    return built.split("train").records


def pillow_jpeg(path: Path) -> bytes:
    """The Pillow script's work on one photograph."""
    image = Image.open(path).convert("RGB")
    scale = SIDE_PX / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - SIDE_PX) // 2, (height - SIDE_PX) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE_PX, top + SIDE_PX))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def pillow_script(folder: Path, paths: Sequence[Path], out: Path, jobs: int) -> int:
    """The Pillow script: a pool of processes, one plain LMDB."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    with pool, lmdb.open(str(out), map_size=1 << 40) as env, env.begin(write=True) as txn:
        for index, content in enumerate(pool.map(pillow_jpeg, [folder / path for path in paths], chunksize=16)):
            txn.put(b"%08d" % index, content)
    return len(paths)


def bound(folder: Path, paths: Sequence[Path], jobs: int) -> Contestant:
    """libjpeg-turbo alone, on the files that it can read."""
    jpeg = libjpeg_turbo()

    def images(content: bytes) -> int:
        try:
            pixels = jpeg.decode_jpeg(content)
        except ValueError:
            return 0
        top, left = (max(0, length - SIDE_PX) // 2 for length in pixels.shape[:2])
        cut = pixels[top : top + SIDE_PX, left : left + SIDE_PX].copy()
        jpeg.encode_jpeg(cut, quality=QUALITY, colorsubsampling="420")
        return 1

    held = [content for content in ((folder / path).read_bytes() for path in paths) if images(content)]
    pool = ThreadPoolExecutor(jobs)

    def one_thread(first: int) -> int:
        return sum(images(content) for content in held[first::jobs])

    return Contestant(_BOUND, lambda: sum(pool.map(one_thread, range(jobs))), _BOUND)


def ms_by_step(folder: Path, paths: Sequence[Path], out: Path) -> dict[str, float]:
    """Milliseconds that one picture takes in each step of ours, of one thread."""
    import numpy as np
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # comes with scikit-learn

    from prep import colour, datum, picture, rescale, shard

    square_sum = np.zeros((SIDE_PX, SIDE_PX, 3), np.uint32)

    def moments(pixels: Any) -> Any:
        np.add(square_sum, pixels, out=square_sum)
        colour.Moments.of(pixels)
        return pixels

    steps: dict[str, Callable[[Any], Any]] = {
        "read and decode": lambda path: picture.read_picture((folder / path).read_bytes()).pixels,
        "rescale": lambda pixels: rescale.rescale(pixels, SIDE_PX, False, FILTER),
        "moments": moments,
        "encode": lambda pixels: picture.encode(pixels, "jpeg", QUALITY),
        "Datum and LMDB": lambda content: datum.Datum(SIDE_PX, SIDE_PX, content, 0, b"n0/photograph.jpg").encode(),
    }
    seconds = dict.fromkeys(steps, 0.0)
    values: list[Any] = list(paths)
    with threadpool_limits(1):
        for index, step in product(range(len(values)), steps):
            started = time.perf_counter()
            values[index] = steps[step](values[index])
            seconds[step] += time.perf_counter() - started
        started = time.perf_counter()
        shard.write(out, ((shard.key_of(index), value) for index, value in enumerate(values)))
        seconds["Datum and LMDB"] += time.perf_counter() - started
    return {step: round(1000 * taken / len(paths), 3) for step, taken in seconds.items()}


@click.command(cls=Benchmark)
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of photographs, every file a picture.  [default: the photo digits, made now]",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Take only so many, evenly chosen.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Workers of everyone.")
@common_options
def main(source: Path | None, limit: int | None, jobs: int, rounds: int, as_json: bool) -> None:
    """Measure building a store of photographs, beside a Pillow script and bare libjpeg-turbo.

    \b
    Example:
      python -m tools.bench_build --rounds 5
      python -m tools.bench_build --source ilsvrc/train --limit 1000
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = source or photo_digits(work / "digits")
        paths = photographs(folder, limit)
        out = work / "out"
        say(f"{count_noun(len(paths), 'picture')}, {count_noun(jobs, 'worker')}")

        def clean() -> None:
            shutil.rmtree(out, ignore_errors=True)

        build = Contestant("ours", lambda: ours(folder, paths, out, jobs), _BOUND, clean)
        pillow = Contestant("Pillow script, bicubic", lambda: pillow_script(folder, paths, out, jobs), _BOUND, clean)
        rows = race((build, pillow, bound(folder, paths, jobs)), rounds)
        steps = ms_by_step(folder, paths[:: max(1, len(paths) // _STEP_PICTURES)], work / "steps")
    note = ", ".join(f"{step} {taken:.2f}" for step, taken in steps.items())
    more = {"pictures": len(paths), "jobs": jobs, "rounds": rounds, "ours_ms_by_step": steps}
    show(rows, as_json, more, f"ours, one picture on one core, ms: {note}; together {sum(steps.values()):.2f}")


if __name__ == "__main__":
    main()
