"""prep.inputs.caffe reads LMDBs that the tests write with lmdb and protobuf, as Caffe's convert_imageset writes them.

The tests read the new stores with lmdb and protobuf, and decode the images with Pillow. Caffe can store an image file
or bare pixels. Bare pixels of the store's size must be unchanged in a store of PPM records.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.cli import main
from prep.images.codec import decode_image
from prep.images.rescale import rescale
from prep.store.manifest import Store
from tests.helpers.building import InlineRunner

Pixels = npt.NDArray[np.uint8]
Records = Callable[[Path, str], list[tuple[bytes, Any]]]
SIDE = 32


@pytest.fixture
def processes() -> None:
    """A test that needs real worker processes requests this fixture."""


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tasks in the process of the test, because a worker process takes half a second to start."""
    if "processes" not in request.fixturenames:
        monkeypatch.setattr("prep.workers.WorkerPool", lambda jobs, preload="": nullcontext(InlineRunner()))


def import_caffe(store: Path, *words: object) -> Result:
    options = ["--store", str(store), "--side", str(SIDE), "--jobs", "1"]
    return CliRunner().invoke(main, ["import-caffe", *map(str, words), *options])


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(result: Result, *parts: object) -> str:
    """Assert that the command has exit code 1 and prints one line, which begins with "Error:" and has all `parts`."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.stderr.splitlines() if line]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("Error: ")
    for part in parts:
        assert str(part) in errors[0]
    return errors[0]


def lmdb_of(folder: Path, records: Iterable[tuple[bytes, bytes]]) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 26) as env, env.begin(write=True) as txn:
        for key, value in records:
            txn.put(key, value)
    return folder


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jpeg(seed: int = 0, height: int = 40, width: int = 50) -> bytes:
    out = io.BytesIO()
    Image.fromarray(noise(height, width, seed)).save(out, "JPEG", quality=95)
    return out.getvalue()


def bare(pixels: Pixels) -> dict[str, Any]:
    """Return the fields of a Datum with bare pixels, as Caffe's CVMatToDatum fills them: layout C,H,W, blue first."""
    height, width, channels = pixels.shape
    planes = [pixels[:, :, channel].tobytes() for channel in reversed(range(channels))]
    return {"channels": channels, "height": height, "width": width, "data": b"".join(planes), "encoded": False}


@pytest.fixture
def datum(caffe_datum: Callable[[], Any]) -> Callable[..., bytes]:
    def make(**fields: Any) -> bytes:
        message = caffe_datum()
        for name, value in fields.items():
            if name == "float_data":
                message.float_data.extend(value)
            else:
                setattr(message, name, value)
        return bytes(message.SerializeToString())

    return make


def decoded(message: Any) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(message.data)))


def by_source(records: Sequence[tuple[bytes, Any]]) -> dict[bytes, Any]:
    assert [key for key, _ in records] == sorted({key for key, _ in records})
    found = {message.source: message for _, message in records}
    assert len(found) == len(records)
    return found


