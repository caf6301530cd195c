"""prep.build.build_from: images that Python code yields give the same store as the files with the same images."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import RecordDataset
from prep.build import build_from, from_python
from prep.console import UserError
from prep.store.manifest import Store
from tests.helpers.building import InlineRunner, Records, decoded, make_pictures
from tests.helpers.building import build as build_folder
from tests.helpers.project import ROOT


class InlinePool(InlineRunner):
    """Replaces WorkerPool, so that the tests build in their own process."""

    def __init__(self, jobs: int, preload: str = "") -> None: ...

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_python, "WorkerPool", InlinePool)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("photos"), 100, (25, 60))


@pytest.fixture(scope="module")
def by_folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return build_folder(photos, tmp_path_factory.mktemp("built") / "store")


def files(photos: Path) -> Iterator[tuple[bytes, str, str]]:
    for path in photos.glob("*/*"):
        yield path.read_bytes(), path.parent.name, f"{path.parent.name}/{path.name}"


def build(items: Any, store: Path, **options: Any) -> Store:
    return build_from(items, store, side=32, format="ppm", **options)


def test_files_and_pixels_give_the_fingerprint_of_class_folders(photos: Path, by_folder: Store, tmp_path: Path) -> None:
    built = build(files(photos), tmp_path / "files")
    assert built.fingerprint == by_folder.fingerprint and built.classes == by_folder.classes
    assert sorted(path.name for path in built.root.iterdir()) == [".lock", "manifest.json", "train"]
    pictures = [(Image.open(io.BytesIO(content)), label, name) for content, label, name in files(photos)]
    assert build(pictures, tmp_path / "pictures").fingerprint == by_folder.fingerprint
    arrays = ((np.asarray(image), label, name.encode()) for image, label, name in pictures)
    assert build(arrays, tmp_path / "arrays").fingerprint == by_folder.fingerprint
    positions = [(image, torch.tensor(by_folder.classes.index(label)), name) for image, label, name in pictures]
    numbered = build(positions, tmp_path / "positions", classes=by_folder.classes)
    assert numbered.fingerprint == by_folder.fingerprint
    assert build(positions, tmp_path / "numbers").classes == ("0", "1", "2")


def test_a_build_is_resumed_and_changed_items_are_noticed(photos: Path, by_folder: Store, tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[bytes, str, str]]:
        yield from list(files(photos))[:50]
        raise KeyboardInterrupt

    store = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        build(interrupted(), store)
    assert list(store.iterdir()) == []
    items = list(files(photos))
    broken = [(b"\xff\xd8\xff", *items[0][1:]), *items[1:]]
    with pytest.raises(UserError, match=items[0][2]):
        build(broken, store)
    assert not (store / ".items-train").exists()
    assert build(items, store).fingerprint == by_folder.fingerprint
    assert build(reversed(items), store).fingerprint == by_folder.fingerprint  # the order of the items does not matter
    with pytest.raises(UserError, match="holds a split train of other inputs"):
        build(items[1:], store)


def test_other_modes_are_decoded_like_files(tmp_path: Path, records_of: Records) -> None:
    color = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    modes = ("L", "P", "CMYK", "1", "LA")
    store = build([(color.convert(mode), 0, mode) for mode in modes], tmp_path / "store")
    stored = {
        datum.source.decode(): np.asarray(Image.open(io.BytesIO(datum.data)))
        for _, datum in records_of(store.root, "train")
    }
    for mode in ("L", "P", "CMYK", "1"):
        assert np.array_equal(stored[mode], np.asarray(color.convert(mode).convert("RGB")))
    assert store.split("train").account["converted"]["grey"] == 3


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((b"x", 0), r"item 0 is a tuple; expected \(image, label, name\)"),
        ((torch.zeros(3, 8, 8), 0, "a"), r"float32 of shape \(3, 8, 8\); expected bytes, a PIL image or pixels"),
        ((b"x", -1, "a"), "label -1; expected the name of a class or a position from 0"),
        ((b"x", 1.5, "a"), "label 1.5; expected the name of a class"),
        ((b"x", 0, ""), "name ''; expected a text that is not empty"),
    ],
)
def test_a_wrong_item_is_named(item: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build([item], tmp_path / "store")


def test_wrong_arguments_and_equal_names_are_refused(tmp_path: Path) -> None:
    jpeg = b"\xff\xd8\xff"
    with pytest.raises(UserError, match="two images have the name a"):
        build([(jpeg, 0, "a"), (jpeg, 0, "a")], tmp_path / "store")
    with pytest.raises(UserError, match="class names in all items, or positions"):
        build([(jpeg, 0, "a"), (jpeg, "cat", "b")], tmp_path / "store")
    with pytest.raises(UserError, match="format='png': expected one of jpeg, ppm"):
        build_from([], tmp_path / "store", format="png")
    with pytest.raises(UserError, match="on_warning='skip': expected one of keep, bad"):
        build_from([], tmp_path / "store", on_warning="skip")
    with pytest.raises(UserError, match="side=8: expected 32 to 4096"):
        build_from([], tmp_path / "store", side=8)


def test_limits_and_background_are_those_of_the_command(tmp_path: Path, records_of: Records) -> None:
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    store = build([(clear, 0, "clear")], tmp_path / "store", background="black")
    ((_, datum),) = records_of(store.root, "train")
    assert not decoded(datum).any() and store.settings.background == "black"
    out = io.BytesIO()
    Image.new("RGB", (80, 40)).save(out, "JPEG")
    with pytest.raises(UserError, match="more than 3,000 pixels"):
        build([(out.getvalue(), 0, "large")], tmp_path / "large", max_pixels=3000)


def test_a_program_without_a_main_guard_works(photos: Path, by_folder: Store, tmp_path: Path) -> None:
    """Worker processes must not run the program again."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, pathlib\nfrom prep.build import build_from\n"
        "print('begun', flush=True)\nroot = pathlib.Path(sys.argv[1])\n"
        "items = [(p.read_bytes(), p.parent.name, f'{p.parent.name}/{p.name}') for p in root.glob('*/*')]\n"
        "print(build_from(items, sys.argv[2], side=32, format='ppm', jobs=1).fingerprint)\n"
    )
    command = [sys.executable, str(program), str(photos), str(tmp_path / "store")]
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert process.stdout.split() == ["begun", by_folder.fingerprint], process.stderr


