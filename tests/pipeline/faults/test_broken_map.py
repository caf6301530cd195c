"""If a data.mdb is truncated while a process reads it, the reader raises ShardBroken, and the process is not killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.engines import kernels as engine_kernels
from pipeline.loader import eval_loader, train_loader
from pipeline.records import Records
from pipeline.still_image import StoredImages
from pipeline.windows import WindowMaker, WindowRequest
from prep.cli import main
from prep.store import kernels, lmdb_shard
from prep.store.lmdb_file import ShardBroken, store_error
from prep.store.manifest import Store, StoreError
from tests.helpers.damaged_stores import cut_after_tree

PAGE_BYTES = 4096


@pytest.fixture(params=["jpeg", "ppm"])
def copied(stores: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stores[request.param], tmp_path / "store"))


@pytest.fixture(params=["C library", "DALI", "without C libraries"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test that uses this fixture runs with each engine of a CPU."""
    if request.param != "C library":
        monkeypatch.setattr(engine_kernels, "native", None)
    if request.param == "without C libraries":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("the kernels were not compiled")
    return str(request.param)


def cut(store: Path, split: str) -> str:
    """Truncate the first shard of a split to its header pages. Return the beginning of the expected message."""
    os.truncate(store / split / "00000" / "data.mdb", 2 * PAGE_BYTES)
    return f"{store}/{split}/00000: data.mdb was changed or became unreadable during reading: now it has 8,192 bytes"


def assert_names_the_shard(error: ShardBroken, store: Path, message: str) -> None:
    assert str(error).startswith(message)
    assert str(error).endswith(f"Check the store with: alexprep verify --store {store}")
    assert "\n" not in str(error) and error.exit_code == 74


@pytest.mark.usefixtures("engine")
def test_a_stream_ends_with_an_error_that_names_the_shard(copied: Path) -> None:
    with train_loader(copied, 3, threads=2) as loader:
        batches = (batch for _ in range(1000) for batch in loader)
        next(batches)
        message = cut(copied, "train")
        with pytest.raises(ShardBroken) as broken:
            list(batches)
        assert_names_the_shard(broken.value, copied, message)
        with pytest.raises(ShardBroken):  # every later batch raises the error, too
            next(iter(loader))


def test_records_and_images_that_are_read_one_by_one_end_with_the_error(copied: Path) -> None:
    store = Store.open(copied)
    records, images = Records(store, "val"), StoredImages(store, "val")
    maker = WindowMaker(store, 1)
    request = WindowRequest("val", np.arange(4), np.zeros((4, 2), np.int32), 224)
    maker.make(request)
    records[0], images[0]
    message = cut(copied, "val")
    readers: list[Callable[[], object]] = [
        lambda: records[1],
        lambda: records.label(2),
        lambda: records.batch(np.arange(8)),
        lambda: images[1],
        lambda: images.label(1),
        lambda: maker.make(request),
    ]
    for read in readers:
        with pytest.raises(ShardBroken) as broken:
            read()
        assert_names_the_shard(broken.value, copied, message)
    for opened in (records, images, maker):
        opened.close()


def test_the_name_of_a_source_file_that_cannot_be_read_is_not_empty(copied: Path) -> None:
    with closing(Records(Store.open(copied), "val")) as records:
        assert records.source(0)
        cut_after_tree(copied / "val" / "00000")
        with pytest.raises(ShardBroken):
            records.source(1)


def test_a_file_that_is_cut_within_its_last_page_is_noticed(copied: Path) -> None:
    """The missing rest of the page reads as zeros, without SIGBUS. The loader does not verify checksums."""
    file = copied / "val" / "00000" / "data.mdb"
    shards = len(Store.open(copied).split("val").shards)
    with closing(Records(Store.open(copied), "val", check=False)) as records:
        records.batch(np.arange(len(records)))
        records.check_maps()
        os.truncate(file, file.stat().st_size - 50)
        with pytest.raises(ShardBroken, match=r"val/00000: data\.mdb was changed"):
            for _ in range(shards):
                records.check_maps()


def test_a_file_that_is_removed_or_replaced_is_read_to_its_end(copied: Path) -> None:
    """The map keeps the pages of the old file, even if the new file of the same name is shorter."""
    file = copied / "val" / "00000" / "data.mdb"
    with closing(Records(Store.open(copied), "val")) as records:
        expected = records.batch(np.arange(len(records))).labels.tolist()
        file.unlink()
        assert records.batch(np.arange(len(records))).labels.tolist() == expected
        file.write_bytes(b"another file")
        assert records.batch(np.arange(len(records))).labels.tolist() == expected


