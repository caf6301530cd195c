"""Shared fixtures: a few photographs in ILSVRC's layout, stores built from them, and Caffe's Datum in protobuf.

`photo_folder`, `store`, `stores` and `numbered_store` are made once in each test process. All tests of the process
share these folders, so a test must write only into a copy of a shared folder. `make test` runs three test processes at
the same time, so the time limits of a test must suit a slow machine.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lmdb
import numpy as np
import pytest
from click.testing import CliRunner
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from prep.cli import main
from tests.helpers.torchrun.job import TorchrunServer
from tools.compile_native import FLAGS

CLASSES = ("n00000011", "n00000022", "n00000033")
_TINTS = ((200, 60, 40), (50, 180, 60), (40, 70, 210))
_TRAIN, _VAL = 30, 12
TRAIN_RECORDS, VAL_RECORDS = 37, 23  # numbers of records in the splits train and val of `numbered_store`


def pytest_configure() -> None:
    """Set environment variables that torch, the C library and Triton read.

    OMP_WAIT_POLICY   Idle OpenMP threads of torch sleep, so that other tests can use the cores.
    RES_OPTIONS       The C library waits one second instead of five for an answer of the name server. At each
                      connection, torch's TCPStore asks the name server for the name of 127.0.0.1.
    TRITON_INTERPRET  Without an NVIDIA driver, Triton's interpreter runs the Triton kernels on the CPU.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")


# Folders and files of the tests that start Ray clusters. All these tests run in one test process, one after another.
# Several clusters at the same time would need more memory and cores than a small machine has.
_CLUSTER_TESTS = (
    *("tests/prep/test_cluster.py", "tests/prep/build/test_cluster.py", "tests/pipeline/cli", "tests/pipeline/service"),
    *("tests/train/service", "tests/tools/test_service_demo.py"),
)


_LONG_TESTS = ("tests/train/trainer/test_kill_and_resume.py", "tests/test_wheel.py")  # run after the cluster tests
# Folders and files of the tests that start torchrun. One process runs them, so that torch is loaded once.
_TORCHRUN_TESTS = ("tests/train/replicas", "tests/train/trainer/test_stop_requests.py", "tests/examples")


def _group(test: str) -> str:
    """Return the group of a test: the name of its file, or the name of several files that run in one process."""
    if test.startswith((*_CLUSTER_TESTS, *_LONG_TESTS)):
        return "cluster"
    return "torchrun" if test.startswith(_TORCHRUN_TESTS) else test.partition("::")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests with the marker `soak` (`make soak`) a time limit of one hour instead of five minutes.

    If the tests run in several processes, the two groups whose tests spend most time waiting for other processes begin
    first. The other groups follow, those with most tests first. The test processes then end at about the same time.
    """
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(3600))
    if "PYTEST_XDIST_WORKER" in os.environ:
        counts = Counter(_group(item.nodeid) for item in items)
        first = ("cluster", "torchrun")
        items.sort(key=lambda item: (_group(item.nodeid) not in first, -counts[_group(item.nodeid)]))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run each group of tests in one process, in the order of pytest_collection_modifyitems."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training photographs in 3 class folders, 12 validation photographs in one folder, and the label file val.txt.

    Sides are 60 to 400 px. Some photographs are wider than high, and others are higher than wide. Each split has one
    gray file, one CMYK file, and one PNG file named .JPEG. One training photograph has EXIF orientation 6. Each class
    has its own tint.
    """
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(2012)
    labels = rng.permutation(np.arange(_TRAIN + _VAL) % len(CLASSES)).tolist()
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
    (root / "val").mkdir()
    for count, label in enumerate(labels):
        width, height = (int(n) for n in rng.integers(60, 401, size=2))
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        fine = coarse.resize((width, height), Image.Resampling.BICUBIC)
        picture = Image.blend(fine, Image.new("RGB", (width, height), _TINTS[label]), 0.4)
        path = root / "train" / CLASSES[label] / f"{CLASSES[label]}_{count + 1}.JPEG"
        if count >= _TRAIN:
            path = root / "val" / f"Small_val_{count - _TRAIN + 1:08d}.JPEG"
        _save(picture, path, count)
    lines = [f"Small_val_{number:08d}.JPEG {CLASSES[label]}\n" for number, label in enumerate(labels[_TRAIN:], 1)]
    (root / "val.txt").write_text("".join(lines))
    return root


def _save(picture: Image.Image, path: Path, count: int) -> None:
    if count in (3, 33):
        picture.convert("L").save(path, "JPEG")
    elif count in (7, 37):
        picture.convert("CMYK").save(path, "JPEG")
    elif count in (11, 41):
        picture.save(path, "PNG")
    elif count == 15:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(path, "JPEG", exif=exif)
    else:
        picture.save(path, "JPEG", quality=92)


