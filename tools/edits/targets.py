"""Lists the files that are edited, and the commands that read each file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tools.edits.byte_edits import (
    Apply,
    any_file_edits,
    npy_file_edits,
    npz_file_edits,
    npz_member_edits,
    npz_members,
    text_file_edits,
)
from tools.edits.json_edits import encode, value_edits
from tools.edits.record_edits import digest_of, page_edits, record_edits, shard_edits

UNCHANGED = "unchanged"  # kind of the edit that changes nothing; commands must accept the unchanged file
PACKAGES = {"alexprep": "prep", "alexstream": "pipeline", "alextrain": "train"}


@dataclass(frozen=True)
class Edit:
    """One edit of one file."""

    file: str  # path relative to the folder of the examples
    field: str  # field of a JSON document, or member of an archive; empty if the edit concerns the whole file
    kind: str  # name of the change, for example `delete`
    apply: Apply


@dataclass(frozen=True)
class Target:
    """A file, its edits, and the commands that read the file."""

    file: str
    format: str  # json, lines, npy, npz, shard, checkpoint, archive, state_dict or bytes
    folders: Sequence[str]  # folders and files of the examples that the commands need in their working directory
    commands: Sequence[str]  # command lines


_OPENS_STORE = (
    "alexprep inspect --store store",
    "alexprep verify --quick --jobs 1 --store store",
    "alexprep export-files files --store store --jobs 1",
    "alexprep pca-stats --store store --jobs 1",
    "alexprep merge store other --store merged --jobs 1",
    "alexprep copy store copied --jobs 1",
    "alexprep build-lmdb photos --store store --on-bad skip --side 256 --jobs 1",
    "alexstream inspect --store store --batch 4 --batches 2",
    "alexstream preview out.png --store store --rows 1",
    "alexstream bench --store store --batch 4 --threads 1 --seconds 0.1",
)
_TRAINS = "--gpus cpu --threads 1 --batch 16 --log-every 1"
_ABLATION = "--gpus cpu --threads 1 --batch 16 --steps 1"
_TRAINS_NEW = f"alextrain run {_TRAINS} --store store --run-dir new --recipe released --steps 1"
_READS_STORE_AND_RUN = (
    "alextrain evaluate run --store store --gpus cpu --threads 1",
    "alextrain features run --store store --gpus cpu",
    "alextrain search run picture.png --store store --gpus cpu --index 20",
    "alextrain report run --store store --gpus cpu --no-images",
    "alextrain import weights.pth --store store --run-dir new --batch 16",
    f"alextrain ablate {_ABLATION} --recipe short --store store --only no-dropout --out new",
)
_STORE_AND_RUN = ("store", "other", "photos", "run", "weights.pth", "picture.png")
_EXPORT = "export run --to safetensors"
_READS_RUN = (
    "alextrain status run",
    "alextrain status run --json",
    "alextrain compare run imported --out compare.png",
    "alextrain report run --gpus cpu --no-images",
    "alextrain evaluate run --gpus cpu --threads 1",
    "alextrain features run --gpus cpu",
    "alextrain predict run picture.png --gpus cpu",
    "alextrain search run picture.png --gpus cpu --index 20",
    "alextrain figures run --gpus cpu --no-images --out figures",
    f"alextrain {_EXPORT}",
    f"alextrain run {_TRAINS} --run-dir run --epochs 3 --steps 9",
    f"alextrain run {_TRAINS} --run-dir run --fork forked --epochs 3 --steps 9",
)
_RUN = ("store", "run", "imported", "picture.png")
_READS_CHECKPOINT = _READS_RUN[3:]
_ENSEMBLE = (
    "alextrain status ensemble",
    "alextrain compare ensemble --out compare.png",
    "alextrain evaluate ensemble --gpus cpu --threads 1",
    f"alextrain run {_TRAINS} --run-dir ensemble --steps 3",
    "alextrain report ensemble --gpus cpu",
)
_ABLATE = f"alextrain ablate {_ABLATION} --recipe released --only no-dropout --out ablations"
_JOIN = ("alexprep join --store ready",)
_BUILD = (
    "alexprep build-lmdb --on-bad skip --jobs 1 --side 32 photos/train --split train --store parts "
    "--extra weight=photos.csv --extra caption=photos.csv"
)
_PARTS = (f"{_BUILD} --part 2/2", _BUILD)
_MERGE = ("alexprep merge store other --store merge --jobs 1",)
_COPY = ("alexprep copy store copy --jobs 1",)
_IMPORT = "--store store --run-dir new --batch 16"
_VERIFY, _COPY_ALL = "alexprep verify --jobs 1 --store store", "alexprep copy store copied --jobs 1"
_STATUS, _RESUME, _REPORT, _EVALUATE = _READS_RUN[0], _READS_RUN[-2], _READS_RUN[3], _READS_RUN[4]
_EVALUATE_STORE, _FEATURES_STORE, _SEARCH_STORE = _READS_STORE_AND_RUN[:3]
_READS_RECORDS = (
    *(_VERIFY, "alexprep inspect --store store --key 0 --out record.jpg", *_OPENS_STORE[2:3], *_OPENS_STORE[4:6]),
    *("alexstream inspect --store store --batch 70 --batches 1", *_OPENS_STORE[8:]),
    f"{_TRAINS_NEW.replace('--batch 16', '--batch 70')}",
    "alextrain features run --split train --store store --gpus cpu",
)
_READS_EXTRA = (
    *(_VERIFY, _COPY_ALL, "alexprep inspect --store store --key 0", *_OPENS_STORE[2:5:2]),
    f"{_OPENS_STORE[6]} --extra weight=photos.csv --extra caption=photos.csv",
)


def _in_build(folder: str, names: dict[str, str], folders: Sequence[str], commands: Sequence[str]) -> Iterator[Target]:
    """Yield the targets for files of the unfinished build `folder`. `names` is {name of a file: format}."""
    for name, format in names.items():
        yield Target(f"{folder}/train/.build/{name}", format, (folder, *folders), commands)


TARGETS = (
    Target("store/manifest.json", "json", _STORE_AND_RUN, (*_OPENS_STORE, _TRAINS_NEW, *_READS_STORE_AND_RUN)),
    Target(
        "store/train/colour.json",
        "json",
        _STORE_AND_RUN,
        (_VERIFY, _COPY_ALL, _OPENS_STORE[8], _TRAINS_NEW, _EVALUATE_STORE, _READS_STORE_AND_RUN[4]),
    ),
    Target(
        "store/train/mean_image.npy",
        "npy",
        _STORE_AND_RUN,
        (_VERIFY, _COPY_ALL, _TRAINS_NEW, _EVALUATE_STORE, _FEATURES_STORE),
    ),
    Target("store/train/inputs.jsonl", "lines", ("store", "other"), (_VERIFY, _COPY_ALL, *_OPENS_STORE[:5:4])),
    Target("store/train/00000/data.mdb", "shard", _STORE_AND_RUN, _READS_RECORDS),
    *_in_build(
        "parts",
        {"plan.json": "json", "00000.json": "json", "00000.npy": "npy", "inputs.npz": "npz"},
        ("photos", "photos.csv"),
        _PARTS,
    ),
    *_in_build(
        "ready",
        {"plan.json": "json", "parts.json": "json", "00001.json": "json", "00001.npy": "npy", "inputs.npz": "npz"},
        (),
        _JOIN,
    ),
    *_in_build(
        "ready",
        {f"extra/{name}.npy": "npy" for name in ("weight", "caption", "caption.offsets")},
        (),
        _JOIN,
    ),
    *(
        Target(f"store/train/extra/{name}.npy", "npy", ("store", "other", "photos", "photos.csv"), _READS_EXTRA)
        for name in ("weight", "caption", "caption.offsets")
    ),
    *_in_build("merge", {"merge.json": "json", "00000.json": "json", "00000.npy": "npy"}, ("store", "other"), _MERGE),
    Target("copy/.copy/source.json", "json", ("store", "copy"), (*_COPY, "alexprep inspect --store copy")),
    Target("copy/.copy/train/00000/data.mdb.json", "json", ("store", "copy"), _COPY),
    Target(
        "export/.alexprep-export.json",
        "json",
        ("store", "export"),
        ("alexprep export-files export --store store --jobs 1",),
    ),
    Target("run/run.json", "json", _RUN, _READS_RUN),
    Target("run/status.json", "json", _RUN, _READS_RUN[:2]),
    Target("run/metrics.jsonl", "lines", _RUN, (*_READS_RUN[:4], *_READS_RUN[-2:])),
    Target("run/evaluations.jsonl", "lines", _RUN, (_REPORT, _EVALUATE)),
    Target("run/checkpoint-00000008.pt", "checkpoint", _RUN, _READS_CHECKPOINT),
    Target(
        "run/best.pt",
        "archive",
        _RUN,
        tuple(f"alextrain {words} --checkpoint best" for words in ("evaluate run --gpus cpu", _EXPORT)),
    ),
    Target("run/mean_image.npy", "npy", _RUN, _READS_RUN[6:8]),
    Target("run/index-fc7-00000008.npz", "npz", _RUN, ("alextrain search run picture.png --gpus cpu --index 20",)),
    Target("run/SCORES", "npz", _RUN, (_REPORT.replace(" --no-images", " --index 20"),)),
    Target("run.npz", "npz", ("run.npz",), ("alextrain evaluate run.npz",)),
    Target("run/tensorboard/EVENTS", "bytes", _RUN, (_RESUME, _STATUS)),
    Target("ensemble/ensemble.json", "json", ("store", "ensemble"), _ENSEMBLE),
    Target("ensemble/member-1/run.json", "json", ("store", "ensemble"), _ENSEMBLE[:4]),
    Target("ablations/baseline-seed0/ablation.json", "json", ("store", "ablations"), (_ABLATE,)),
    *(
        Target(name, "state_dict", ("store", name), (f"alextrain import {name} {_IMPORT}",))
        for name in ("weights.pth", "exported.pth")
    ),
)


def is_further_source(path: tuple[str | int, ...], value: Any) -> bool:
    """Return True if `path` is the source of a recipe field other than `lr`. Such sources are not edited."""
    return "sources" in path[:-1] and path[-1] != "lr"


def real_path(samples: Path, file: str) -> str:
    """Return the path of a target's file, relative to `samples`.

    `SCORES` and `EVENTS` stand for files whose names contain a digest or a time.
    """
    for name, pattern in (("SCORES", "scores-*.npz"), ("EVENTS", "events.*")):
        if file.endswith(name):
            folder = samples / file.removesuffix(name)
            return str(next(iter(sorted(folder.glob(pattern)))).relative_to(samples))
    return file


def edits_of(target: Target, samples: Path) -> Iterator[Edit]:
    """Yield all edits of a target. `samples` is the folder of the intact examples."""
    if target.format in ("checkpoint", "archive", "state_dict"):  # imported only here, because the module loads torch
        from tools.edits.checkpoint_edits import archive_edits, checkpoint_edits, signed, state_dict_edits
    file = real_path(samples, target.file)
    path = samples / file
    make = partial(Edit, target.file)
    whole: list[tuple[str, Apply]] = [(UNCHANGED, lambda path: None), *any_file_edits()]
    if target.format in ("json", "lines"):
        whole += text_file_edits()
    if target.format in ("npz",):
        whole += npz_file_edits()
    if target.format in ("npy",):
        whole += npy_file_edits()
    for kind, apply in whole:
        yield make("", kind, apply)
    if target.format == "json":
        finish = _signed_manifest if target.file.endswith("manifest.json") else _unchanged
        for edit in value_edits(json.loads(path.read_bytes()), is_further_source):
            yield make(edit.field, edit.kind, partial(_write_json, edit.value, finish))
    elif target.format == "lines":
        lines = path.read_text().splitlines()
        for number in sorted({0, len(lines) - 1}):
            for edit in value_edits(json.loads(lines[number])):
                yield make(
                    f"line {number}.{edit.field}".strip("."), edit.kind, partial(_write_line, edit.value, number)
                )
    elif target.format == "npz":
        for member in npz_members(path):
            for kind, apply in npz_member_edits(member):
                yield make(member, kind, apply)
    elif target.format == "shard":
        for name, edits in (("record 0", record_edits()), ("records", shard_edits()), ("pages", page_edits())):
            for kind, apply in edits:
                yield make(name, kind, apply)
    elif target.format == "checkpoint":
        for field, kind, apply in checkpoint_edits(path):
            yield make(field, kind, apply)
        # The digest is the archive comment of 71 bytes. The two bytes before the comment are its length.
        yield make("", "without digest", lambda path: path.write_bytes(path.read_bytes()[:-73] + bytes(2)))
    elif target.format == "archive":
        for kind, apply in archive_edits():
            yield make("", kind, signed(apply))
    elif target.format == "state_dict":
        for field, kind, apply in state_dict_edits(path):
            yield make(field, kind, apply)


def _write_json(value: Any, finish: Any, path: Path) -> None:
    path.write_text(finish(value, encode(value)), errors="surrogateescape")


def _unchanged(value: Any, text: str) -> str:
    return text


def _signed_manifest(value: Any, text: str) -> str:
    """Return the text of an edited manifest with a correct checksum. A checksum of a wrong length is kept."""
    try:
        read = json.loads(text)
        stated = read.pop("checksum")
        if isinstance(stated, str) and len(stated) == 64:
            return text.replace(stated, digest_of(read))
    except (ValueError, RecursionError, AttributeError, KeyError):
        pass
    return text


def _write_line(value: Any, number: int, path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[number] = encode(value)
    path.write_text("\n".join(lines) + "\n")