def test_bare_pixels_are_stored_unchanged(datum: Callable[..., bytes], records_of: Records, tmp_path: Path) -> None:
    """The records are colour and grey images with labels 0 to 2. One image is cropped, and another is rescaled."""
    colour, wide, large = noise(SIDE, SIDE), noise(SIDE, 45, 1), noise(80, 64, 2)
    grey = noise(SIDE, SIDE, 3)[:, :, :1]
    records = [
        (b"00000000_colour.JPEG", datum(**bare(colour), label=2)),
        (b"00000001_wide.JPEG", datum(**bare(wide), label=0)),
        (b"00000002_large.JPEG", datum(**bare(large), label=1)),
        (b"00000003_grey.JPEG", datum(**bare(grey), label=0)),
        (b"00000004_no_encoded_field", datum(**{**bare(colour[::-1]), "label": 1})),
    ]
    done(import_caffe(tmp_path / "store", lmdb_of(tmp_path / "l", records), "--format", "ppm"))
    found = by_source(records_of(tmp_path / "store", "train"))
    assert {name: message.label for name, message in found.items()} == {
        b"00000000_colour.JPEG": 2,
        b"00000001_wide.JPEG": 0,
        b"00000002_large.JPEG": 1,
        b"00000003_grey.JPEG": 0,
        b"00000004_no_encoded_field": 1,
    }
    assert np.array_equal(decoded(found[b"00000000_colour.JPEG"]), colour)
    assert np.array_equal(decoded(found[b"00000001_wide.JPEG"]), wide[:, 6 : 6 + SIDE])
    assert np.array_equal(decoded(found[b"00000002_large.JPEG"]), rescale(large, SIDE, False, "area"))
    assert np.array_equal(decoded(found[b"00000003_grey.JPEG"]), np.repeat(grey, 3, axis=2))
    assert np.array_equal(decoded(found[b"00000004_no_encoded_field"]), colour[::-1])
    for message in found.values():
        assert (message.channels, message.height, message.width, message.encoded) == (3, SIDE, SIDE, True)
    assert Store.open(tmp_path / "store").split("train").account["bad"] == {}


def test_encoded_images_of_any_format_are_decoded(
    datum: Callable[..., bytes], records_of: Records, tmp_path: Path
) -> None:
    """The size of the image comes from the image file. The size in the Datum is ignored."""
    files = {b"00000000_a": jpeg(), b"00000001_b": jpeg(1, 64, 90)}
    out = io.BytesIO()
    Image.fromarray(noise(50, 40, 7)).save(out, "PNG")
    files[b"00000002_c"] = out.getvalue()
    sizes = ({}, {"channels": 3, "height": 64, "width": 90}, {"channels": 1, "height": 7, "width": 10**6})
    records = [
        (key, datum(data=content, encoded=True, label=k, **size))
        for k, ((key, content), size) in enumerate(zip(files.items(), sizes, strict=True))
    ]
    done(import_caffe(tmp_path / "store", lmdb_of(tmp_path / "l", records), "--format", "ppm"))
    found = by_source(records_of(tmp_path / "store", "train"))
    for label, (key, content) in enumerate(files.items()):
        assert found[key].label == label
        expected = rescale(decode_image(content).pixels, SIDE, False, "area")
        assert np.array_equal(decoded(found[key]), expected)
    assert Store.open(tmp_path / "store").split("train").account["converted"] == {"png": 1}


def test_the_same_images_as_files_give_the_same_records(
    photo_folder: Path, datum: Callable[..., bytes], records_of: Records, tmp_path: Path
) -> None:
    """A store from Caffe's LMDB and a store from files have equal colour moments and classes.

    In the first store, the source of a record is its key in Caffe's LMDB. In the second store, the source is the path
    of the file.
    """
    paths = sorted((photo_folder / "train").glob("*/*"))
    classes = sorted({path.parent.name for path in paths})
    records = [
        (
            b"%08d_%s/%s" % (number, path.parent.name.encode(), path.name.encode()),
            datum(data=path.read_bytes(), encoded=True, label=classes.index(path.parent.name)),
        )
        for number, path in enumerate(paths)
    ]
    done(import_caffe(tmp_path / "caffe", lmdb_of(tmp_path / "l", records)))
    words = ["build-lmdb", str(photo_folder / "train"), "--store", str(tmp_path / "files"), "--side", str(SIDE)]
    done(CliRunner().invoke(main, [*words, "--jobs", "1"]))
    stores = [Store.open(tmp_path / name) for name in ("caffe", "files")]
    assert stores[0].classes == stores[1].classes == tuple(classes)
    assert stores[0].split("train").moments == stores[1].split("train").moments
    assert stores[0].split("train").label_counts == stores[1].split("train").label_counts
    caffe, files = (by_source(records_of(store.root, "train")) for store in stores)
    assert {key[9:]: (message.data, message.label) for key, message in caffe.items()} == {
        key: (message.data, message.label) for key, message in files.items()
    }


