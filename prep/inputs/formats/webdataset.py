"""WebDataset: tar files whose members KEY.EXTENSION form samples, such as `1.jpg` with `1.cls` or `1.json`.

A sample is a sequence of consecutive members with the same key. The key of a member is its name up to the first dot
after the last slash: the key of a/b.seg.png is a/b. The library webdataset has the same rule (tariterators.py,
base_plus_ext). The label of a sample is the content of KEY.cls, or a field of KEY.json. Images are read directly from
the tar files, as byte ranges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from prep.console import UserError, progress
from prep.inputs.archive import checked_member_name
from prep.inputs.classes import has_image_name
from prep.inputs.formats.labelled import LabelledRows, duplicate_path
from prep.inputs.formats.shards import ShardReader, pack_location, root_and_files, unpack_location
from prep.inputs.listing import Listing
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs, ListOptions
from prep.inputs.tar_members import BoundedFile, iterate_members

_KEY = re.compile(rb"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_LABEL_MEMBERS = (b"cls", b"json")
_JSON_KEYS = ("label", "cls", "class", "target", "class_id", "class_index", "synset", "wnid", "class_name")
_MAX_LABEL_BYTES = 1 << 20
_PEEKED_MEMBERS = 32


class _Member:
    """A member of a sample: its key, extension, size and offset in the tar, and the bytes of KEY.cls or KEY.json.

    `kind` is the extension in lower case. `text` is b"" for members without a label.
    """

    def __init__(self, name: bytes, size: int, offset: int, text: bytes) -> None:
        match = _KEY.fullmatch(name)
        self.key, self.extension = (match[1], match[2]) if match else (name, b"")
        self.kind = self.extension.lower()
        self.size, self.offset, self.text = size, offset, text

    @property
    def is_image(self) -> bool:
        """Return whether this member is the main image of its sample.

        A member with the extension `seg.png`, for example, is another image of the sample, not the main image.
        """
        return b"." not in self.kind and has_image_name(b"x." + self.kind)


def is_webdataset(path: Path) -> bool:
    """Return whether an image and a label with the same key are among the first _PEEKED_MEMBERS members of a tar.

    Returns False if the file is not a tar.
    """
    keys: dict[bytes, set[bool]] = {}
    try:
        for member, _ in zip(_members(path, [], keep_text=False), range(_PEEKED_MEMBERS), strict=False):
            if member.kind in _LABEL_MEMBERS or member.is_image:
                keys.setdefault(member.key, set()).add(member.kind in _LABEL_MEMBERS)
    except UserError:
        return False
    return any(len(kinds) == 2 for kinds in keys.values())


def list_webdataset(
    files: Sequence[Path], split: str, options: ListOptions, store_classes: Sequence[str]
) -> tuple[ShardReader, FoundInputs]:
    """List the samples of WebDataset shards. The name of an input is KEY.EXTENSION.

    If two samples have the same key, the name of the shard is put before the key of every sample. Raises UserError if a
    shard is damaged, or if no sample has an image and a label.
    """
    root, names = root_and_files(files)
    rows, samples = LabelledRows(str(root)), Listing()
    labels: list[str] = []
    with progress(f"{split}: listing", len(files), "shards") as listing_progress:
        for index, path in enumerate(files):
            mtime_ns = path.stat().st_mtime_ns
            for key, members in groupby(_members(path, rows.refused), key=lambda member: member.key):
                sample = list(members)
                name = f"{path.name}/{name_text(key)}"
                label = _label(sample)
                images = [member for member in sample if member.is_image]
                reason = _double_member(sample) or ("" if images else "a sample without an image")
                if reason and (label or images):
                    rows.refuse(f"{path.name}/".encode() + key, label, reason)
                    continue
                if reason:
                    rows.refused.append((name, reason))
                    continue
                image = images[0]
                for other in images[1:]:
                    shown = f"{name}.{name_text(other.extension)}"
                    reason = f"a further image of a sample; the first is .{name_text(image.extension)}"
                    rows.ignored.append((shown, reason))
                location = pack_location(index, image.offset)
                samples.add(key + b"." + image.extension, len(labels), image.size, mtime_ns, location)
                labels.append(label)
            listing_progress.advance()
    needs_shard_names = duplicate_path(samples) is not None
    for item in samples:
        shard = files[unpack_location(item.location)[0]].name.removesuffix(".tar")
        key = shard.encode("utf-8", "surrogateescape") + b"/" + item.path if needs_shard_names else item.path
        rows.add(key, labels[item.label], item.size, item.mtime_ns, item.location)
    return ShardReader(root, names), rows.found((), options, store_classes, in_class_folders=True)


def _members(path: Path, refused: list[tuple[str, str]], keep_text: bool = True) -> Iterator[_Member]:
    with BoundedFile(path) as file:
        for member in iterate_members(file, path, 0, path.stat().st_size):
            name, reason = checked_member_name(member)
            if reason:
                refused.append((f"{path.name}/{name_text(name)}", reason))
            if reason or not name or member.isdir():
                continue
            text = b""
            if keep_text and name.lower().endswith((b".cls", b".json")) and member.size <= _MAX_LABEL_BYTES:
                file.seek(member.offset_data)
                file.allow_header()
                text = file.read(member.size)
            yield _Member(name, member.size, member.offset_data, text)


def _double_member(sample: Sequence[_Member]) -> str:
    """Return the reason to refuse a sample with two images, or two labels, that have the same extension.

    Two consecutive samples with the same key are refused, too, because they look like one sample with two images.
    """
    seen: set[bytes] = set()
    for member in sample:
        if member.kind in seen and (member.is_image or member.kind in _LABEL_MEMBERS):
            return f"two members .{name_text(member.extension)} with the same key"
        seen.add(member.kind)
    return ""


def _label(sample: Sequence[_Member]) -> str:
    """Return the label of a sample as text. The text is empty if the sample has no label or a pickled label."""
    texts = {member.kind: member.text for member in sample}
    if b"cls" in texts:
        text = texts[b"cls"].decode("utf-8", "backslashreplace").strip()
        return text if text.isprintable() else ""
    try:
        content = json.loads(texts.get(b"json", b"null"))
    except (ValueError, RecursionError):
        return ""
    if isinstance(content, dict):
        content = next((content[key] for key in _JSON_KEYS if key in content), None)
    return str(content).strip() if isinstance(content, int | str) and not isinstance(content, bool) else ""