def test_pil_images_that_cannot_be_used_are_bad_inputs(tmp_path: Path, records_of: Records) -> None:
    """Pillow decodes an opened file only when its pixels are needed, so a program can yield images of damaged files."""

    def opened(image: Image.Image, size_bytes: int = 10**6, **options: Any) -> Image.Image:
        out = io.BytesIO()
        image.save(out, "PNG", **options)
        return Image.open(io.BytesIO(out.getvalue()[:size_bytes]))

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    closed = noise.convert("P")
    closed.close()
    bad = {
        "cut": opened(noise, 3000),
        "cut-palette": opened(noise.convert("P"), 3000),
        "closed": closed,
        "empty": Image.new("L", (0, 5)),
        "levels": Image.new("I", (40, 40), 70_000),
        "floats": noise.convert("F"),
    }
    blue = (0, 0, 255)
    good = {
        "clear": opened(Image.new("RGB", (40, 40), blue), transparency=blue),  # fully transparent, so it becomes white
        "hsv": Image.new("RGB", (40, 40), blue).convert("HSV"),
        "pa": Image.new("RGBA", (40, 40), blue).quantize().convert("PA"),
    }
    items = [(image, 0, name) for name, image in {**bad, **good}.items()]
    with pytest.raises(
        UserError, match=r"6 inputs of 9 are not images.*closed: cannot be decoded: Operation on closed"
    ):
        build(items, tmp_path / "store")
    store = build(items, tmp_path / "store", on_bad="skip")
    assert store.split("train").account["kept"] == len(good)
    colors = {datum.source.decode(): decoded(datum)[9, 9].tolist() for _, datum in records_of(store.root, "train")}
    assert colors == {"clear": [255, 255, 255], "hsv": [0, 0, 255], "pa": [0, 0, 255]}


def test_class_names_are_checked(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(UserError, match="classes: x occurs twice"):
        build([(pixels, 0, "a")], tmp_path / "store", classes=["x", "x"])
    with pytest.raises(UserError, match=r"1 of the labels \(q\) is not among the 2 class names \(x, y\)"):
        build([(pixels, "x", "a"), (pixels, "q", "b")], tmp_path / "store", classes=["x", "y"])
    store = build([(pixels, "d\udcff", "n\ud800")], tmp_path / "store")
    assert store.classes == ("d\\udcff",)


def test_extra_values_of_items(tmp_path: Path) -> None:
    """The store has its own record order, so the test finds the item of a record by its name."""
    rng, pixels = np.random.default_rng(0), np.zeros((40, 40, 3), np.uint8)
    names = [f"{number}.jpg" for number in rng.permutation(80)]
    values: list[dict[str, Any]] = [
        {"age": np.int32(k), "weight": k / 3, "box": torch.arange(3) + k / 2, "caption": f"é{k}"} for k in range(80)
    ]
    items = [(pixels, 0, name, value) for name, value in zip(names, values, strict=True)]
    store = build(items, tmp_path / "store")
    with RecordDataset(store) as dataset:
        for record in dataset:
            value = values[names.index(record.source)]
            assert record.extra["age"] == value["age"] and record.extra["caption"] == value["caption"]
            assert record.extra["weight"] == np.float32(value["weight"])
            assert np.array_equal(record.extra["box"], value["box"])
    assert build(items[::-1], tmp_path / "store").fingerprint == store.fingerprint
    assert build([item[:3] for item in items], tmp_path / "plain").fingerprint != store.fingerprint


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"age": 1}, {}, "item 1: the extra fields none; expected age, as in item 0"),
        ({"age": 1}, {"age": 2.5}, "item 1: extra age is 2.5; expected a whole number within int64"),
        ({"age": 2**63}, {}, "item 0: extra age is 9223372036854775808; expected a whole number"),
        ({"age": True}, {}, "item 0: extra age is True"),
        ({"w": 0.5}, {"w": float("nan")}, "item 1: extra w is nan; expected a finite number within float32"),
        ({"w": 0.5}, {"w": 1e39}, "item 1: extra w is 1e"),
        ({"box": [1, 2]}, {"box": [1, 2, 3]}, r"item 1: extra box is \[1, 2, 3\]; expected finite .*, 2 of them"),
        ({"text": "a"}, {"text": b"b"}, "item 1: extra text is b'b'; expected a text"),
        ({"text": "\ud800"}, {}, "item 0: extra text is .* UTF-8"),
        ({"a-b": 1}, {}, "item 0: extra field 'a-b': expected an identifier"),
        ({"path": 1}, {}, "another meaning"),
        ([1], {}, "item 0: extra is a list"),
    ],
)
def test_wrong_extra_values_are_refused(tmp_path: Path, first: Any, second: Any, message: str) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(UserError, match=message) as error:
        build([(pixels, 0, "a", first), (pixels, 0, "b", second)], tmp_path / "store")
    assert len(str(error.value).splitlines()) == 1