def odd_records(datum: Callable[..., bytes]) -> dict[bytes, tuple[bytes, str]]:
    """Return {key: (value, reason why the record is left out)}."""
    good = {"data": jpeg(), "encoded": True}
    label = "not a Datum with a label"
    return {
        b"10_negative_label": (datum(**good, label=-1), "label -1, expected 0 to 2,147,483,647"),
        b"11_no_label": (datum(**good), label),
        b"12_floats": (datum(float_data=[0.5] * 27, channels=3, height=3, width=3, label=0), "without 8-bit data"),
        b"13_noise": (b"\xff" * 40, label),
        b"14_empty": (b"", label),
        b"15_text": (b"hello, this is no Datum", label),
        b"16_cut": (datum(**good, label=0)[:300], label),
        b"17_cut_picture": (datum(data=jpeg()[:400], encoded=True, label=0), "cannot be decoded"),
        b"18_text_as_picture": (datum(data=b"hello", encoded=True, label=0), "not an image"),
        b"19_no_data": (datum(data=b"", encoded=True, label=0), "without 8-bit data"),
        b"20_bare_too_short": (datum(**{**bare(noise(9, 9)), "height": 10, "label": 0}), "243 bytes for 3 channels"),
        b"21_two_channels": (datum(**bare(noise(9, 9)[:, :, :2]), label=0), "2 channels"),
        b"22_bare_without_size": (datum(data=b"abc", label=0), "3 bytes for 0 channels"),
        b"23_negative_size": (datum(data=b"abc", channels=3, height=-1, width=-1, label=0), "3 bytes for 3 channels"),
        b"24_huge_size": (datum(data=b"abc", channels=3, height=2**31 - 1, width=2**31 - 1, label=0), "3 bytes for 3"),
        b"25_encoded_not_said": (datum(data=jpeg(), channels=3, height=40, width=50, label=0), "3 channels of 40×50"),
    }


def test_records_that_cannot_be_used_are_counted_and_named(
    datum: Callable[..., bytes], records_of: Records, tmp_path: Path
) -> None:
    odd = odd_records(datum)
    good = {b"00_good": datum(data=jpeg(), encoded=True, label=0), b"99_good": datum(**bare(noise(40, 40)), label=1)}
    folder = lmdb_of(tmp_path / "l", [*good.items(), *[(key, value) for key, (value, _) in odd.items()]])
    answer = json.loads(done(import_caffe(tmp_path / "store", folder, "--on-bad", "skip", "--json")))
    assert (answer["records"], answer["skipped"]) == (2, len(odd))
    assert set(by_source(records_of(tmp_path / "store", "train"))) == set(good)
    outcomes = [json.loads(line) for line in (tmp_path / "store" / "train" / "inputs.jsonl").read_text().splitlines()]
    outcomes.sort(key=lambda outcome: outcome["source"])
    assert [outcome["source"].encode() for outcome in outcomes] == list(odd)
    for outcome, (_, reason) in zip(outcomes, odd.values(), strict=True):
        assert outcome["fate"] == "bad"
        assert reason in outcome["why"], outcome
    account = Store.open(tmp_path / "store").split("train").account
    assert (account["inputs"], account["kept"]) == (2 + len(odd), 2)
    assert sum(account["bad"].values()) == len(odd)