@pytest.fixture(scope="session")
def store(photo_folder: Path, build: Build) -> Path:
    """A store of the splits train and val of `photo_folder`, built with the default settings: 256 px, JPEG."""
    return build(photo_folder)


Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(source, *options) builds a store of `source` with alexprep, and returns the path of the store."""

    def run(source: Path, *options: str) -> Path:
        path = tmp_path_factory.mktemp("built") / "store"
        command = ["build-lmdb", str(source), "--store", str(path), "--jobs", "1", *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        return path

    return run


@pytest.fixture(scope="session")
def stores(photo_folder: Path, store: Path, build: Build) -> dict[str, Path]:
    """Four stores of `photo_folder`, with JPEG or PPM records. Stores named `…-whole` hold uncropped images."""
    return {
        "jpeg": store,
        "jpeg-whole": build(photo_folder, "--keep-aspect"),
        "ppm": build(photo_folder, "--format", "ppm"),
        "ppm-whole": build(photo_folder, "--format", "ppm", "--keep-aspect"),
    }


@pytest.fixture(scope="session")
def numbered_store(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Path:
    """A store of 37 training and 23 validation images. In each split, every image has its own label: 0, 1, 2, …"""
    source = tmp_path_factory.mktemp("numbered")
    rng = np.random.default_rng(0)
    for split, n in (("train", TRAIN_RECORDS), ("val", VAL_RECORDS)):
        (source / split).mkdir()
        for k in range(n):
            picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(picture).resize((260 + k, 256)).save(source / split / f"{k:03d}.jpg")
    labels = source / "numbers.txt"
    lines = [f"train/{k:03d}.jpg {k}\n" for k in range(TRAIN_RECORDS)]
    labels.write_text("".join(lines + [f"val/{k:03d}.jpg {k}\n" for k in range(VAL_RECORDS)]))
    return build(source, "--labels", str(labels), "--allow-empty-classes")


@pytest.fixture(scope="session")
def caffe_datum() -> Callable[[], Any]:
    """The message class of Caffe's Datum (proto2), made by protobuf from the field numbers of caffe.proto."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="datum.proto", package="caffe", syntax="proto2")
    message = file.message_type.add(name="Datum")
    for name, number, kind, label in (
        ("channels", 1, field.TYPE_INT32, field.LABEL_OPTIONAL),
        ("height", 2, field.TYPE_INT32, field.LABEL_OPTIONAL),
        ("width", 3, field.TYPE_INT32, field.LABEL_OPTIONAL),
        ("data", 4, field.TYPE_BYTES, field.LABEL_OPTIONAL),
        ("label", 5, field.TYPE_INT32, field.LABEL_OPTIONAL),
        ("float_data", 6, field.TYPE_FLOAT, field.LABEL_REPEATED),
        ("encoded", 7, field.TYPE_BOOL, field.LABEL_OPTIONAL),
        ("source", 1001, field.TYPE_BYTES, field.LABEL_OPTIONAL),  # this project added the fields `source` and `crc32`
        ("crc32", 1002, field.TYPE_FIXED32, field.LABEL_OPTIONAL),
    ):
        message.field.add(name=name, number=number, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.Datum"))


@pytest.fixture(scope="session")
def records_of(caffe_datum: Callable[[], Any]) -> Callable[[Path, str], list[tuple[bytes, Any]]]:
    """records_of(store, split) reads a split with lmdb and protobuf, and returns (key, Datum) for each record.

    The records are sorted by shard, then by key.
    """

    def read(store: Path, split: str) -> list[tuple[bytes, Any]]:
        records = []
        for folder in sorted((store / split).glob("[0-9]*")):
            with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as txn:
                for key, value in txn.cursor():
                    datum = caffe_datum()
                    datum.ParseFromString(value)
                    records.append((key, datum))
        return records

    return read


def compile_changed(source: Path, folder: Path, right: str, wrong: str) -> Path:
    """Replace `right` by `wrong` in a copy of a C file and its headers, compile the copy, and return the library.

    `right` must occur once.
    """
    texts = {path.name: path.read_text() for path in (source, *source.parent.glob("*.h"))}
    assert sum(text.count(right) for text in texts.values()) == 1
    for name, text in texts.items():
        (folder / name).write_text(text.replace(right, wrong))
    library, header = folder / "changed.so", folder.parent / "intrinsics.h"
    flags = [*FLAGS, "-O0"]  # without optimization, compiling takes a twentieth of the time
    if "immintrin.h" in texts[source.name] and platform.machine() == "x86_64":
        if not header.exists():  # immintrin.h is compiled once, because this takes as long as the rest
            header.write_text("#include <immintrin.h>\n")
            subprocess.run(["cc", *flags, str(header), "-o", f"{header}.gch"], check=True)
        flags += ["-include", str(header)]
    subprocess.run(["cc", *flags, str(folder / source.name), "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="session")
def c_compiler() -> str:
    """The path of the compiler cc. A test that uses this fixture is skipped if there is no C compiler."""
    path = shutil.which("cc")
    if path is None:
        pytest.skip("no C compiler")
    return path


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchrunServer]:
    """torchrun(*arguments) starts torchrun with real processes, in a fraction of a second, and returns a Job."""
    with TorchrunServer(tmp_path_factory.mktemp("torchrun")) as server:
        yield server


@pytest.fixture
def one_minute_timeout() -> Iterator[None]:
    """A test that uses this fixture fails with TimeoutError after one minute."""

    def fail(signum: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError("the test has not ended within a minute")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
