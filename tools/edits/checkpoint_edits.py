"""Edits of checkpoints and of other files that torch.save writes: names, tensors and plain values are changed.

An edited checkpoint gets a correct digest again.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.edits.byte_edits import Apply
from tools.edits.json_edits import Nested, plain, value_edits

_NESTED_LISTS = 900  # number of levels of nested lists; torch.load cannot read a pickle with many more levels
_HUGE = 10**9  # number of float32 values in a tensor of 4 GB
_CODE = b"\x80\x02cos\nsystem\nX\x0e\0\0\0touch executedq\x01\x85R."  # a pickle that calls os.system("touch executed")
TENSOR_GROUPS = ("parameters", "velocity")


def sign(path: Path) -> None:
    """Append a digest, as train/runs/checkpoint.py describes it, to an archive that torch.save has written."""
    content = path.read_bytes()
    assert content[-2:] == b"\0\0"
    body = content[:-2] + (7 + 64).to_bytes(2, "little")
    path.write_bytes(body + b"sha256:" + hashlib.sha256(body).hexdigest().encode())


def save_checkpoint(content: Any, path: Path) -> None:
    """Write a checkpoint with a correct digest."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        path.unlink()  # best.pt can be a hard link to the file; a new file at `path` leaves best.pt as it is
        torch.save(content, path)
    finally:
        sys.setrecursionlimit(limit)
    sign(path)


def checkpoint_edits(path: Path) -> Iterator[tuple[str, str, Apply]]:
    """Yield triples (field, kind, edit) for the plain values and the tensors of a checkpoint.

    path  an intact checkpoint
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    for edit in value_edits(content, _is_skipped):
        if edit.kind not in ("twice", "surrogate"):
            yield edit.field, edit.kind, _save_value(edit.value)
    for group in TENSOR_GROUPS:
        yield group, "delete", _edit_content(lambda c, group=group: c.pop(group))  # type: ignore[misc]
        yield group, "empty", _edit_content(lambda c, group=group: c.update({group: {}}))  # type: ignore[misc]
        yield group, "a list", _edit_content(lambda c, group=group: c.update({group: list(c[group].values())}))  # type: ignore[misc]
        yield group, "a tensor", _edit_content(lambda c, group=group: c.update({group: torch.zeros(3)}))  # type: ignore[misc]
        for name in (next(iter(content[group])), list(content[group])[-1]):
            for kind, change in group_edits(name):
                yield f"{group}.{name}", kind, _edit_content(lambda c, g=group, change=change: change(c[g]))  # type: ignore[misc]
    for kind, change in group_edits("random"):
        yield "random", kind, _edit_content(change)
    for kind, value in (
        ("of 1 byte", torch.zeros(1, dtype=torch.uint8)),
        ("of zeros", torch.zeros(5056, dtype=torch.uint8)),
        ("of 255", torch.full((5056,), 255, dtype=torch.uint8)),
    ):
        yield "random", kind, _edit_content(lambda c, value=value: c.update(random=value))  # type: ignore[misc]
    yield "random_cuda", "a state", _edit_content(lambda c: c.update(random_cuda=[torch.zeros(16, dtype=torch.uint8)]))
    yield "model.widths", "a million units", _edit_content(_widen(10**6))
    yield "model.widths", "10^12 units", _edit_content(_widen(10**12))
    yield "", "unknown name of a class", _replace_pickle
    for kind, apply in archive_edits():
        yield "", kind, signed(apply)


def _is_skipped(path: tuple[str | int, ...], value: Any) -> bool:
    """Return True for a field that value_edits leaves out: a tensor, or the source of a recipe field except `lr`."""
    is_tensor = isinstance(value, Tensor) or (bool(path) and path[0] in TENSOR_GROUPS)
    return is_tensor or ("sources" in path[:-1] and path[-1] != "lr")


def state_dict_edits(path: Path) -> Iterator[tuple[str, str, Apply]]:
    """Yield triples (field, kind, edit) for a file of tensors, such as torchvision's weights."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    for name in (next(iter(content)), list(content)[-1]):
        for kind, change in group_edits(name):
            yield name, kind, _edit_content(change, save=_save_plainly)
    for kind, value in (("null", None), ("a list", [1]), ("a text", "text"), ("a tensor", torch.zeros(3))):
        yield "", kind, lambda path, value=value: torch.save(value, path)  # type: ignore[misc]
    nested = plain(Nested(1), _NESTED_LISTS)
    yield "", "nested", _edit_content(lambda c: c.update(x=nested), _save_plainly)
    metadata = getattr(content, "_metadata", {}).get("", {})
    values: dict[str, Any] = {
        "empty": "",
        "null": "null",
        "nested": "[" * 10_000,
        "number": "7",
        "list": "[]",
        "not text": 7,
    }
    values |= {"escape code": '"\x1b[31m"', "NaN": "NaN", "object": "{}"}
    for name in [name for name, text in metadata.items() if isinstance(text, str)]:
        for kind, text in values.items():
            yield f"metadata.{name}", kind, _edit_metadata(name, text)
    for kind, apply in archive_edits():
        yield "", kind, apply


