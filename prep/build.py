"""Building a split: cut the inputs into shards, have them built, put the store together.

A shard is a pure function of its inputs and the settings: written to a temporary folder, synced, renamed, then
recorded by a JSON file that is itself renamed into place. So a build that was killed loses the shards in flight and
no more, and the same command again finishes it with the same fingerprint. While it is unfinished its state is in

    store/train/.build/plan.json         what is being built, to refuse another
    store/train/.build/00000.json .npy   one finished shard: counts, digest, moments; sum of its central squares

The order of the records is fixed here: by a keyed hash of their paths, so it depends on nothing but names and seed,
and DALI, which reads in key order through a small shuffle buffer, meets the classes well mixed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
from PIL import features

from prep import shard
from prep.colour import Moments, colour_stats
from prep.console import Progress, UserError, bytes_text
from prep.datum import Datum
from prep.manifest import (
    SPLITS,
    Settings,
    Shard,
    Split,
    Store,
    StoreError,
    digest_json,
    hold_lock,
    split_fingerprint,
    sync_folder,
    write_atomic,
)
from prep.picture import BadPicture, check_rescaled_size, encode, read_picture
from prep.rescale import rescale
from prep.sources import Input, Source

SHARD_RECORDS = 4096  # at the most: about 100 MB of JPEG, ten seconds of one core
_LEAST_RECORDS, _WANTED_SHARDS = 64, 32  # a small split is cut finer, so that all cores have work

Runner = Callable[[Sequence["ShardTask"], int, Progress], None]


@dataclass(frozen=True)
class ShardTask:
    """All that building one shard takes; small enough to send to a worker or another machine."""

    number: int
    first_index: int  # of its first record in the split: keys go on from there
    inputs: tuple[Input, ...]
    source: Path
    split: str
    folder: Path  # of the split, in the store
    settings: Settings
    skip_bad: bool

    @property
    def path(self) -> str:
        """The shard's folder, relative to the store."""
        return f"{self.split}/{self.number:05d}"


def build_split(
    source: Source, store: Path, settings: Settings, jobs: int, skip_bad: bool, run: Runner, report: Progress
) -> Store:
    """Build one split into the folder `store` and return the store; a split that is there already is left as it is.

    Raises UserError where the store or a half-built split has other settings or inputs, where another build is at
    work, at the first bad picture unless `skip_bad`, and where the disk is full.
    """
    try:
        return _build_split(source, store, settings, jobs, skip_bad, run, report)
    except OSError as error:
        raise UserError(
            f"{store}: {error}. Give the same command again once that is mended: the shards that are finished are kept."
        ) from error


def _build_split(
    source: Source, store: Path, settings: Settings, jobs: int, skip_bad: bool, run: Runner, report: Progress
) -> Store:
    plan = _plan(source, settings)
    store.mkdir(parents=True, exist_ok=True)
    with hold_lock(store, "build"):
        _sweep(store)
        existing = Store.open(store) if (store / "manifest.json").exists() else None
        if existing is not None:
            _same_settings(settings, asdict(existing.settings), store)
            if source.split in existing.splits:
                if existing.splits[source.split].account.get("plan") != plan:
                    raise UserError(
                        f"{store} holds a split {source.split} of other inputs. "
                        "Choose another --store, or delete this one to build it anew."
                    )
                report.skip(len(source.inputs))
                shutil.rmtree(store / source.split / ".build", ignore_errors=True)
                return existing
        folder = store / source.split
        work = folder / ".build"
        _start_or_go_on(work, plan, settings, store)
        tasks = _tasks(source, folder, settings, skip_bad)
        todo = [task for task in tasks if not _is_done(task)]
        report.skip(len(source.inputs) - sum(len(task.inputs) for task in todo))
        run(todo, jobs, report)
        built = _put_together(source, store, settings, tasks, plan, existing)
        shutil.rmtree(work)
        return built