@pytest.mark.parametrize("key", [b"10_negative_label", b"17_cut_picture", b"22_bare_without_size"])
def test_a_record_that_cannot_be_used_stops_a_strict_import(
    key: bytes, datum: Callable[..., bytes], tmp_path: Path
) -> None:
    value, reason = odd_records(datum)[key]
    good = datum(data=jpeg(), encoded=True, label=0)
    folder = lmdb_of(tmp_path / "l", [(b"00_good", good), (key, value)])
    fails(import_caffe(tmp_path / "store", folder), key.decode(), reason, "--on-bad skip")
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_an_lmdb_without_a_usable_record_is_refused(datum: Callable[..., bytes], tmp_path: Path) -> None:
    folder = lmdb_of(tmp_path / "l", [(b"a", b"\xff"), (b"b", datum(data=jpeg(), encoded=True, label=-1))])
    fails(import_caffe(tmp_path / "s", folder, "--on-bad", "skip"), folder, "2 records", "not one")
    fails(import_caffe(tmp_path / "s", lmdb_of(tmp_path / "e", [])), tmp_path / "e", "0 records")
    assert not (tmp_path / "s" / "manifest.json").exists()


def labelled(datum: Callable[..., bytes], *names: tuple[str, int]) -> list[tuple[bytes, bytes]]:
    return [
        (f"{number:08d}_{name}".encode(), datum(data=jpeg(number), encoded=True, label=label))
        for number, (name, label) in enumerate(names)
    ]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ((("n2/a.JPEG", 1), ("n1/b.JPEG", 0), ("n2/c.JPEG", 1)), ("n1", "n2")),
        ((("n1/a.JPEG", 1), ("n2/b.JPEG", 0)), ("n2", "n1")),  # the labels are not in the order of the names
        ((("train/n1/a.JPEG", 0), ("train/n2/b.JPEG", 1)), ("n1", "n2")),
        ((("a.JPEG", 2), ("b.JPEG", 0)), ("0", "1", "2")),
        ((("n1/a.JPEG", 0), ("n2/b.JPEG", 0)), ("0",)),  # one label has two folders
        ((("n1/a.JPEG", 0), ("n1/b.JPEG", 1)), ("0", "1")),  # one folder has two labels
        ((("n1/a.JPEG", 0), ("n3/b.JPEG", 2)), ("0", "1", "2")),  # no record has label 1
    ],
)
def test_classes_are_named_by_the_folders_in_the_keys_or_numbered(
    names: tuple[tuple[str, int], ...], classes: tuple[str, ...], datum: Callable[..., bytes], tmp_path: Path
) -> None:
    folder = lmdb_of(tmp_path / "l", labelled(datum, *names))
    if len({label for _, label in names}) < len(classes):
        fails(import_caffe(tmp_path / "store", folder), "1 class without a record: 1", "--allow-empty-classes")
    done(import_caffe(tmp_path / "store", folder, "--allow-empty-classes"))
    store = Store.open(tmp_path / "store")
    assert store.classes == classes
    counts = [sum(label == k for _, label in names) for k in range(len(classes))]
    assert list(store.split("train").label_counts) == counts


def test_classes_are_named_by_a_file(datum: Callable[..., bytes], tmp_path: Path) -> None:
    folder = lmdb_of(tmp_path / "l", labelled(datum, ("n9/a.JPEG", 0), ("n8/b.JPEG", 2)))
    words = tmp_path / "synset_words.txt"
    words.write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish\n\nn01484850 great white shark\nn01491361 tiger\n"
    )
    done(import_caffe(tmp_path / "store", folder, "--classes", words, "--allow-empty-classes"))
    store = Store.open(tmp_path / "store")
    assert store.classes == ("n01440764", "n01443537", "n01484850", "n01491361")
    assert store.split("train").label_counts == (1, 0, 1, 0)
    val = lmdb_of(tmp_path / "v", labelled(datum, ("x.JPEG", 3)))  # the second split does not need --classes
    done(import_caffe(tmp_path / "store", val, "--split", "val", "--allow-empty-classes"))
    assert Store.open(tmp_path / "store").split("val").label_counts == (0, 0, 0, 1)
    beyond = lmdb_of(tmp_path / "b", labelled(datum, ("x.JPEG", 4)))
    shutil.rmtree(tmp_path / "store" / "val")
    fails(import_caffe(tmp_path / "other", beyond, "--classes", words), beyond, "label 4", "4 classes")


