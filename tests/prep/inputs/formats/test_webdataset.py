"""prep.inputs.formats.webdataset: samples without image or label, equal keys, names of splits, damaged shards."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset

from prep.console import UserError
from prep.inputs.reader import ListOptions
from prep.inputs.sources import find_splits, list_source
from tests.helpers.listings import paths_and_labels
from tests.prep.inputs.formats.sample_data import put

JPEG = b"\xff\xd8\xff"


def shard(path: Path, *samples: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def sample(key: str, **members: Any) -> dict[str, Any]:
    return {"__key__": key, "jpg": JPEG, **members}


def test_samples_without_image_or_label_are_refused(tmp_path: Path) -> None:
    no_image = {"__key__": "c", "cls": 0}
    other_image = {"__key__": "d", "seg.png": JPEG, "cls": 0}
    path = shard(tmp_path / "x.tar", sample("a", cls=0), sample("b", txt="a caption"), no_image, other_image)
    source = list_source(path, "train", ListOptions(allow_empty_classes=True))
    assert paths_and_labels(source) == [(b"0/a.jpg", 0)]
    assert source.refused == (
        ("x.tar/c", "a sample without an image"),
        ("x.tar/d", "a sample without an image"),
        ("b.jpg", "no label"),
    )
    captions = shard(tmp_path / "y.tar", sample("b", txt="a caption"))
    with pytest.raises(UserError, match=r"no image with a label \(first: b\.jpg: no label\)"):
        list_source(find_splits(captions, None, "webdataset")["train"], "train")


@pytest.mark.parametrize(
    ("content", "label"),
    [({"label": 1}, 1), ({"cls": "1", "x": 0}, 1), (1, 1), ({"x": 1}, None), ({"label": 1.5}, None), ([1], None)],
)
def test_labels_in_json(content: Any, label: int | None, tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", sample("a", json={"label": 0}), sample("b", json=content))
    source = list_source(path, "train", ListOptions(allow_empty_classes=True))
    assert [item.label for item in source.inputs] == ([0] if label is None else [0, label])


def test_equal_keys_get_the_names_of_their_shards(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / "s" / f"part-{number}.tar", sample("000", cls=0), sample("001", cls=1))
    source = list_source(tmp_path / "s", "train")
    names = [b"part-0/000.jpg", b"part-0/001.jpg", b"part-1/000.jpg", b"part-1/001.jpg"]
    assert [item.path for item in source.inputs] == names


def test_names_of_shards_name_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("imagenet1k-train-0000", "imagenet1k-train-0001", "imagenet1k-validation-00", "imagenet1k-test-00"):
        shard(tmp_path / f"{name}.tar", sample(f"{name}/a", cls=0))
    found = find_splits(tmp_path, None)
    assert {name: len(where.files) for name, where in found.items()} == {"train": 2, "val": 1}
    assert "left out 1 file outside train and val (first: imagenet1k-test-00.tar)" in capsys.readouterr().err
    put(tmp_path / "README.md", b"x")
    put(tmp_path / "info" / "x.json", b"{}")
    assert list_source(found["train"], "train").ignored == (
        ("README.md", "a file beside the .tar files"),
        ("info", "a folder beside the .tar files"),
    )
    (only,) = find_splits(tmp_path / "imagenet1k-validation-00.tar", None)
    assert only == "val"


def test_positions_without_a_name_are_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", sample("a", cls=0), sample("b", cls=2))
    put(tmp_path / "classes.txt", b"cat\ndog\n")
    with pytest.raises(UserError, match=r"number 2, but .*classes\.txt has 2 classes, numbers 0 to 1"):
        list_source(path, "train", ListOptions(class_file=tmp_path / "classes.txt"))
    with pytest.raises(UserError, match="no photograph: 1"):  # no sample has label 1, so class 1 has no photograph
        list_source(path, "train")


def test_a_compressed_or_damaged_shard_is_an_error(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", sample("a", cls=0), sample("b", cls=1))
    content = path.read_bytes()
    path.write_bytes(content[:1700])
    with pytest.raises(UserError, match=r"x\.tar is not a tar archive, or is damaged"):
        list_source(find_splits(path, None, "webdataset")["train"], "train")
    path.write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=r"is compressed, so its members cannot be read directly"):
        list_source(path, "train")


def test_positions_that_can_be_names_of_the_stores_classes_are_asked_for(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", sample("a", cls=1), sample("b", cls=2))
    options = ListOptions(allow_empty_classes=True)
    with pytest.raises(UserError, match=r"unclear what the numbers mean.*--label-order name.*sorted-from-0"):
        list_source(path, "val", options, ("1", "2", "3"))
    for order, expected in (("name", [0, 1]), ("sorted-from-0", [1, 2])):
        source = list_source(path, "val", replace(options, label_order=order), ("1", "2", "3"))
        assert [label for _, label in paths_and_labels(source)] == expected


@pytest.mark.parametrize("label", ["-1", "1.0", "nan", "cat"])
def test_labels_that_are_no_positions_are_refused(label: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", sample("a", cls=0), sample("b", json={"label": label}))
    with pytest.raises(UserError, match=f"label {label}"):
        list_source(path, "train")


def raw_shard(path: Path, *members: tuple[str, bytes]) -> Path:
    """Return a shard that TarWriter would not write."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_samples_with_the_same_key_behind_one_another_are_refused(tmp_path: Path) -> None:
    twice = [("a.jpg", JPEG), ("a.cls", b"0"), ("a.jpg", JPEG), ("a.cls", b"1")]
    others = [("b.jpg", JPEG), ("b.cls", b"1"), ("c.jpg", JPEG), ("c.png", JPEG), ("c.cls", b"0")]
    source = list_source(raw_shard(tmp_path / "x.tar", *twice, *others), "train")
    assert paths_and_labels(source) == [(b"1/b.jpg", 1), (b"0/c.jpg", 0)]
    assert source.refused == (("x.tar/a", "two members .jpg with the same key"),)
    assert source.ignored == (("x.tar/c.png", "a further image of a sample; the first is .jpg"),)


