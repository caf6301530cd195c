"""prep.merge.stores: a merged store equals the store that is built from all photographs together."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.check.verify import verify_split
from prep.cli import main
from prep.console import Progress, UserError
from prep.merge.records import CopyTask, SourceShard, copy_shard, list_shard
from prep.merge.stores import merge_stores
from prep.store.lmdb_file import ShardBroken
from prep.store.manifest import Settings, Store, StoreError
from prep.workers import TaskProgress
from tests.helpers.building import (
    PPM,
    SKIP,
    InlineRunner,
    Records,
    Stopped,
    build,
    make_pictures,
    run_interrupted_builds,
)
from tests.helpers.damaged_stores import changed_record, cut_after_tree, read_records, replace_records

JPEG = replace(PPM, format="jpeg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 photographs in `all`, and the same photographs divided between `one` (two thirds) and `two`."""
    root = tmp_path_factory.mktemp("photos")
    for number, path in enumerate(sorted(make_pictures(root / "all", 200, (33, 50)).glob("*/*"))):
        copy = root / ("two" if number % 3 == 0 else "one") / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return root


MakeStore = Callable[..., Path]


@pytest.fixture(scope="module")
def make_store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    stores: dict[tuple[str, Settings], Path] = {}

    def make(name: str, settings: Settings = PPM) -> Path:
        if (name, settings) not in stores:
            stores[name, settings] = tmp_path_factory.mktemp("stores") / name
            build(photos / name, stores[name, settings], settings)
        return stores[name, settings]

    return make


def merge(sources: Iterable[Path], target: Path, runner: Any = None, restart: bool = False) -> Store:
    return merge_stores(list(sources), target, runner or InlineRunner(), Progress(1, "records"), restart)


def files_of(store: Path) -> dict[str, bytes]:
    return {name: (store / "train" / name).read_bytes() for name in ("mean_image.npy", "colour.json", "inputs.jsonl")}


@pytest.mark.parametrize("settings", [PPM, JPEG], ids=["ppm", "jpeg"])
def test_a_merge_of_two_parts_of_a_folder_equals_the_build_of_the_folder(
    settings: Settings, make_store: MakeStore, tmp_path: Path
) -> None:
    whole, parts = make_store("all", settings), [make_store(name, settings) for name in ("one", "two")]
    merged = merge(parts, tmp_path / "merged")
    built = Store.open(whole)
    assert merged.fingerprint == Store.open(tmp_path / "merged").fingerprint == built.fingerprint
    assert files_of(merged.root) == files_of(whole)
    mine, expected = merged.split("train"), built.split("train")
    assert replace(mine, account={}) == replace(expected, account={})
    assert mine.account["sources"] == [
        {"fingerprint": Store.open(part).split("train").fingerprint, "records": Store.open(part).split("train").records}
        for part in parts
    ]
    assert {name: mine.account[name] for name in ("inputs", "kept", "bad")} == {"inputs": 200, "kept": 200, "bad": {}}
    assert verify_split(merged, "train", InlineRunner(), Progress(1, "records")) == []