def test_classes_in_another_order_than_in_the_store_are_refused(datum: Callable[..., bytes], tmp_path: Path) -> None:
    store = tmp_path / "store"
    done(import_caffe(store, lmdb_of(tmp_path / "l", labelled(datum, ("n1/a.JPEG", 0), ("n2/b.JPEG", 1)))))
    swapped = lmdb_of(tmp_path / "v", labelled(datum, ("n2/a.JPEG", 0), ("n1/b.JPEG", 1)))
    fails(import_caffe(store, swapped, "--split", "val"), "label 0 has the folder n2", "in the store", "label 1")
    words = tmp_path / "words.txt"
    words.write_text("n2\nn1\n")
    plain = lmdb_of(tmp_path / "p", labelled(datum, ("a.JPEG", 0), ("b.JPEG", 1)))
    fails(import_caffe(store, plain, "--split", "val", "--classes", words), "n2", "n1", "label 0")
    assert Store.open(store).classes == ("n1", "n2")


def test_class_names_that_do_not_fit_are_refused(datum: Callable[..., bytes], tmp_path: Path) -> None:
    folder = lmdb_of(tmp_path / "l", labelled(datum, ("a.JPEG", 0), ("b.JPEG", 2)))
    words = tmp_path / "words.txt"
    words.write_text("x\ny\n")
    fails(import_caffe(tmp_path / "s", folder, "--classes", words), folder, "label 2", "2 classes")
    words.write_text("x\ny\nx\n")
    fails(import_caffe(tmp_path / "s", folder, "--classes", words), words, "twice")
    fails(import_caffe(tmp_path / "s", folder, "--classes", tmp_path / "no.txt"), "no.txt", "No such file")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("label", [2**31 - 1, 10**9])
def test_an_absurd_label_is_a_one_line_error(label: int, datum: Callable[..., bytes], tmp_path: Path) -> None:
    """The command must not make a list of class names for the labels 0 to `label`, which would take all memory."""
    folder = lmdb_of(tmp_path / "l", labelled(datum, ("a.JPEG", 0), ("b.JPEG", label)))
    fails(import_caffe(tmp_path / "s", folder), folder)


def test_several_lmdbs_make_one_split(datum: Callable[..., bytes], records_of: Records, tmp_path: Path) -> None:
    """Two LMDBs may have the same keys. This is usual if the parts of a data set were converted separately."""
    pictures = [noise(SIDE, SIDE, seed) for seed in range(4)]
    parts = [
        lmdb_of(
            tmp_path / "p0",
            [(b"0_a", datum(**bare(pictures[0]), label=0)), (b"1_b", datum(**bare(pictures[1]), label=1))],
        ),
        lmdb_of(
            tmp_path / "p1",
            [(b"0_a", datum(**bare(pictures[2]), label=2)), (b"1_c", datum(**bare(pictures[3]), label=1))],
        ),
    ]
    done(import_caffe(tmp_path / "store", *parts, "--format", "ppm"))
    found = [(m.source, m.label, decoded(m).tobytes()) for _, m in records_of(tmp_path / "store", "train")]
    expected = zip((b"0_a", b"1_b", b"0_a", b"1_c"), (0, 1, 2, 1), [p.tobytes() for p in pictures], strict=True)
    assert sorted(found) == sorted(expected)
    assert "is named twice" in fails(import_caffe(tmp_path / "twice", *parts, parts[1]), parts[1])