def test_a_class_whose_samples_have_no_image_keeps_its_place(tmp_path: Path) -> None:
    path = shard(tmp_path / "x.tar", sample("a", cls="ant"), {"__key__": "b", "cls": "bee"}, sample("c", cls="cat"))
    with pytest.raises(UserError, match=r"no photograph: bee\. .* x\.tar/b: a sample without an image"):
        list_source(path, "train")
    source = list_source(path, "train", ListOptions(allow_empty_classes=True))
    assert paths_and_labels(source) == [(b"ant/a.jpg", 0), (b"cat/c.jpg", 2)]


def test_pickled_labels_are_refused(tmp_path: Path) -> None:
    members = [("b.jpg", JPEG), ("b.cls", b"\x80\x04K\x01."), ("c.jpg", JPEG)]
    path = raw_shard(tmp_path / "x.tar", *members, ("c.cls", b"0"))
    with pytest.raises(UserError, match=r"1 image without a label \(b\.jpg\), so a class may be missing"):
        list_source(path, "train")
    source = list_source(path, "train", ListOptions(allow_empty_classes=True))
    assert paths_and_labels(source) == [(b"0/c.jpg", 0)]
    assert source.refused == (("b.jpg", "no label"),)


def test_a_shard_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", sample("a", cls=0))
    packed, broken = tmp_path / "1.tar.gz", tmp_path / "2.tar"
    packed.write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(UserError, match=r"1\.tar\.gz: compressed"):
        list_source(tmp_path, "train")
    packed.unlink()
    broken.symlink_to(tmp_path / "missing")
    with pytest.raises(UserError, match=r"2\.tar: a link to a \.tar file that does not exist"):
        list_source(tmp_path, "train")