def group_edits(name: str) -> Iterator[tuple[str, Callable[[dict[str, Any]], Any]]]:
    """Yield pairs (kind, edit) for the tensor `name` in a dict of tensors."""
    yield "delete", lambda group: group.pop(name)
    yield "renamed", lambda group: group.update({f"{name}\x1b[31m": group.pop(name)})
    yield "unknown tensor", lambda group: group.update({"unknown": torch.zeros(3)})
    yield "key of a number", lambda group: group.update([(7, torch.zeros(3))])  # type: ignore[list-item]  # a wrong key
    for kind, value in (("null", None), ("number", 7), ("text", "text"), ("list", [1.0]), ("object", {})):
        yield kind, lambda group, value=value: group.update({name: value})  # type: ignore[misc]
    for kind, change in _tensor_changes():
        yield kind, lambda group, change=change: group.update({name: change(group[name])})  # type: ignore[misc]


def _tensor_changes() -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
        yield f"dtype {dtype}", lambda tensor, dtype=dtype: tensor.to(dtype)  # type: ignore[misc]
    yield "dtype uint8", lambda tensor: tensor.to(torch.uint8) if tensor.dtype != torch.uint8 else tensor.to(torch.int8)
    for kind, number in (("NaN", torch.nan), ("Infinity", torch.inf), ("1e38", 1e38)):
        yield kind, lambda tensor, number=number: _with_number(tensor, number)  # type: ignore[misc]
    yield "one more axis", lambda tensor: tensor[None].clone()
    yield "one more row", lambda tensor: torch.cat([tensor, tensor[:1]])
    yield "no numbers", lambda tensor: tensor.flatten()[:0].clone()
    yield "scalar", lambda tensor: tensor.flatten()[0].clone()
    yield "transposed", lambda tensor: tensor.transpose(0, -1) if tensor.ndim > 1 else tensor[None].clone()
    yield "expanded", lambda tensor: tensor.flatten()[:1].clone().expand(tensor.shape if tensor.ndim else (1,))
    yield "4 GB by strides of 0", lambda tensor: torch.zeros(1, dtype=tensor.dtype).expand(_HUGE)
    yield "every second number", lambda tensor: torch.zeros(2 * tensor.numel(), dtype=tensor.dtype)[::2]
    yield "overlapping", lambda tensor: torch.zeros(tensor.numel() + 1, dtype=tensor.dtype).as_strided((2, 2), (1, 1))
    yield "view of a larger storage", lambda tensor: torch.zeros(1_000_000, dtype=tensor.dtype)[: tensor.numel()]
    yield "meta", lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    yield "4 TB on meta", lambda tensor: torch.empty(10**12, device="meta")
    yield "sparse", lambda tensor: tensor.float().to_sparse()
    yield "sparse rows", lambda tensor: torch.eye(3).to_sparse_csr()
    yield "quantised", lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
    yield "a Parameter", lambda tensor: torch.nn.Parameter(tensor.float())
    yield "requires grad", lambda tensor: tensor.float().requires_grad_()
    yield "conjugated", lambda tensor: tensor.to(torch.complex64).conj()
    yield "negated view", lambda tensor: tensor.float()._neg_view()