def test_classes_are_joined_by_name_and_no_image_changes(
    make_store: MakeStore, photos: Path, tmp_path: Path, records_of: Records
) -> None:
    """One class is in both stores, with different labels. The second store also has a class of its own.

    In sorted order, this class comes before all classes of the first store.
    """
    other = tmp_path / "other"
    shutil.copytree(photos / "two" / "n3", other / "n3")
    shutil.copytree(photos / "two" / "n1", other / "a0")
    (other / "a0" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    second = build(other, tmp_path / "second", policy=SKIP).root
    assert Store.open(second).classes == ("a0", "n3")
    merged = merge([make_store("one"), second], tmp_path / "merged")
    assert merged.classes == ("n1", "n2", "n3", "a0")
    expected = {}
    for store in (make_store("one"), second):
        names = Store.open(store).classes
        for _, datum in records_of(store, "train"):
            expected[datum.source] = names[datum.label], datum.data, (datum.height, datum.width)
    records = records_of(merged.root, "train")
    assert len(records) == len(expected) == merged.split("train").records
    for _, datum in records:
        assert expected[datum.source] == (merged.classes[datum.label], datum.data, (datum.height, datum.width))
    assert [key for key, _ in records] == [b"%08d" % k for k in range(len(records))]
    whole = {value for _, value in raw_records(make_store("one"))}
    assert whole <= {value for _, value in raw_records(merged.root)}  # the labels of the first store do not change
    assert verify_split(merged, "train", InlineRunner(), Progress(1, "records")) == []
    account = merged.split("train").account
    assert account["inputs"] == account["kept"] + 1 and sum(account["bad"].values()) == 1
    assert b"a0/broken.jpg" in files_of(merged.root)["inputs.jsonl"]


class CutsTheShard(TaskProgress):
    """Truncates a shard when the work on record 1 begins. Only the pages of LMDB's tree remain, without the values."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def begin(self, index: int, cpu_limit_s: float = 0) -> None:
        if index == 1:
            cut_after_tree(self.folder)


@pytest.mark.parametrize("work", ["list", "copy"])
def test_a_shard_that_is_cut_during_a_merge_gives_its_own_error(
    make_store: MakeStore, tmp_path: Path, work: str
) -> None:
    """Missing pages of the file are read as zeros. The error must name the shard, and not call the record damaged."""
    store = Store.open(shutil.copytree(make_store("two"), tmp_path / "two"))
    folder = Path(store.shard_paths("train")[0])
    shard = SourceShard(folder, store.split("train").shards[0].records, tuple(range(len(store.classes))))
    with pytest.raises(ShardBroken, match=r"train/00000: data\.mdb was changed or became unreadable"):
        if work == "list":
            list_shard((0, shard), CutsTheShard(folder))
        else:
            task = CopyTask(0, 0, ((0, 0), (0, 1)), (shard,), tmp_path / "new", store.settings, "")
            copy_shard(task, CutsTheShard(folder))


@pytest.mark.parametrize("settings", [PPM, JPEG], ids=["ppm", "jpeg"])
def test_a_record_with_another_payload_than_promised_is_refused(
    make_store: MakeStore, tmp_path: Path, settings: Settings
) -> None:
    store = Store.open(shutil.copytree(make_store("two", settings), tmp_path / "two"))
    folder = Path(store.shard_paths("train")[0])
    side, records = settings.side_px, read_records(folder)
    png = io.BytesIO()
    Image.new("RGB", (side, side)).save(png, "PNG")
    shard = SourceShard(folder, len(records), tuple(range(len(store.classes))))
    task = CopyTask(0, 0, ((0, 0), (0, 1)), (shard,), tmp_path / "new", store.settings, "")
    for changes, expected in (
        ({"data": png.getvalue()}, "a PNG file, expected a "),
        ({"data": b""}, "expected a "),
        ({"height": 1, "width": 1}, f"1×1 px, the images of this store have {side}×{side} px"),
    ):
        replace_records(folder, [(records[0][0], changed_record(records[0][1], **changes)), *records[1:]])
        with pytest.raises(UserError, match=f"train/00000, record 0: .*{expected}"):
            copy_shard(task, TaskProgress())


def raw_records(store: Path) -> Iterator[tuple[bytes, bytes]]:
    from prep.store import lmdb_shard

    for path in Store.open(store).shard_paths("train"):
        yield from lmdb_shard.read(Path(path))


class StopsAfterOneShard(InlineRunner):
    def map(self, work: Any, tasks: Iterable[Any], on_progress: Any) -> Iterator[tuple[Any, Any]]:
        for pair in super().map(work, tasks, on_progress):
            yield pair
            if work is copy_shard:
                raise Stopped


def test_an_interrupted_merge_is_resumed_and_finished_shards_are_kept(make_store: MakeStore, tmp_path: Path) -> None:
    parts, target = [make_store("one"), make_store("two")], tmp_path / "merged"
    with pytest.raises(Stopped):
        merge(parts, target, StopsAfterOneShard())
    with pytest.raises(StoreError, match="a merge was not finished: run the same alexprep merge again"):
        Store.open(target)
    with pytest.raises(UserError, match="unfinished merge of other records"):
        merge(reversed(parts), target)
    first = target / "train" / "00000" / "data.mdb"
    before = first.stat().st_mtime_ns
    assert merge(parts, target).fingerprint == Store.open(make_store("all")).fingerprint
    assert first.stat().st_mtime_ns == before
    assert not (target / "train" / ".build").exists()
    other = tmp_path / "other"
    with pytest.raises(Stopped):
        merge(reversed(parts), other, StopsAfterOneShard())
    assert merge(parts, other, restart=True).fingerprint == Store.open(make_store("all")).fingerprint


def test_a_merge_may_be_killed_at_any_disk_operation(photos: Path, tmp_path: Path) -> None:
    """A killed merge leaves no store that looks complete. The same command, run again, merges all photographs."""
    for number, path in enumerate(sorted((photos / "all").glob("*/*"))[::8]):
        for folder in ("all", ("one", "two")[number % 2]):
            copy = tmp_path / "photos" / folder / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for name in ("all", "one", "two"):
        build(tmp_path / "photos" / name, tmp_path / "stores" / name)
    whole = Store.open(tmp_path / "stores" / "all")
    rows = run_interrupted_builds(tmp_path / "stores", tmp_path / "merged", "kill-merge")
    assert len(rows) > 20 and [row["code"] for row in rows] == [9] * (len(rows) - 1) + [0]
    assert not any(row["torn"] for row in rows)
    assert {row["again"] for row in rows} == {0}, rows
    for row in rows:
        merged = tmp_path / "merged" / f"{row['at']:03d}"
        assert Store.open(merged).fingerprint == whole.fingerprint and files_of(merged) == files_of(whole.root)
        assert not list(merged.rglob("*.tmp")) and not (merged / "train" / ".build").exists()


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


def test_the_command_merges_once_and_reports_json(make_store: MakeStore, tmp_path: Path) -> None:
    words = ["merge", make_store("one"), make_store("two"), "--store", tmp_path / "m", "--jobs", "1", "--json"]
    first = alexprep(*words)
    assert first.exit_code == 0, first.output
    line = json.loads(first.stdout)
    assert line["records"] == 200 and line["fingerprint"] == Store.open(make_store("all")).split("train").fingerprint
    assert json.loads(alexprep(*words).stdout)["images_per_s"] == 0
    assert "already merged; nothing to do" in alexprep(*words[:-1]).stdout
    shown = alexprep("inspect", "--store", tmp_path / "m")
    assert shown.stdout.count("merged: ") == 2
    described = json.loads(alexprep("inspect", "--store", tmp_path / "m", "--json").stdout)
    assert [origin["records"] for origin in described["splits"]["train"]["sources"]] == [133, 67]


def test_a_background_matters_only_for_transparent_inputs(make_store: MakeStore, tmp_path: Path) -> None:
    opaque = make_store("one")
    for color in ("black", "white"):
        (tmp_path / "clear" / "n1").mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (40, 40), (255, 0, 0, 128)).save(tmp_path / "clear" / "n1" / "clear.png")
        build(tmp_path / "clear", tmp_path / color, replace(PPM, background=color))
    merged = merge([opaque, tmp_path / "black"], tmp_path / "merged")
    assert merged.settings.background == "black" and Store.open(opaque).settings.background == "white"
    assert merged.split("train").account["converted"]["alpha"] == 1
    assert merged.split("train").account["largest_px"] == Store.open(opaque).split("train").account["largest_px"]
    with pytest.raises(UserError, match="background black, but white in another of the stores"):
        merge([tmp_path / "white", tmp_path / "black"], tmp_path / "m2")


def test_what_cannot_be_merged_is_refused(make_store: MakeStore, photos: Path, tmp_path: Path) -> None:
    one, two = make_store("one"), make_store("two")
    with pytest.raises(UserError, match="format jpeg, but ppm in another of the stores"):
        merge([one, make_store("two", JPEG)], tmp_path / "m")
    with pytest.raises(UserError, match="expected two or more"):
        merge([one], tmp_path / "m")
    for sources, target in (([one, one], tmp_path / "m"), ([one, two], one)):
        with pytest.raises(UserError, match="is named twice"):
            merge(sources, target)
    with pytest.raises(StoreError, match="no such store"):
        merge([one, tmp_path / "nothing"], tmp_path / "m")
    taken = build(photos / "two", tmp_path / "taken").root
    with pytest.raises(UserError, match="holds a split train of other inputs"):
        merge([one, two], taken)
    damaged = shutil.copytree(two, tmp_path / "damaged")
    shard = damaged / "train" / "00000" / "data.mdb"
    content = bytearray(shard.read_bytes())
    at = content.rindex(b"P6\n#") + 2000  # the offset of a pixel
    content[at] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"record \d+: checksum .* Check the store with: alexprep verify"):
        merge([one, damaged], tmp_path / "m2")


def test_a_store_and_its_copy_are_refused(make_store: MakeStore, tmp_path: Path) -> None:
    shutil.copytree(make_store("one"), tmp_path / "copy")
    with pytest.raises(UserError, match=r"copy: the split train has the same fingerprint in both"):
        merge([make_store("one"), tmp_path / "copy"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