def build_shard(task: ShardTask, count: Callable[[], None]) -> None:
    """Build and record one shard; `count` is called once for each input.

    Raises UserError for a bad picture (unless the task skips them) and for a full or broken disk.
    """
    temporary = task.folder / ".build" / f"{task.number:05d}.{os.getpid()}.tmp"
    final = task.folder / f"{task.number:05d}"
    shutil.rmtree(temporary, ignore_errors=True)
    result = _ShardResult(task, count)
    try:
        records, size, digest = shard.write(temporary, result.records())
        shutil.rmtree(final, ignore_errors=True)  # renamed by a build that was killed before it could record
        os.rename(temporary, final)
        sync_folder(task.folder)
        _save_array(_record_path(task).with_suffix(".npy"), result.square_sum)
        summary = result.summary(Shard(task.path, records, size, digest))
        write_atomic(_record_path(task), json.dumps(summary).encode())
    except (lmdb.Error, OSError) as error:
        free = bytes_text(shutil.disk_usage(task.folder).free)
        raise UserError(
            f"{task.folder}: {error}, with {free} free on that disk. Make room and give the same command again: "
            "the shards that are finished are kept."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _ShardResult:
    """Reads, rescales and encodes one shard's inputs in order, and adds up what is known while pixels are in hand."""

    def __init__(self, task: ShardTask, count: Callable[[], None]) -> None:
        side = task.settings.side_px
        self.task, self.count = task, count
        self.moments = Moments()
        self.square_sum = np.zeros((side, side, 3), np.uint32)  # 2^32 / 255 squares fit, a shard has 4096
        self.labels: Counter[int] = Counter()
        self.fates: list[dict[str, Any]] = []

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        for index, item in enumerate(self.task.inputs, self.task.first_index):
            value = self._record(item)
            self.count()
            if value is not None:
                yield shard.key_of(index), value

    def _record(self, item: Input) -> bytes | None:
        task, settings = self.task, self.task.settings
        name = item.path.decode("utf-8", "backslashreplace")
        try:
            content = _read(os.path.join(os.fsencode(task.source), item.path))
            picture = read_picture(content)
            check_rescaled_size(picture.pixels, settings.side_px, settings.keep_aspect)
        except BadPicture as why:
            if not task.skip_bad:
                raise UserError(f"{name}: {why}. Mend it, or pass --on-bad skip to leave it out.") from None
            self.fates.append({"source": name, "fate": "bad", "why": str(why)})
            return None
        pixels = rescale(picture.pixels, settings.side_px, settings.keep_aspect, settings.filter)
        height, width = pixels.shape[:2]
        top, left = (height - settings.side_px) // 2, (width - settings.side_px) // 2
        self.moments += Moments.of(pixels)
        self.square_sum += pixels[top : top + settings.side_px, left : left + settings.side_px]
        self.labels[item.label] += 1
        if picture.converted or picture.orientation != 1:
            fate: dict[str, Any] = {"source": name, "fate": "kept"}
            if picture.converted:
                fate |= {"fate": "converted", "how": list(picture.converted)}
            if picture.orientation != 1:
                fate["exif_orientation"] = picture.orientation
            self.fates.append(fate)
        return Datum(height, width, encode(pixels, settings.format, settings.quality), item.label, item.path).encode()

    def summary(self, built: Shard) -> dict[str, Any]:
        return {
            "shard": asdict(built),
            "moments": self.moments.to_json(),
            "labels": sorted(self.labels.items()),
            "fates": self.fates,
        }


def _read(path: bytes) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadPicture(f"cannot be read: {error.strerror or error}") from None


def record_order(inputs: Sequence[Input], seed: int) -> list[Input]:
    """The seeded permutation: sorted by BLAKE2b (8 bytes, keyed by the seed) of the path, ties by the path itself."""
    key = seed.to_bytes(8, "little")
    return sorted(inputs, key=lambda i: (hashlib.blake2b(i.path, digest_size=8, key=key).digest(), i.path))


def _tasks(source: Source, folder: Path, settings: Settings, skip_bad: bool) -> list[ShardTask]:
    """Shards of nearly equal length, as many as the number of inputs alone says."""
    ordered = record_order(source.inputs, settings.seed)
    n = len(ordered)
    length = min(SHARD_RECORDS, max(_LEAST_RECORDS, -(-n // _WANTED_SHARDS)))
    shards = -(-n // length)
    edges = [n * s // shards for s in range(shards + 1)]
    return [
        ShardTask(s, start, tuple(ordered[start:stop]), source.root, source.split, folder, settings, skip_bad)
        for s, (start, stop) in enumerate(pairwise(edges))
    ]


def _plan(source: Source, settings: Settings) -> str:
    """Digest of all that the records depend on, beside what the files hold."""
    inputs = hashlib.sha256()
    for item in source.inputs:
        inputs.update(b"%d\0%b\0" % (item.label, item.path))
    return digest_json({"settings": asdict(settings), "classes": source.classes, "inputs": inputs.hexdigest()})


def _start_or_go_on(work: Path, plan: str, settings: Settings, store: Path) -> None:
    path = work / "plan.json"
    if path.exists():
        begun = json.loads(path.read_bytes())
        if begun["plan"] != plan:
            _same_settings(settings, begun["settings"], store)
            raise UserError(
                f"{store} holds an unfinished build of other inputs. Give its command again to finish it, "
                f"or delete {work.parent} to start anew."
            )
        return
    if work.parent.exists() and set(os.listdir(work.parent)) - {work.name}:
        raise StoreError(f"{work.parent} exists but no build of ours began it. Choose another --store, or remove it.")
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"plan": plan, "settings": asdict(settings)}).encode())


def _same_settings(asked: Settings, found: dict[str, Any], store: Path) -> None:
    for field in fields(Settings):
        ask, has = getattr(asked, field.name), found[field.name]
        if ask != has:
            option = "side" if field.name == "side_px" else field.name.replace("_", "-")
            raise UserError(
                f"{store} was begun with --{option} {has}, this command says {ask}. "
                "Give the same settings, or choose another --store."
            )


def _put_together(
    source: Source,
    store: Path,
    settings: Settings,
    tasks: Sequence[ShardTask],
    plan: str,
    existing: Store | None,
) -> Store:
    """All shards are there: add up their records, write what the stream reads, and last the manifest."""
    folder = store / source.split
    moments, shards = Moments(), []
    labels: Counter[int] = Counter()
    fates: list[dict[str, Any]] = []
    square_sum = np.zeros((settings.side_px, settings.side_px, 3), np.int64)
    for task in tasks:
        record = json.loads(_record_path(task).read_bytes())
        square_sum += np.load(_record_path(task).with_suffix(".npy"))
        moments += Moments.from_json(record["moments"])
        labels.update(dict(record["labels"]))
        fates += record["fates"]
        if record["shard"]["records"]:  # DALI cannot open an empty LMDB; a shard is empty where all inputs were bad
            shards.append(Shard(**record["shard"]))
    bad = [fate for fate in fates if fate["fate"] == "bad"]
    records = sum(s.records for s in shards)
    if not records:
        raise UserError(
            f"{source.root}: not one of {len(source.inputs):,} inputs is a picture (first: {bad[0]['why']})."
        )
    account = {
        "plan": plan,
        "inputs": len(source.inputs),
        "kept": records,
        "converted": dict(Counter(how for fate in fates for how in fate.get("how", ()))),
        "exif_orientation": dict(Counter(str(f["exif_orientation"]) for f in fates if "exif_orientation" in f)),
        "bad": dict(Counter(fate["why"] for fate in bad)),
    }
    split = Split(
        records=records,
        bytes=sum(s.bytes for s in shards),
        pixels=moments.pixels,
        fingerprint=split_fingerprint(source.classes, shards),
        label_counts=tuple(labels[k] for k in range(len(source.classes))),
        shards=tuple(shards),
        moments=moments.to_json(),
        account=account,
    )
    _save_array(folder / "mean_image.npy", (square_sum / records).astype(np.float32))
    write_colour(folder, split)
    lines = [json.dumps(fate, ensure_ascii=False) + "\n" for fate in sorted(fates, key=lambda f: str(f["source"]))]
    write_atomic(folder / "inputs.jsonl", "".join(lines).encode())
    splits = {**(existing.splits if existing else {}), source.split: split}
    built = Store(store, settings, _tools(), source.classes, splits)
    built.save()
    return built


def write_colour(folder: Path, split: Split) -> None:
    """Write colour.json, which the stream reads, from the split's exact moments."""
    stats = colour_stats(split.records, Moments.from_json(split.moments))
    write_atomic(folder / "colour.json", json.dumps(asdict(stats)).encode())


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_atomic(path, content.getvalue())


def _sweep(store: Path) -> None:
    """Remove what killed builds left under temporary names. Only the holder of the store's lock may."""
    ours = (".manifest.json.*.tmp", *(f"{split}/{name}" for split in SPLITS for name in (".*.tmp", ".build/*.tmp")))
    for left in [path for pattern in ours for path in store.glob(pattern)]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _is_done(task: ShardTask) -> bool:
    """Recorded, and not with a bad picture that this build would not leave out: it may have been mended."""
    try:
        fates = json.loads(_record_path(task).read_bytes())["fates"]
    except (FileNotFoundError, ValueError):
        return False
    return task.skip_bad or not any(fate["fate"] == "bad" for fate in fates)


def _record_path(task: ShardTask) -> Path:
    return task.folder / ".build" / f"{task.number:05d}.json"


def _tools() -> dict[str, str]:
    """Versions of what shapes the bytes of a record."""
    return {
        "alexnet": version("alexnet"),
        "pillow": version("pillow"),
        "libjpeg_turbo": str(features.version_feature("libjpeg_turbo") or "none"),
        "numpy": np.__version__,
        "lmdb": ".".join(map(str, lmdb.version())),
    }