def _with_number(tensor: Tensor, number: float) -> Tensor:
    changed = tensor.clone() if tensor.is_floating_point() else tensor.float()
    changed[(0,) * changed.ndim] = number  # flatten() would copy a tensor that is not contiguous
    return changed


def archive_edits() -> Iterator[tuple[str, Apply]]:
    """Yield pairs (kind, edit) for the ZIP archive that torch.save writes."""
    yield "zip bomb", lambda path: _rezip(path, {"data/0": bytes(2_000_000_000)}, zipfile.ZIP_DEFLATED)
    yield "storage missing", lambda path: _rezip(path, {"data/0": None})
    yield "storage empty", lambda path: _rezip(path, {"data/0": b""})
    yield "storage of 1 byte", lambda path: _rezip(path, {"data/0": b"x"})
    yield "pickle missing", lambda path: _rezip(path, {"data.pkl": None})
    yield "pickle empty", lambda path: _rezip(path, {"data.pkl": b""})
    yield "pickle of code", lambda path: _rezip(path, {"data.pkl": _CODE})
    yield "pickle that grows", lambda path: _rezip(path, {"data.pkl": _growing_pickle()})
    yield "pickle of 2^31 bytes claimed", lambda path: _rezip(path, {"data.pkl": b"\x80\x02B\xff\xff\xff\x7f."})
    yield "unknown version", lambda path: _rezip(path, {"version": b"99\n"})
    yield "other byte order", lambda path: _rezip(path, {"byteorder": b"big"})
    yield "member outside", lambda path: _rezip(path, {"../../outside": b"text"})


def _growing_pickle() -> bytes:
    """Return a small pickle of 40 nested levels. Each level refers twice to the previous level.

    The printed value would therefore have 2^40 items.
    """
    body = b"]q\0"
    for _ in range(40):
        body += b"h\0h\0\x86q\0"
    return b"\x80\x02" + body + b"."


def _widen(units: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        widths = dict.fromkeys(content["model"]["widths"], units)
        content["model"] = {**content["model"], "widths": widths}
        numbers = content["identity"]["model_numbers"]
        content["identity"] = {**content["identity"], "model_numbers": {**numbers, "widths": widths}}

    return change


def _save_value(value: Any) -> Apply:
    return lambda path: save_checkpoint(plain(value, _NESTED_LISTS), path)


def _save_plainly(content: Any, path: Path) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 10 * _NESTED_LISTS)
    torch.save(content, path)
    sys.setrecursionlimit(limit)


def _edit_content(
    change: Callable[[dict[str, Any]], Any], save: Callable[[Any, Path], None] = save_checkpoint
) -> Apply:
    def apply(path: Path) -> None:
        content = torch.load(path, map_location="cpu", weights_only=True)
        copied = {name: dict(part) if name in TENSOR_GROUPS else part for name, part in content.items()}
        change(copied)
        save(copied, path)

    return apply


def _edit_metadata(name: str, value: Any) -> Apply:
    def apply(path: Path) -> None:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content._metadata[""] = {**content._metadata[""], name: value}
        torch.save(content, path)

    return apply


def signed(apply: Apply) -> Apply:
    """Return an edit that first calls `apply`, and then appends a correct digest to the file."""

    def apply_and_sign(path: Path) -> None:
        apply(path)
        sign(path)

    return apply_and_sign


def _replace_pickle(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        content = next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    _rezip(path, {"data.pkl": content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9")})
    sign(path)


def _rezip(path: Path, changes: Mapping[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again. `changes` is {name of a member: new content}; the content None removes the member.

    The names are relative to the archive's only folder.
    """
    with zipfile.ZipFile(path) as archive:
        members: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(members)).partition("/")[0]
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", compression, compresslevel=1) as archive:
        for name, content in {**members, **{f"{folder}/{name}": content for name, content in changes.items()}}.items():
            if content is not None:
                archive.writestr(name, content)
    os.unlink(path)
    path.write_bytes(output.getvalue())