def test_a_sequential_reader_ends_with_the_error(copied: Path) -> None:
    records = lmdb_shard.read(copied / "val" / "00000")
    next(records)
    message = cut(copied, "val")
    with pytest.raises(ShardBroken) as broken:
        list(records)
    assert str(broken.value).startswith(message)


def test_a_restored_file_can_be_opened_again(copied: Path) -> None:
    file = copied / "val" / "00000" / "data.mdb"
    content = file.read_bytes()
    with eval_loader(copied, 2) as loader:
        expected = [batch.labels.tolist() for batch in loader]
        cut(copied, "val")
        with pytest.raises(ShardBroken):
            list(loader)
    file.write_bytes(content)
    with eval_loader(copied, 2) as loader:
        assert [batch.labels.tolist() for batch in loader] == expected


def test_an_error_that_a_worker_of_a_service_sends_keeps_its_exit_code(copied: Path) -> None:
    reader = lmdb_shard.read(copied / "val" / "00000")
    next(reader)
    cut(copied, "val")
    with pytest.raises(ShardBroken) as broken:
        list(reader)
    assert store_error(str(broken.value)).exit_code == 74 and store_error("other").exit_code == 1


FAULTHANDLER = "import faulthandler\nfaulthandler.enable()\n"
OTHER_FAULTS = {
    "sent by a program": "os.kill(os.getpid(), signal.SIGBUS)",
    "in another map": "os.truncate('other', 0)\nprint(other[9000])",
}


def run_program(program: str, store: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the Python code `program` in a new process in `folder`. `store` is the argument of the program."""
    (folder / "other").write_bytes(bytes(10_000))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", program, store],
        capture_output=True, text=True, check=False, timeout=60, cwd=folder, env=environment,
    )  # fmt: skip


READ = (  # a program that reads record 0 of the split val, and maps the file `other`
    "import mmap, os, signal, sys\nimport numpy as np\n"
    "from pipeline.records import Records\nfrom prep.store.manifest import Store\n"
    "records = Records(Store.open(sys.argv[1]), 'val')\nrecords[0]\n"
    "with open('other', 'rb') as file:\n    other = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
)


@pytest.mark.skipif(kernels.native is None, reason="the kernels were not compiled")
@pytest.mark.parametrize("order", ["no faulthandler", "faulthandler first", "faulthandler later"])
@pytest.mark.parametrize("fault", OTHER_FAULTS)
def test_another_sigbus_still_ends_the_process(stores: dict[str, Path], tmp_path: Path, fault: str, order: str) -> None:
    """faulthandler still prints its traceback, even if it was enabled after a shard was mapped."""
    before = FAULTHANDLER if order == "faulthandler first" else ""
    after = f"{FAULTHANDLER}records[1]\n" if order == "faulthandler later" else ""
    process = run_program(f"{before}{READ}{after}{OTHER_FAULTS[fault]}\n", stores["jpeg"], tmp_path)
    assert process.returncode == -signal.SIGBUS, process
    assert process.stderr.count("Fatal Python error: Bus error") == (order != "no faulthandler")


@pytest.mark.skipif(kernels.native is None, reason="the kernels were not compiled")
@pytest.mark.parametrize("read", ["records[1]", "records.batch(np.arange(4))"])
def test_maps_stay_protected_if_other_code_installs_its_handler_later(copied: Path, tmp_path: Path, read: str) -> None:
    """faulthandler.enable, which ray.init calls, replaces the handler of SIGBUS."""
    message = f"{copied}/val/00000: data.mdb was changed or became unreadable"
    program = f"{FAULTHANDLER}os.truncate(sys.argv[1] + '/val/00000/data.mdb', {2 * PAGE_BYTES})\n{read}\n"
    process = run_program(READ + program, copied, tmp_path)
    assert process.returncode == 1 and f"ShardBroken: {message}" in process.stderr, process


@pytest.mark.parametrize("command", ["stream", "verify", "export"])
def test_a_named_pipe_in_place_of_a_shard_is_refused_at_once(copied: Path, tmp_path: Path, command: str) -> None:
    file = copied / "val" / "00000" / "data.mdb"
    file.unlink()
    os.mkfifo(file)
    if command == "stream":
        with eval_loader(copied, 2) as loader, pytest.raises(StoreError, match=r"val/00000.*named pipe"):
            list(loader)
        return
    words = {"verify": ["verify"], "export": ["export-files", str(tmp_path / "out")]}[command]
    result = CliRunner().invoke(main, [*words, "--store", str(copied), "--split", "val", "--jobs", "1"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "named pipe" in result.output or "is missing" in result.output