@pytest.mark.usefixtures("processes")
def test_an_import_is_the_same_for_any_number_of_jobs_and_when_repeated(
    datum: Callable[..., bytes], tmp_path: Path
) -> None:
    records = labelled(datum, *[(f"n{k % 3}/{k}.JPEG", k % 3) for k in range(150)])
    folder = lmdb_of(tmp_path / "l", records)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done(import_caffe(tmp_path / "one", folder))
    options = ["--store", str(tmp_path / "two"), "--side", str(SIDE), "--jobs", "2"]
    done(CliRunner().invoke(main, ["import-caffe", str(folder), *options]))
    assert Store.open(tmp_path / "one").fingerprint == Store.open(tmp_path / "two").fingerprint
    assert "nothing to do" in done(import_caffe(tmp_path / "one", folder))
    # The imports have not written into the LMDB.
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.usefixtures("processes")
def test_a_folder_or_file_that_is_not_an_lmdb_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x" * 9000)
    for name, content in (("noise", np.random.default_rng(0).bytes(20_000)), ("zeros", bytes(20_000)), ("empty", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(content)
    for name in ("nowhere", "folder", "file", "noise", "zeros", "empty"):
        before = sorted(os.listdir(tmp_path))
        line = fails(import_caffe(tmp_path / "store", tmp_path / name, "--on-bad", "skip"), tmp_path / name)
        assert "Build the store again" not in line  # this advice is only for stores, not for Caffe's LMDBs
        assert line.count(str(tmp_path / name)) == 1
        assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "folder") == []


@pytest.mark.usefixtures("processes")
def test_a_damaged_lmdb_is_a_one_line_error_or_a_complete_store(datum: Callable[..., bytes], tmp_path: Path) -> None:
    """A worker that reads a truncated LMDB, or pages of noise, may crash, but the command must not crash."""
    folder = lmdb_of(tmp_path / "whole", labelled(datum, *[(f"n{k % 2}/{k}.JPEG", k % 2) for k in range(60)]))
    content = (folder / "data.mdb").read_bytes()
    damaged = [content[: int(len(content) * share)] for share in (0.02, 0.5, 0.999)]
    cuts = len(damaged)
    rng = np.random.default_rng(2)
    for count in (1, 2, 40):
        overwritten = bytearray(content)
        for page in rng.integers(2, len(content) // 4096, count):
            overwritten[page * 4096 : page * 4096 + 64] = rng.bytes(64)
        damaged.append(bytes(overwritten))
    for number, part in enumerate(damaged):
        path = tmp_path / f"damaged{number}"
        path.mkdir()
        (path / "data.mdb").write_bytes(part)
        result = import_caffe(tmp_path / f"store{number}", path, "--on-bad", "skip", "--json")
        if number < cuts or result.exit_code:
            fails(result, path)
            assert not (tmp_path / f"store{number}" / "manifest.json").exists()
        else:  # a record that cannot be read counts as skipped
            answer = json.loads(result.stdout)
            assert answer["records"] + answer["skipped"] == 60


def test_wrong_usage_has_exit_code_2(tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["import-caffe", "--store", str(tmp_path)]).exit_code == 2
    assert import_caffe(tmp_path / "s", tmp_path, "--split", "test").exit_code == 2
    help_text = done(CliRunner().invoke(main, ["import-caffe", "--help"]))
    assert "convert_imageset" in help_text


def test_labels_that_count_from_1_are_refused(datum: Callable[..., bytes], tmp_path: Path) -> None:
    folder = lmdb_of(tmp_path / "l", labelled(datum, ("n1/a.JPEG", 1), ("n2/b.JPEG", 2)))
    fails(import_caffe(tmp_path / "store", folder), "1 class without a record: 0", "does the LMDB count from 1?")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["n1/c.JPEG", "n3/c.JPEG"])
def test_a_single_key_of_another_class_is_refused(name: str, datum: Callable[..., bytes], tmp_path: Path) -> None:
    store = tmp_path / "store"
    done(import_caffe(store, lmdb_of(tmp_path / "l", labelled(datum, ("n1/a.JPEG", 0), ("n2/b.JPEG", 1)))))
    val = lmdb_of(tmp_path / "v", labelled(datum, ("n1/a.JPEG", 0), ("n2/b.JPEG", 1), (name, 1)))
    fails(import_caffe(store, val, "--split", "val"), f"label 1 has the folder {name[:2]}", "in the store")
